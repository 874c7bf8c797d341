"""The drives on QEMU's command line: which files they are, and the same line with other files.

A value is `key=value,key=value`; a comma inside a value is doubled. `-blockdev` and `-device` may
have JSON instead, and options may be spelled with two dashes.

Sources: QEMU's docs/system/invocation, util/qemu-option.c, util/keyval.c, blockdev.c.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Pairs = list[tuple[str, str]]
"""What a value consists of; a word without "=" has the key ""."""

# Options that have no value; whatever else begins with a dash has one.
_WITHOUT_VALUE = """
S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm
enable-sync-profile full-screen h help mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm
no-kvm-irqchip no-kvm-pit-reinjection no-quit no-reboot no-shutdown no-user-config nodefaults
nodefconfig nographic old-param only-migratable portrait preconfig s sdl semihosting singlestep
snapshot tdf usb version win2k-hack xen-attach xen-domid-restrict
"""
_FLAGS = frozenset(_WITHOUT_VALUE.split())

# Short spellings of -drive, and what it needs to mean the same.
_SHORT = {
    **{f"hd{'abcd'[n]}": (("index", str(n)), ("media", "disk")) for n in range(4)},
    "cdrom": (("index", "2"), ("media", "cdrom")),
    "fda": (("if", "floppy"), ("index", "0")),
    "fdb": (("if", "floppy"), ("index", "1")),
    "mtdblock": (("if", "mtd"),),
    "pflash": (("if", "pflash"),),
    "sd": (("if", "sd"),),
    "": (("index", "0"), ("media", "disk")),  # an argument that is no option is the first disk
}

# Drivers that are a file of the host as it is, without a format.
_PLAIN = ("file", "host_device", "host_cdrom")


@dataclass(frozen=True)
class Drive:
    """A drive that has a file.

    `path` is as QEMU got it, a URL (`nbd://…`, `json:{…}`) for what is not a file; `format` is
    None where QEMU guesses. With `snapshot`, QEMU writes into a temporary file that ends with it.
    """

    at: int  # the index in argv of the option's value
    path: str
    format: str | None
    readonly: bool
    snapshot: bool = False

    @property
    def is_url(self) -> bool:
        """Whether `path` is something else than a path."""
        return has_protocol(self.path)


@dataclass(frozen=True)
class Option:
    """An option on the command line: its name without dashes, and where its value is.

    `at` is None for an option without a value. An argument that is no option has the name "".
    """

    name: str
    at: int | None


# --- the syntax -------------------------------------------------------------------------------


def options(argv: Sequence[str]) -> Iterator[Option]:
    """Yield the options of a command line, in their order."""
    at = 1
    while at < len(argv):
        argument = argv[at]
        if not argument.startswith("-") or argument == "-":
            yield Option("", at)
            at += 1
            continue
        name = argument.removeprefix("-").removeprefix("-")
        has_value = name not in _FLAGS and at + 1 < len(argv)
        yield Option(name, at + 1 if has_value else None)
        at += 2 if has_value else 1


def keyval(text: str) -> Pairs:
    """Take a value apart; `unkeyval` puts it together again."""
    words = [word.replace(",,", ",") for word in re.findall(r"(?:[^,]|,,)+", text)]
    pairs = [word.partition("=") for word in words]
    return [(key, value) if equals else ("", key) for key, equals, value in pairs]


def unkeyval(pairs: Sequence[tuple[str, str]]) -> str:
    """Return the value that consists of `pairs`, commas doubled."""
    return ",".join(f"{key}={escape(value)}" if key else escape(value) for key, value in pairs)


def escape(text: str) -> str:
    """Return `text` as it stands inside a value."""
    return text.replace(",", ",,")


def settings(text: str, first: str = "") -> dict[str, str]:
    """Return what a value sets, the last of two of a kind.

    `first` is the key that the first word has where it stands for itself ("driver" for -device).
    Other words without "=" are switches: "on", or "off" with "no" before them.
    """
    if text.lstrip().startswith("{"):
        return dict(_flat(json_value(text)))
    result = {}
    for number, (key, value) in enumerate(keyval(text)):
        if key:
            result[key] = value
        elif number == 0 and first:
            result[first] = value
        else:
            result[value] = "on"
            if value.startswith("no"):
                result[value[2:]] = "off"
    return result


def json_value(text: str) -> dict[str, Any]:
    """Return a value that is JSON; {} if it is none that QEMU would take."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def has_protocol(path: str) -> bool:
    """Whether QEMU takes `path` for a URL: a colon comes before any slash."""
    return re.match(r"[^:/]*:", path) is not None


# --- drives -----------------------------------------------------------------------------------


def drives(argv: Sequence[str]) -> tuple[Drive, ...]:
    """Return the drives that have a file, in the order of the command line."""
    every = list(options(argv))
    temporary = any(option.name == "snapshot" for option in every)
    nodes = _nodes(argv)
    found = []
    for option in every:
        if option.at is None:
            continue
        drive: Drive | None = None
        if option.name == "drive":
            drive = _of_drive(option.at, settings(argv[option.at]), temporary)
        elif option.name == "blockdev":
            drive = _of_node(option.at, nodes)
        elif option.name in _SHORT and argv[option.at]:
            readonly = option.name == "cdrom" and not temporary
            drive = Drive(option.at, _path(argv[option.at]), None, readonly, temporary)
        if drive is not None:
            found.append(drive)
    return tuple(found)


def with_file(argv: Sequence[str], drive: Drive, path: str, format: str) -> tuple[str, ...]:
    """Return the command line with another file, of another format, as that drive.

    The arguments before the drive stay where they are. Raises `ValueError` if `argv` does not have
    the drive.
    """
    if drive not in drives(argv):
        raise ValueError(f"no drive with the file {drive.path} at {drive.at}")
    name = next(option.name for option in options(argv) if option.at == drive.at)
    before, value, after = argv[: drive.at], argv[drive.at], argv[drive.at + 1 :]
    if name == "drive":
        return (*before, _other_drive(value, path, format), *after)
    if name == "blockdev":
        return _other_node(argv, drive.at, path, format)
    pairs = [*_SHORT[name], ("file", path), ("format", format)]
    return (*(before[:-1] if name else before), "-drive", unkeyval(pairs), *after)


def _of_drive(at: int, has: dict[str, str], temporary: bool) -> Drive | None:
    path = _file_of(has)
    if not path:
        return None
    readonly = any(_is_on(has.get(key)) for key in ("readonly", "read-only"))
    snapshot = _is_on(has["snapshot"]) if "snapshot" in has else temporary
    return Drive(
        at=at,
        path=path,
        format=has.get("format", has.get("driver")),
        readonly=(readonly or has.get("media") == "cdrom") and not snapshot,
        snapshot=snapshot,
    )


def _file_of(has: dict[str, str]) -> str:
    path = has.get("file") or has.get("file.filename") or ""
    driver = has.get("file.driver", "file")
    if not path and driver not in _PLAIN:
        # Its parts are keys of their own: file.driver=nbd,file.host=….
        return f"{driver}:" + (has.get("file.path") or has.get("file.host") or "")
    return _path(path)


def _path(path: str) -> str:
    return _local(path.removeprefix("file:")) if path.startswith("file:") else path


def _local(path: str) -> str:
    # With a colon it would pass for a URL.
    return f"./{path}" if has_protocol(path) else path


def _other_drive(value: str, path: str, format: str) -> str:
    pairs, done = Pairs(), False
    for key, text in keyval(value):
        if key in ("file", "file.filename"):
            if not done:
                pairs.append((key, path))
                done = True
        elif key not in ("format", "driver", "file.driver"):
            pairs.append((key, text))
    if not done:
        # What it was had keys of its own, which mean nothing to a file.
        pairs = [("file", path), *((k, text) for k, text in pairs if not k.startswith("file."))]
    return unkeyval([*pairs, ("format", format)])


def _is_on(value: Any) -> bool:
    return value is True or value in ("on", "yes", "true", "y")


# --- -blockdev: nodes that may have others in them, or name others ------------------------------


@dataclass(frozen=True)
class _Node:
    at: int
    tree: dict[str, Any]
    is_json: bool

    def text(self) -> str:
        return json.dumps(self.tree) if self.is_json else unkeyval(list(_flat(self.tree)))


def _nodes(argv: Sequence[str]) -> dict[int, _Node]:
    result = {}
    for option in options(argv):
        if option.name != "blockdev" or option.at is None:
            continue
        text = argv[option.at]
        is_json = text.lstrip().startswith("{")
        tree = json_value(text) if is_json else _tree(settings(text, "driver"))
        result[option.at] = _Node(option.at, tree, is_json)
    return result


def _of_node(at: int, nodes: dict[int, _Node]) -> Drive | None:
    chain = _chain(nodes[at].tree)
    inner = chain[-1]
    driver = str(inner.get("driver", ""))
    if isinstance(inner.get("file"), str) or driver.startswith("null-"):
        return None  # its file is a node of its own
    path = inner.get("filename")
    if not path and driver in _PLAIN:
        return None
    if not path or driver not in _PLAIN:
        path = f"{driver}:{path or inner.get('path') or inner.get('host') or ''}"
    else:
        path = _local(str(path))
    above = _users(nodes, nodes[at].tree)
    formats = [*(tree for user in above for tree in reversed(_chain(user.tree))), *chain]
    outer = _above(chain, above)
    return Drive(
        at=at,
        path=path,
        format=str(outer["driver"]) if outer is not None else "raw",
        readonly=any(_is_on(tree.get("read-only")) for tree in formats),
    )


def _chain(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a node and what is in it, the file last."""
    chain = [tree]
    while isinstance(chain[-1].get("file"), dict):
        chain.append(chain[-1]["file"])
    return chain


def _users(nodes: dict[int, _Node], tree: dict[str, Any]) -> list[_Node]:
    """Return the nodes that a node's file is used by, from below."""
    users: list[_Node] = []
    name = tree.get("node-name")
    while name is not None and len(users) < len(nodes):
        user = next((n for n in nodes.values() if _chain(n.tree)[-1].get("file") == name), None)
        if user is None:
            break
        users.append(user)
        name = user.tree.get("node-name")
    return users


def _above(chain: list[dict[str, Any]], users: list[_Node]) -> dict[str, Any] | None:
    """Return the part that says the format of the file at the end of `chain`."""
    if len(chain) > 1:
        return chain[-2]
    return _chain(users[0].tree)[-1] if users else None


def _other_node(argv: Sequence[str], at: int, path: str, format: str) -> tuple[str, ...]:
    nodes = _nodes(argv)
    result = list(argv)
    node = nodes[at]
    chain = _chain(node.tree)
    users = _users(nodes, node.tree)
    outer = _above(chain, users)
    inner = chain[-1]
    if inner.get("driver") not in _PLAIN:
        for key in [key for key in inner if key not in ("node-name", "read-only", "cache")]:
            del inner[key]
    inner |= {"driver": "file", "filename": path}
    if outer is None:
        # A bare file: the format comes around it, under the name that the device knows.
        tree = {"driver": format, **{k: inner.pop(k) for k in ("node-name",) if k in inner}}
        if "read-only" in inner:
            tree["read-only"] = inner["read-only"]
        result[at] = _Node(at, {**tree, "file": inner}, node.is_json).text()
        return tuple(result)
    outer["driver"] = format
    result[at] = node.text()
    if users and len(chain) == 1:
        result[users[0].at] = users[0].text()
    return tuple(result)


def _tree(has: dict[str, str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in has.items():
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                break  # both file=… and file.…=…: QEMU refuses it
            place = inner
        else:
            place[last] = value
    return tree


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield prefix + key, "on" if value else "off"
        else:
            yield prefix + key, str(value)
