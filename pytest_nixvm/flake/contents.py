"""What is in the store below a toplevel, read on the host without ever leaving the store."""

from __future__ import annotations

import filecmp
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

# More than any unit or configuration file that a person would want to see the difference of.
_LARGEST_TEXT = 256 * 1024


@dataclass(frozen=True)
class Entry:
    """What a path is: a file or directory in the store (`path` is resolved), or a link out of it.

    A machine's `/usr/lib/x` or `/dev/null` is not this host's: such a link is its `target`, a text.
    """

    kind: Literal["file", "directory", "link"]
    path: Path
    target: str = ""

    @property
    def masks(self) -> bool:
        """Whether this is how systemd is told that a unit does not exist."""
        return self.target == "/dev/null"


@dataclass(frozen=True)
class Store:
    """The directory of store paths, usually /nix/store."""

    root: Path

    @classmethod
    def of(cls, toplevel: Path) -> Store:
        """Return the store that a toplevel (a store path itself) is in."""
        return cls(toplevel.parent)

    def look(self, path: Path) -> Entry | None:
        """Return what is at `path`, None if nothing is."""
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        real = Path(os.path.realpath(path))
        if not real.is_relative_to(self.root) or not real.exists():
            return Entry("link", path, str(path.readlink() if path.is_symlink() else real))
        return Entry("directory" if real.is_dir() else "file", real)

    def children(self, path: Path) -> list[Path]:
        """Return what is in a directory, by name; nothing if there is none in the store."""
        entry = self.look(path)
        if entry is None or entry.kind != "directory":
            return []
        return sorted(path / child.name for child in entry.path.iterdir())

    def text(self, path: Path) -> str | None:
        """Return a file's text, where it points to if it leads out of the store.

        None if there is nothing, or no text of reasonable length.
        """
        entry = self.look(path)
        if entry is None or entry.kind == "directory":
            return None
        if entry.kind == "link":
            return f"-> {entry.target}\n"
        try:
            if entry.path.stat().st_size > _LARGEST_TEXT:
                return None
            text = entry.path.read_text()
        except (OSError, UnicodeDecodeError):
            return None
        return None if "\0" in text else text

    def same(self, before: Path, after: Path) -> bool:
        """Whether two paths have the same content, directories with all that is in them."""
        one, other = self.look(before), self.look(after)
        if one is None or other is None or one.kind != other.kind:
            return one is other
        if one.kind == "link":
            return one.target == other.target
        if one.path == other.path:
            return True
        if one.kind == "file":
            return filecmp.cmp(one.path, other.path, shallow=False)
        names = sorted(child.name for child in one.path.iterdir())
        return names == sorted(child.name for child in other.path.iterdir()) and all(
            self.same(one.path / name, other.path / name) for name in names
        )

    def name(self, path: str) -> str:
        """Return the name of a store path (or of a path below one) without its hash."""
        return Path(path).relative_to(self.root).parts[0][33:]

    def plain(self, text: str) -> str:
        """Return `text` with the hashes of its store paths left out: what a person compares."""
        return self._path.sub(lambda found: f"{self.root}/…-{found[1]}", text)

    def paths(self, text: str) -> list[str]:
        """Return the store paths that are named in `text`, with what is behind them, in order."""
        return [found[0].rstrip(".") for found in self._path.finditer(text)]

    @cached_property
    def _path(self) -> re.Pattern[str]:
        return re.compile(
            re.escape(str(self.root)) + r"/[0-9a-z]{32}-([^\s\"'`:;,()<>={}\[\]|&$]+)"
        )
