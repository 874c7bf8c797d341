"""What differs in two toplevels' /etc and activation script, by name.

Names only: an activation script's files may hold password hashes, which belong into no report.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm.flake.contents import Store
from pytest_nixvm.flake.units import changed_files

_SNIPPET = re.compile(r"^#### Activation script snippet (.+):$", re.MULTILINE)
# How NixOS writes down that a file of /etc is a copy with an owner and a mode of its own.
_ABOUT = re.compile(r"\.(?:mode|uid|gid)$")


@dataclass(frozen=True)
class Names:
    """Names that only the candidate has, that it has no more, and whose content differs."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)


def compare_etc(store: Store, base: Path, candidate: Path) -> Names:
    """Return the files of /etc that differ, system units left out.

    A directory that is one link (fonts, udev/rules.d) is one name, user units are named.
    """
    had, has = (dict(_etc(store, toplevel / "etc")) for toplevel in (base, candidate))
    both = had.keys() & has.keys()
    changed = {name for name in both if not store.same(had[name], has[name])}
    owned = {_ABOUT.sub("", name) for name in changed | (had.keys() ^ has.keys())}
    changed |= owned & both
    every = had.keys() | has.keys()

    def told(names: set[str]) -> tuple[str, ...]:
        return tuple(
            sorted(n for n in names if not (_ABOUT.search(n) and _ABOUT.sub("", n) in every))
        )

    return Names(told(has.keys() - had), told(had.keys() - has), told(changed))


def _etc(store: Store, folder: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    for path in store.children(folder):
        name = prefix + path.name
        if name == "systemd/system":
            continue
        entry = store.look(path)
        if entry is None:
            continue
        if entry.kind == "directory" and (not path.is_symlink() or name == "systemd/user"):
            yield from _etc(store, path, f"{name}/")
        else:
            yield name, path


def compare_specialisations(store: Store, base: Path, candidate: Path) -> Names:
    """Return the specialisations that came, went, or are another system."""
    had, has = (
        {path.name: path for path in store.children(toplevel / "specialisation")}
        for toplevel in (base, candidate)
    )
    return Names(
        tuple(sorted(has.keys() - had.keys())),
        tuple(sorted(had.keys() - has.keys())),
        tuple(sorted(n for n in had.keys() & has if store.look(had[n]) != store.look(has[n]))),
    )


def compare_activation(store: Store, base: Path, candidate: Path) -> tuple[str, ...]:
    """Return the names of the activation script's snippets that do something else now.

    The files that they read, if their texts differ, are added in parentheses:
    `users (users-groups.json)`. What comes before the first snippet is called "activate".
    """
    had, has = (_snippets(store, toplevel) for toplevel in (base, candidate))
    found = []
    for name in dict.fromkeys([*has, *had]):
        before, after = had.get(name), has.get(name)
        if before == after:
            continue
        if before is None or after is None:
            found.append(f"{name} ({'new' if before is None else 'removed'})")
            continue
        files = sorted({file for file, _, _ in changed_files(store, before, after)})
        if files:
            found.append(f"{name} ({', '.join(files)})")
        elif store.plain(before) != store.plain(after):
            found.append(name)
    return tuple(found)


def _snippets(store: Store, toplevel: Path) -> dict[str, str]:
    script = toplevel / "activate"
    text = (store.text(script) or "").replace(str(toplevel), "@toplevel@")
    parts = _SNIPPET.split(text)
    return {"activate": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
