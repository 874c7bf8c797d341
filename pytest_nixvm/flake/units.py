"""The system units of two toplevels, compared as switch-to-configuration compares them."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pytest_nixvm.flake.contents import Store

Kind = Literal["restart", "reload", "keep", "none"]
_Sections = dict[str, dict[str, list[str]]]

# What switch-to-configuration does not restart a unit for (its list, October 2026).
_COSMETIC = (
    "AllowIsolate",
    "CollectMode",
    "Description",
    "Documentation",
    "IgnoreOnIsolate",
    "OnFailure",
    "OnFailureJobMode",
    "OnSuccess",
    "RefuseManualStart",
    "RefuseManualStop",
    "SourcePath",
    "StopWhenUnneeded",
)
_TRUE = ("1", "yes", "true", "on")
# Unit files name scripts, these name others, and triggers name configuration files.
_DEPTH = 3


@dataclass(frozen=True)
class UnitChange:
    """A unit that both have, and that is not the same in both.

    `kind` is what the switch does to it if it runs: "restart" (which may be stop and start),
    "reload", "keep" (it goes on as it was defined before, which the configuration asks for), or
    "none" (nothing that matters to a running unit differs, or systemd takes it over by itself).
    `keys` are what differs, as `Service.ExecStart`, or `wanted by x.target`; `files` the names of
    scripts and configuration files that it names, directly or through others, and whose texts
    differ. `rebuilt` are the keys that differ in nothing but the hash of a store path: what is
    behind it was built anew, of packages or other things that differ.
    """

    name: str
    kind: Kind
    keys: tuple[str, ...]
    files: tuple[str, ...] = ()
    rebuilt: tuple[str, ...] = ()

    @property
    def only_rebuilt(self) -> bool:
        """Whether it says the same as before, of things that were built anew."""
        return not self.keys and not self.files


@dataclass(frozen=True)
class Unit:
    """A unit as a toplevel defines it: what `systemctl cat` would print, and what it says.

    `wanted` has lines as `wanted by multi-user.target`. Without `defined` there is nothing but
    these, or the unit is masked.
    """

    text: str = ""
    says: Mapping[str, Mapping[str, list[str]]] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    alias: str = ""
    defined: bool = False
    masked: bool = False

    @property
    def full(self) -> str:
        """The text with what wants it."""
        return "".join(f"# {line}\n" for line in self.wanted) + self.text


@dataclass(frozen=True)
class UnitDifference:
    """The units that only the candidate has, that it has no more, and that differ."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[UnitChange, ...]
    before: Mapping[str, Unit] = field(repr=False, compare=False, default_factory=dict)
    after: Mapping[str, Unit] = field(repr=False, compare=False, default_factory=dict)
    store: Store = field(
        repr=False, compare=False, default_factory=lambda: Store(Path("/nix/store"))
    )

    @property
    def is_empty(self) -> bool:
        """Whether all units are the same."""
        return not (self.added or self.removed or self.changed)

    def diff(self, name: str) -> str:
        """Return how a unit's text differs, with the scripts and files it names; "" if not at all.

        The hashes of store paths are left out, and lines that differ in nothing else.
        """
        before, after = (side.get(name, Unit()) for side in (self.before, self.after))
        return text_difference(name, before.full, after.full, self.store)


def compare_units(store: Store, base: Path, candidate: Path) -> UnitDifference:
    """Return how the system units of two toplevels differ."""
    before, after = read_units(store, base), read_units(store, candidate)
    had = {name for name, unit in before.items() if unit.defined}
    has = {name for name, unit in after.items() if unit.defined}
    changed = []
    for name in sorted((before.keys() | after.keys()) - (had ^ has)):
        old, new = before.get(name, Unit()), after.get(name, Unit())
        # An alias's text is the other unit's, which is listed by its own name.
        aliases = old.alias or new.alias
        differs = old.alias != new.alias if aliases else old.full != new.full
        if differs or old.masked != new.masked:
            changed.append(_change(store, name, old, new))
    return UnitDifference(
        tuple(sorted(has - had)),
        tuple(sorted(had - has)),
        tuple(changed),
        before,
        after,
        store,
    )


def read_units(store: Store, toplevel: Path) -> dict[str, Unit]:
    """Return the system units of a toplevel by name; drop-ins are part of their unit."""
    folder = toplevel / "etc/systemd/system"
    texts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    aliases: dict[str, str] = {}
    wanted: dict[str, list[str]] = defaultdict(list)
    masked = set()
    for path in store.children(folder):
        unit, dot, suffix = path.name.rpartition(".")
        verb = {"wants": "wanted by", "requires": "required by", "upholds": "upheld by"}.get(suffix)
        entry = store.look(path)
        if entry is None:
            continue
        if dot and verb:
            for child in store.children(path):
                wanted[child.name].append(f"{verb} {unit}")
        elif entry.masks:
            masked.add(path.name)
        elif entry.kind != "directory":
            texts[path.name].insert(0, (path.name, store.text(path) or ""))
            link = str(path.readlink()) if path.is_symlink() else ""
            if link and "/" not in link and link != path.name:
                aliases[path.name] = link
        elif dot and suffix == "d":
            for child in store.children(path):
                if child.suffix == ".conf":
                    texts[unit].append((f"{path.name}/{child.name}", store.text(child) or ""))
    return {
        name: Unit(
            text="".join(f"# {file}\n{text.rstrip()}\n" for file, text in texts.get(name, [])),
            says=parse_unit(*(text for _, text in texts.get(name, []))),
            wanted=tuple(sorted(wanted.get(name, []))),
            alias=aliases.get(name, ""),
            defined=name in texts and name not in masked,
            masked=name in masked,
        )
        for name in {*texts, *wanted, *masked}
    }


def parse_unit(*texts: str) -> _Sections:
    """Return section → key → values of a unit file and its drop-ins, without [Install].

    An empty value drops those before it, as it does for systemd.
    """
    sections: _Sections = {}
    for text in texts:
        section = ""
        joined = re.sub(r"\\\n(?:[ \t]*[#;].*\n)*", " ", text)
        for line in map(str.strip, joined.splitlines()):
            if line.startswith("[") and line.endswith("]"):
                section = line[1:-1]
                continue
            key, equals, value = line.partition("=")
            if not equals or line[0] in "#;" or section in ("", "Install"):
                continue
            values = sections.setdefault(section, {}).setdefault(key.strip(), [])
            if value.strip():
                values.append(value.strip())
            else:
                values.clear()
    return sections


def _change(store: Store, name: str, old: Unit, new: Unit) -> UnitChange:
    keys, rebuilt, files = [], [], set[str]()
    kinds = set[Kind]()
    for section in sorted(old.says.keys() | new.says.keys()):
        was, now = old.says.get(section, {}), new.says.get(section, {})
        for key in sorted(was.keys() | now.keys()):
            one, other = was.get(key), now.get(key)
            if one == other:
                continue
            kinds.add(_weight(section, key, one, other))
            before, after = "\n".join(one or ()), "\n".join(other or ())
            found = {file for file, _, _ in changed_files(store, before, after)}
            files |= found
            if one is None or other is None or store.plain(before) != store.plain(after):
                keys.append(f"{section}.{key}")
            elif not found:
                rebuilt.append(f"{section}.{key}")
    keys += sorted({*old.wanted} ^ {*new.wanted})
    if old.masked != new.masked:  # one that is defined elsewhere, or it would come or go
        keys.append("masked" if new.masked else "not masked")
    if old.alias != new.alias:
        keys.append(f"alias of {new.alias or old.alias}")
    kind: Kind = "restart" if "restart" in kinds else "reload" if "reload" in kinds else "none"
    return UnitChange(
        name, _effect(name, kind, new), tuple(keys), tuple(sorted(files)), tuple(rebuilt)
    )


def _weight(section: str, key: str, one: list[str] | None, other: list[str] | None) -> Kind:
    """What a difference in one key asks for. A None is a key that is not there."""
    if section == "Unit" and key in _COSMETIC:
        return "none"
    if (section, key) in (("Unit", "X-Reload-Triggers"), ("Service", "ExecReload")):
        return "none" if other is None else "reload"
    if (section, key) == ("Mount", "Options") and one is not None and other is not None:
        return "reload"
    return "restart"


def _effect(name: str, kind: Kind, unit: Unit) -> Kind:
    """What comes of it for this unit: some kinds of units, and some settings, have their own."""
    if kind != "restart":
        return kind
    suffix = name.rpartition(".")[2]
    if suffix in ("target", "slice", "path"):
        return "none"  # targets are started again, the others' settings hold after a daemon-reload
    if suffix == "socket":
        return "keep"
    if name in ("-.mount", "nix.mount"):
        return "reload"
    if suffix == "mount":
        return "restart"
    if _is(unit, "Service", "X-ReloadIfChanged", default=False):
        return "reload"
    may_restart = (
        _is(unit, "Service", "X-RestartIfChanged", default=True)
        and not _is(unit, "Unit", "RefuseManualStop", default=False)
        and not _is(unit, "Unit", "X-OnlyManualStart", default=False)
    )
    return "restart" if may_restart else "keep"


def _is(unit: Unit, section: str, key: str, *, default: bool) -> bool:
    values = unit.says.get(section, {}).get(key)
    return values[-1].lower() in _TRUE if values else default


def text_difference(name: str, before: str, after: str, store: Store) -> str:
    """Return a unified difference of two texts, and of the files in the store that they name.

    The hashes of store paths are left out. A file that only one of them names is not shown.
    """
    parts = [(name, before, after), *changed_files(store, before, after)]
    return "".join(
        _unified(what, store.plain(one), store.plain(other)) for what, one, other in parts
    )


def _unified(name: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"a/{name}", f"b/{name}", lineterm="", n=2
    )
    return "".join(f"{line}\n" for line in lines)


def changed_files(store: Store, before: str, after: str) -> list[tuple[str, str, str]]:
    """Return (name, text before, text after) of the files that differ and that both texts name.

    They belong together if all but their hash is the same. Only what is text: scripts and
    configuration files, not programs; and what these name in turn.
    """
    return _followed(store, before, after, set())


def _followed(
    store: Store, before: str, after: str, seen: set[Path], depth: int = _DEPTH
) -> list[tuple[str, str, str]]:
    old = {store.plain(path): Path(path) for path in store.paths(before)}
    found = []
    for path in dict.fromkeys(store.paths(after)):
        one, other = old.get(store.plain(path)), Path(path)
        if one is None or one == other or other in seen:
            continue
        seen.add(other)
        was, now = store.text(one), store.text(other)
        if was is None or now is None or was == now:
            continue
        if store.plain(was) != store.plain(now):
            name = store.name(path) if other.parent == store.root else other.name
            found.append((name, was, now))
        if depth:
            found += _followed(store, was, now, seen, depth - 1)
    return found
