"""Where a run leaves what it has to show: a directory of its own, never in another run's way."""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from pytest_nixvm.errors import SettingsError

MANIFEST = ".pytest-nixvm-{}.json"
"""One for each process that writes there: pytest's, and those of xdist's workers."""

EARLIER = "earlier"


class Output:
    """A run's output directory.

        output = Output.below(Path("results"))      # what an earlier run left moves to earlier/
        output.directory("dev-vm-0")                # made, and known to be ours
        output.close()

    The newest run is at the top of the directory that the user names; what earlier runs have left
    there is moved to `earlier/DATE`, and nothing else is touched. While another run writes there,
    this one gets a directory `DATE_PID` in it.
    """

    def __init__(self, path: Path, lock: FileLock | None = None) -> None:
        self.path = path
        self._lock = lock
        self._names: list[str] = []
        self._guard = threading.Lock()

    @classmethod
    def below(cls, base: Path) -> Output:
        """Claim `base`. Raises `SettingsError` if it can't be written to."""
        make_directory(base)
        lock = FileLock(base / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return cls(base / f"{_stamp()}_{os.getpid()}")
        except OSError as error:
            raise _unwritable(base, error) from error
        _set_aside(base)
        return cls(base, lock)

    @classmethod
    def fresh(cls, parent: Path) -> Output:
        """Return a new directory below `parent`, named after the time; not made yet."""
        return cls(parent / f"{_stamp()}_{os.getpid()}")

    def directory(self, name: str) -> Path:
        """Make the directory `name` in it, or one with a number behind if that is there."""
        with self._guard:
            make_directory(self.path)
            number = 1
            while True:
                path = self.path / (name if number == 1 else f"{name}-{number}")
                try:
                    path.mkdir(mode=0o700)
                except FileExistsError:
                    number += 1
                    continue
                except OSError as error:
                    raise _unwritable(path, error) from error
                self._note(path.name)
                return path

    def shared(self, name: str) -> Path:
        """Return the path of a directory in it that all processes of a run share; not made."""
        return self.file(name)

    def file(self, name: str) -> Path:
        """Return the path of a file that is about to be written in it."""
        with self._guard:
            make_directory(self.path)
            self._note(name)
            return self.path / name

    def close(self) -> None:
        """Let the next run have the directory."""
        if self._lock is not None:
            self._lock.release()

    def _note(self, name: str) -> None:
        # Written each time: whatever ends this process, the next one knows what is not the user's.
        if name not in self._names:
            self._names.append(name)
        entries = {"began": _stamp(), "entries": self._names}
        path = self.path / MANIFEST.format(os.getpid())
        try:
            path.write_text(json.dumps(entries) + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error


def _set_aside(base: Path) -> None:
    began = ""
    names: set[str] = set()
    for manifest in base.glob(MANIFEST.format("*")):
        try:
            known = json.loads(manifest.read_text())
            began = began or str(known["began"])
            names.update(str(name) for name in known["entries"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        names.add(manifest.name)
    if not names:
        return
    place, number = base / EARLIER / Path(began).name, 1
    while place.exists():
        number += 1
        place = base / EARLIER / f"{Path(began).name}-{number}"
    make_directory(place)
    for name in names:
        # A manifest is a file that anybody may have edited: only what is directly in here moves.
        if Path(name).name == name and (base / name).exists():
            with suppress(OSError):
                shutil.move(base / name, place / name)


def make_directory(path: Path) -> None:
    """Make a private directory with its parents. Raises `SettingsError` if that can't be."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _unwritable(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise _unwritable(path, PermissionError("permission denied"))


def _stamp() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d_%H.%M.%S")


def _unwritable(path: Path, error: OSError) -> SettingsError:
    reason = error.strerror or str(error)
    return SettingsError(
        f"Can't write to {path}: {reason}. --nixvm-cache and --nixvm-output name other places."
    )
