"""What a call of nix was about: the flake, and the user's own files behind the copies nix names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm.flake.remember import MODULES

# A flake's files as nix names them: a copy in the store or, in newer versions, not copied.
_SOURCE = re.compile(r"(?P<root>/nix/store/[0-9a-z]{32}-source)(?P<inner>/[^\s'\"»:,;)]*)?")
_LAZY = re.compile(r"«(?:git\+file|path):(?://)?(?P<root>/[^»?]*)[^»]*»(?P<inner>/[^\s'\"»:,;)]*)?")


@dataclass(frozen=True)
class Tree:
    """A source tree on this machine that nix reads."""

    root: Path  # its top
    folder: Path  # where its flake.nix is
    git: bool  # whether git says what is in it


@dataclass(frozen=True)
class Subject:
    """What the failed call was about."""

    what: str  # "nixosConfigurations.dev-vm of /home/me/config"
    url: str  # the flake's reference
    trees: Sequence[Tree]  # the flake's first, then those of local overrides

    @property
    def where(self) -> str:
        """The flake's directory, or its reference if it is somewhere else."""
        return str(self.trees[0].root) if self.trees else self.url

    def place(self, path: str) -> tuple[list[Tree], str] | None:
        """Return the trees a path in a message may be of, and its name in them."""
        copy = _SOURCE.fullmatch(path) or _LAZY.fullmatch(path)
        if copy is not None:
            tree = self._tree_of(copy)
            name = (copy["inner"] or "").strip("/")
            trees = [tree] if tree else list(self.trees)
            return (trees, name) if name else None
        for tree in self.trees:
            if Path(path).is_relative_to(tree.root):
                return [tree], str(Path(path).relative_to(tree.root))
        if path.startswith("/") or not self.trees:
            return None
        return list(self.trees), path

    def local(self, text: str) -> str:
        """Put the user's own files in the place of the copies in the store that nix speaks of."""

        def replace(match: re.Match[str]) -> str:
            inner = (match["inner"] or "").lstrip("/")
            tree = self._tree_of(match)
            if tree is not None:
                return str(tree.root / inner)
            for tree in self.trees:
                if inner and _equal(tree.root / inner, Path(match["root"]) / inner):
                    return str(tree.root / inner)
            return match[0]

        return _LAZY.sub(replace, _SOURCE.sub(replace, text))

    def _tree_of(self, copy: re.Match[str]) -> Tree | None:
        """Return the tree that a copy in the store is of: the one with the same flake.nix."""
        for tree in self.trees:
            mine = tree.folder / "flake.nix"
            if copy.re is _LAZY:
                if Path(copy["root"]) == tree.root:
                    return tree
            elif _equal(mine, Path(copy["root"]) / mine.relative_to(tree.root)):
                return tree
        return None


def is_ours(file: str) -> bool:
    """Whether it is the copy of a file of flake/modules: no place where a user could mend it."""
    copy = _SOURCE.fullmatch(file)
    return copy is not None and _equal(MODULES / (copy["inner"] or "").strip("/"), Path(file))


def _equal(one: Path, other: Path) -> bool:
    try:
        return one.read_bytes() == other.read_bytes()
    except OSError:
        return False
