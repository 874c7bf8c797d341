"""Which packages two closures have, by name and version, and how large they are."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cmp_to_key
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from pytest_nixvm.errors import ChangeError, FlakeError
from pytest_nixvm.flake.nix import Nix, NixFailure

# A name ends, as for Nix's own commands, at the first dash that is not followed by a letter.
_NAME = re.compile(r"(.+?)-([^A-Za-z].*)")

# The end of a store path's name that is an output's or a part's name, not the version's.
_OUTPUT = re.compile(
    r"-(?:bin|dev|lib|lib32|lib64|libgcc|man|doc|devdoc|info|out|static|debug|data|dist|terminfo|"
    r"getent|locale|modules|modules-shrunk|shrunk|env|wrapped|unwrapped|zoneinfo|sbin|tools|login)$"
)

# Made anew for each configuration: they differ whenever anything does, and say nothing by it.
_DERIVED = re.compile(
    r"(?:activatable-system|dbus-1|desktops|etc|firmware|kernel-modules|nixos-help|nixos-version|"
    r"source|system-path|system-units|udev-rules|user-environment|user-units|X11-fonts)$"
    r"|home-manager-(?:path|generation|files|applications|fonts)$"
    r"|(?:etc|hm|initrd|nixos-system|stage-1|stage-2|unit|X-Reload-Triggers|X-Restart-Triggers)[-_]"
)

# What a package has, and a generated directory of configuration files has not.
_PACKAGE_FOLDERS = ("bin", "sbin", "lib", "libexec", "share", "include")

_TIMEOUT = 120.0


@dataclass(frozen=True)
class PackageChange:
    """One package's versions in both closures; of what has none, the version is "".

    `size` is by how many bytes all store paths of that name grew together. `chosen` tells whether
    the configuration names it (environment.systemPackages) or something else needs it.
    """

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    size: int
    chosen: bool = False

    @property
    def kind(self) -> Literal["added", "removed", "upgraded", "downgraded", "changed"]:
        """What happened to it; "changed": only other versions went or came beside the newest."""
        if not self.before:
            return "added"
        if not self.after:
            return "removed"
        order = compare_versions(self.before[-1], self.after[-1])
        return "upgraded" if order < 0 else "downgraded" if order > 0 else "changed"


@dataclass(frozen=True)
class PackageDifference:
    """The packages that differ.

    `rebuilt` are names of those that have the same version and another store path: something they
    are made of or made with changed. `size_*` are bytes of the whole closures.
    """

    changes: tuple[PackageChange, ...]
    rebuilt: tuple[str, ...]
    size_before: int
    size_after: int

    @property
    def added(self) -> tuple[PackageChange, ...]:
        """Those that the deployed generation has not."""
        return self._of("added")

    @property
    def removed(self) -> tuple[PackageChange, ...]:
        """Those that the candidate has not."""
        return self._of("removed")

    @property
    def upgraded(self) -> tuple[PackageChange, ...]:
        """Those of another version than before, older ones included: `kind` tells."""
        return self._of("upgraded", "downgraded", "changed")

    def _of(self, *kinds: str) -> tuple[PackageChange, ...]:
        return tuple(change for change in self.changes if change.kind in kinds)


@dataclass(frozen=True)
class Closure:
    """A store path with all it needs: path → bytes, and path → the paths it names."""

    sizes: Mapping[str, int]
    references: Mapping[str, tuple[str, ...]]

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return sum(self.sizes.values())


def read_closure(nix: Nix, path: Path) -> Closure:
    """Ask nix for the closure of a store path.

    Raises:
        ChangeError: the path is not in the store.
        FlakeError: nix can't tell, or does not answer within two minutes.
    """
    if not path.exists():
        raise ChangeError(f"{path} is not in the Nix store any more; build it again.")
    try:
        return parse_closure(nix.path_info(path, timeout=_TIMEOUT))
    except NixFailure as failure:
        if failure.timeout is not None:
            raise FlakeError(f"nix did not say within {_TIMEOUT:g} s what {path} needs.") from None
        raise FlakeError(f"nix can't tell what {path} needs: {failure}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FlakeError(f"nix can't tell what {path} needs: {error}") from None


def parse_closure(answer: Any) -> Closure:
    """Make a Closure of what `nix path-info --json` prints.

    Up to 2.18 that is a list, from 2.19 on a mapping by path, and in format 2 (from 2.33 on) one
    by the paths' last parts, in `info`. Raises ValueError for a path that is not in the store.
    """
    store = ""
    if isinstance(answer, list):
        answer = {item["path"]: item if item.get("valid", True) else None for item in answer}
    elif isinstance(answer.get("info"), dict):
        store = f"{answer.get('storeDir', '/nix/store')}/"
        answer = answer["info"]

    def full(path: str) -> str:
        return path if path.startswith("/") else store + path

    missing = [full(path) for path, about in answer.items() if about is None]
    if missing:
        raise ValueError(f"{missing[0]} is not in the store")
    return Closure(
        {full(path): int(about["narSize"]) for path, about in answer.items()},
        {full(path): tuple(map(full, about["references"])) for path, about in answer.items()},
    )


def split_name(name: str) -> tuple[str, str]:
    """Return name and version of a store path's name (without hash): curl-8.5.0-bin → curl 8.5.0.

    The version is "" where the name has none.
    """
    found = _NAME.fullmatch(name)
    if not found:
        return name, ""
    return found[1], _OUTPUT.sub("", found[2])


def compare_versions(before: str, after: str) -> int:
    """Return -1, 0 or 1 as `before` is older than, equal to, or newer than `after`.

    Nix's own order: parts of digits count as numbers, "pre" is older than nothing at all.
    """

    def parts(version: str) -> list[str]:
        return re.findall(r"\d+|[^\d.\-]+", version)

    def is_older(one: str, other: str) -> bool:
        if one.isdecimal() and other.isdecimal():
            return int(one) < int(other)
        if not one and other.isdecimal():
            return True
        if one == "pre" and other != "pre":
            return True
        if other == "pre":
            return False
        if other.isdecimal():
            return True
        return False if one.isdecimal() else one < other

    for one, other in zip_longest(parts(before), parts(after), fillvalue=""):
        if one != other:
            if is_older(one, other):
                return -1
            if is_older(other, one):
                return 1
    return 0


def compare_closures(
    before: Closure, after: Closure, chosen: Iterable[str] = ()
) -> PackageDifference:
    """Return which packages differ; `chosen` are the store paths that the configuration names."""
    picked = {split_name(_name(path))[0] for path in chosen}
    old, new = _by_name(before), _by_name(after)
    changes, rebuilt = [], []
    for name in sorted(old.keys() | new.keys(), key=lambda name: (name.lower(), name)):
        was, now = old.get(name, {}), new.get(name, {})
        differing = {*_paths(was)} ^ {*_paths(now)}
        if not differing or not any(_is_package(path) for path in differing):
            continue
        if was.keys() == now.keys():
            rebuilt.append(name)
            continue
        size = sum(after.sizes[path] for path in _paths(now))
        size -= sum(before.sizes[path] for path in _paths(was))
        changes.append(
            PackageChange(name, _ordered(was), _ordered(now), size, chosen=name in picked)
        )
    return PackageDifference(tuple(changes), tuple(rebuilt), before.size, after.size)


def _by_name(closure: Closure) -> dict[str, dict[str, list[str]]]:
    """Name → version → store paths."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in closure.sizes:
        name = _name(path)
        if not _DERIVED.match(name):
            package, version = split_name(name)
            found[package][version].append(path)
    return found


def _paths(versions: Mapping[str, list[str]]) -> Iterable[str]:
    return (path for paths in versions.values() for path in paths)


def _ordered(versions: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(versions, key=cmp_to_key(compare_versions)))


def _name(path: str) -> str:
    return path.rpartition("/")[2][33:]


def _is_package(path: str) -> bool:
    """Whether this is software, not a file or folder that was made for this configuration."""
    folder = Path(path)
    if not folder.is_dir():
        return False
    if split_name(_name(path))[1]:
        return True
    return any((folder / name).is_dir() for name in _PACKAGE_FOLDERS)
