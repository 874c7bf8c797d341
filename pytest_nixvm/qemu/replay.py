"""The command line of a frozen machine's QEMU becomes that of a clone's.

A clone has the same devices in the same order, which is what QEMU compares a saved state with;
its files, sockets and ports are others.

Sources: QEMU's qemu-options.hx, backends/hostmem-file.c, net/slirp.c, chardev/char.c.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_nixvm.qemu.drives import (
    Pairs,
    drives,
    escape,
    json_value,
    keyval,
    options,
    settings,
    unkeyval,
    with_file,
)

RAM = "nixvm-ram"
"""QEMU's id of the object that is the guest's memory."""

DEFAULT_MEMORY = 128  # MiB, without -m

# Options whose value is a path and nothing else: a comma in it is just a comma.
_PATHS = frozenset(
    {
        *("", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "pflash", "sd"),
        *("D", "L", "bios", "dtb", "initrd", "kernel", "pidfile", "readconfig", "writeconfig"),
    }
)
# The guest's business: what looks like a path there is one in the guest.
_GUESTS = frozenset({"append", "name", "smbios"})
_CHARACTER_DEVICES = frozenset({"debugcon", "monitor", "parallel", "qmp", "qmp-pretty", "serial"})
_UNITS = {"": 1 << 20, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def memory_of(argv: Sequence[str]) -> int:
    """Return the guest's memory in MiB. Raises `ValueError` for a size that is none."""
    size = DEFAULT_MEMORY
    for option in options(argv):
        if option.name == "m" and option.at is not None:
            text = settings(argv[option.at], "size").get("size")
            if text is not None:
                size = _mib(text) or DEFAULT_MEMORY
    return size


def _mib(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([bkmgt]?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"-m {text}: not a size that is understood")
    size = float(match[1]) * _UNITS[match[2].lower()]
    return -int(-size // (1 << 20))


def ram_arguments(memory: int, ram: Path) -> tuple[str, ...]:
    """Return what puts the guest's memory, of `memory` MiB, into the file `ram`.

    The file takes up what the guest has used, not more.
    """
    return (
        "-object",
        f"memory-backend-file,id={RAM},size={memory}M,mem-path={escape(str(ram))},share=on",
        "-machine",
        f"memory-backend={RAM}",
    )


def clone_argv(
    argv: Sequence[str],
    *,
    moved: Mapping[str, str],
    disks: Mapping[str, tuple[str, str]],
    ram: Path | None,
    qemu_version: tuple[int, int, int],
    share: bool = False,
) -> tuple[str, ...]:
    """Return the command line of a QEMU that waits for the state of the one that had `argv`.

    `moved` has the places that are others now, directories or files: each is replaced wherever it
    stands, with what is below it. `disks` has for a drive's path, as it stands in `argv`, the new
    file and its format. `ram` is the file with the memory: the clone sees it and leaves it as it
    is, or with `share` writes to it, to be frozen again; None if the memory is in the state.

    QEMU picks the host's ports anew, on the loopback interface for forwarded ones.

    Raises `ValueError` if `argv` loads a state already, has not its memory in a file of ours, or
    if a disk is not there or a drive that is written to would be the template's own.
    """
    argv = _without_incoming(argv)
    places = _Places(moved)
    replaced = [drive for drive in drives(argv) if drive.path in disks]
    missing = disks.keys() - {drive.path for drive in replaced}
    if missing:
        raise ValueError(f"no drive has the file {', '.join(sorted(missing))}")
    kept = {drive.at for drive in replaced}
    for drive in drives(argv):
        if drive.at not in kept and not drive.readonly and places.move(drive.path) == drive.path:
            raise ValueError(f"the drive {drive.path} is written to and has no file of its own")
    result = list(argv)
    has_ram = False
    for option in options(argv):
        at, name = option.at, option.name
        if at is None or at in kept:
            continue
        text = _with_free_ports(name, argv[at])
        if name == "object" and settings(text, "qom-type").get("id") == RAM:
            result[at] = _ram(text, ram, share, qemu_version)
            has_ram = True
        else:
            result[at] = places.in_value(name, text)
    if ram is not None and not has_ram:
        raise ValueError(f"no -object has id={RAM}")
    # From the end: a drive's option may become two arguments.
    for drive in reversed(replaced):
        result = list(with_file(result, drive, *disks[drive.path]))
    return (*result, "-incoming", "defer")


def _without_incoming(argv: Sequence[str]) -> tuple[str, ...]:
    drop = set()
    for option in options(argv):
        if option.name == "loadvm":
            raise ValueError("-loadvm: the machine loads a state already")
        if option.name == "incoming" and option.at is not None:
            # A clone that is frozen itself has it from us.
            if argv[option.at] != "defer":
                raise ValueError(f"-incoming {argv[option.at]}: the machine loads a state already")
            drop |= {option.at - 1, option.at}
    return tuple(argument for at, argument in enumerate(argv) if at not in drop)


def _ram(text: str, ram: Path | None, share: bool, qemu_version: tuple[int, int, int]) -> str:
    if ram is None:
        # QEMU knows it by its id again.
        return f"memory-backend-ram,id={RAM},size={settings(text)['size']}"
    ours = ("mem-path", "share", "readonly", "rom")
    pairs: Pairs = [(key, value) for key, value in keyval(text) if key not in ours]
    pairs += [("mem-path", str(ram)), ("share", "on" if share else "off")]
    if not share and qemu_version >= (8, 2, 0):
        # Else a private mapping wants the file to be writable.
        pairs += [("readonly", "on"), ("rom", "off")]
    return unkeyval(pairs)


# --- ports ------------------------------------------------------------------------------------


def _with_free_ports(name: str, text: str) -> str:
    if name in ("netdev", "nic", "net"):
        return _changed(text, lambda key, value: _forward(value) if key == "hostfwd" else value)
    if name == "chardev":
        has = settings(text, "backend")
        if has.get("backend") == "socket" and "port" in has and _listens(has):
            return _changed(text, lambda key, value: "0" if key == "port" else value)
    if name in _CHARACTER_DEVICES and _listens(settings(text, "to")):
        return re.sub(r"^((?:tcp|telnet|websocket):[^,]*:)\d+(?=,)", r"\g<1>0", text)
    return text


def _listens(has: Mapping[str, str]) -> bool:
    return has.get("server") in ("on", "yes", "true", "y")


def _forward(text: str) -> str:
    """Return a forwarding rule with another host's end: any free port on loopback."""
    match = re.fullmatch(r"(tcp|udp|):(?:\[[^]]*\]|[^:]*):\d+-(.*)", text)
    return f"{match[1] or 'tcp'}:127.0.0.1:0-{match[2]}" if match else text


def _changed(text: str, change: Any) -> str:
    if text.lstrip().startswith("{"):
        return _json_changed(text, change)
    before = keyval(text)
    after = [(key, change(key, value)) for key, value in before]
    # What does not change stays as it was spelt.
    return text if before == after else unkeyval(after)


def _json_changed(text: str, change: Any) -> str:
    def walk(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            # A list of strings is one of {"str": …} in QEMU.
            return {k: walk(key if k == "str" else k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(key, each) for each in value]
        return change(key, value) if isinstance(value, str) else value

    before = json_value(text)
    after = walk("", before)
    return text if before == after else json.dumps(after)


# --- paths ------------------------------------------------------------------------------------


class _Places:
    """Directories and files that are elsewhere now."""

    def __init__(self, moved: Mapping[str, str]) -> None:
        self._moved = {old.rstrip("/"): new.rstrip("/") for old, new in moved.items()}
        longest_first = sorted(self._moved, key=len, reverse=True)
        names = "|".join(re.escape(old) for old in longest_first)
        # All in one go, so that what has been replaced is not replaced once more.
        self._whole = re.compile(rf"(?:{names})(?=/|$)") if names else None
        self._within = re.compile(rf"(?<=[:=>\s\"'])(?:{names})(?=[/\s\"']|$)") if names else None

    def in_value(self, option: str, text: str) -> str:
        """Return an option's value with the new places."""
        if option in _GUESTS:
            return text
        if option in _PATHS or text.startswith(("file:", "pipe:")):
            return self.move(text)
        return _changed(text, lambda _key, value: self.move(value))

    def move(self, text: str) -> str:
        """Return a path, or a text with one in it (`unix:/run/x`), with the new places."""
        if self._whole is None or self._within is None:
            return text
        if text.startswith("/"):
            return self._whole.sub(self._new, text, count=1) if self._whole.match(text) else text
        return self._within.sub(self._new, text)

    def _new(self, match: re.Match[str]) -> str:
        return self._moved[match[0]]
