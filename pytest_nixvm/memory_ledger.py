"""The ledger of memory: who has reserved how much, and who waits, over all processes of a user.

It is a directory with a file for each. A file names its process by PID and start time, so the
death of that process, however it came, is seen by all others. Files are written as a whole, and
each by its own process only; the lock is for whoever decides by what all of them say.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pytest_nixvm.errors import SettingsError
from pytest_nixvm.output import make_directory

_PROC = Path("/proc")
# What else may go wrong, such as too many open files, says nothing about the process asked for.
_NOT_THERE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)

# One that waits shows several times a second that it does. If it does not for so many seconds, its
# process is stopped (Control-Z, a debugger): the others go on without it.
_ABSENT = 10.0
_OLD = 30 * 24 * 3600.0

_LOCK = "lock"

# --- the kernel's files -------------------------------------------------------------------------


def read_fields(path: Path) -> dict[str, int]:
    """Read lines like "MemFree:   123 kB"; the unit is left out."""
    found: dict[str, int] = {}
    for line in read_lines(path):
        name, *values = line.split()[:2]
        if values and values[0].isdigit():
            found[name.removesuffix(":")] = int(values[0])
    return found


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file that say anything; none if it can't be seen."""
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except _NOT_THERE:
        return []


# --- processes --------------------------------------------------------------------------------


def start_time(pid: int) -> str:
    """Return when a process started (field 22 of /proc/PID/stat), "" if it is dead."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # "pid (name) state ppid …"; the name may hold anything, even ") R 1".
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _lives(pid: int, started: str) -> bool:
    return bool(pid and started) and start_time(pid) == started


def used_by(pid: int) -> int | None:
    """Return the MiB of a process that are missing in `available()`; None while it ends.

    These are its anonymous pages and those of tmpfs and memfd. What it has of a file, such as
    the pages of a template, is the page cache's: that counts as available.
    """
    fields = read_fields(_PROC / str(pid) / "status")
    if "RssAnon" not in fields:
        return None
    return (fields["RssAnon"] + fields.get("RssShmem", 0)) // 1024


# --- the ledger -------------------------------------------------------------------------------


@dataclass
class Entry:
    """One reservation, or the wish for one, as it stands in its file."""

    what: str
    mebibytes: int
    owner: int = field(default_factory=os.getpid)
    owner_started: str = field(default_factory=lambda: start_time(os.getpid()))
    qemu: int = 0
    qemu_started: str = ""

    @classmethod
    def read(cls, path: Path) -> Entry:
        """Read a file. Raises `ValueError` or `TypeError` if it is no entry."""
        entry = cls(**json.loads(path.read_text()))
        if any(type(value) is not type(_BLANK[name]) for name, value in asdict(entry).items()):
            raise TypeError("not an entry")
        return entry

    @property
    def owner_lives(self) -> bool:
        """Whether the process that wrote it lives."""
        return _lives(self.owner, self.owner_started)

    @property
    def qemu_lives(self) -> bool:
        """Whether its QEMU is known and lives, maybe longer than its owner: a VM that is kept."""
        return _lives(self.qemu, self.qemu_started)


_BLANK: dict[str, Any] = asdict(Entry("", 0, 0, ""))


class Ledger:
    """The files below `directory`. Raises `SettingsError` if they can't be written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / _world()
        if not self.directory.exists():
            _remove_old(directory)
        make_directory(self.directory)
        try:
            # Permission bits don't tell root of a read-only file system.
            (self.directory / _LOCK).touch()
        except OSError as error:
            raise self._unwritable(error) from error

    @contextlib.contextmanager
    def locked(self, timeout: float) -> Iterator[None]:
        """Hold the lock. Raises `Timeout`, or `SettingsError` if the directory can't be written."""
        make_directory(self.directory)  # the cache may have been cleared
        lock = FileLock(self.directory / _LOCK)
        try:
            lock.acquire(timeout=timeout, poll_interval=0.005)
        except Timeout:
            raise
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def write(self, path: Path, entry: Entry) -> None:
        """Write a file as a whole. Raises `SettingsError` if that can't be."""
        make_directory(self.directory)
        new = path.with_name(f"{path.name}.{threading.get_ident()}.new")
        try:
            new.write_text(json.dumps(asdict(entry)))
            new.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise self._unwritable(error) from error

    def version(self) -> int:
        """Return a number that is another one when a file has come or gone."""
        try:
            return self.directory.stat().st_mtime_ns
        except _NOT_THERE:
            return 0

    def reservations(self) -> list[Entry]:
        """Return all whose process or QEMU lives; the files of others are removed."""
        found = []
        for path in self._files(r"[^.].*\.reserved"):
            entry = self._read(path)
            if entry and (entry.owner_lives or entry.qemu_lives):
                found.append(entry)
            else:
                path.unlink(missing_ok=True)
        return found

    def queue(self) -> list[Path]:
        """Return the files of those that wait, first come first."""
        return sorted(self._files(r"[0-9]{9}\..*\.waiting"))

    def next_in_queue(self) -> Path:
        """Return the file for one more; the lock must be held."""
        last = max((int(path.name.partition(".")[0]) for path in self.queue()), default=0)
        return self.directory / f"{last + 1:09}.{secrets.token_hex(6)}.waiting"

    def ahead(self, ticket: Path | None) -> Iterator[Entry]:
        """Yield those that came before; the files of dead processes are removed."""
        for path in self.queue():
            if path == ticket:
                break
            entry = self._read(path)
            if not (entry and entry.owner_lives):
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime < _ABSENT:
                    yield entry

    def still_waits(self, ticket: Path, entry: Entry) -> None:
        """Show that one is there; its file is written again if the cache was cleared."""
        now = time.time()  # not that of a file server
        try:
            os.utime(ticket, (now, now))
        except FileNotFoundError:
            self.write(ticket, entry)

    def _files(self, pattern: str) -> list[Path]:
        try:
            return [each for each in self.directory.iterdir() if re.fullmatch(pattern, each.name)]
        except _NOT_THERE:
            return []

    def _read(self, path: Path) -> Entry | None:
        try:
            return Entry.read(path)
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _unwritable(self, error: OSError) -> SettingsError:
        return SettingsError(
            f"Can't write to {self.directory}: {error.strerror or error}. "
            "--nixvm-cache names another place."
        )


def _world() -> str:
    """Return a name for where PIDs mean the same: this computer since its boot, or a container.

    A cache may be shared with other computers and with containers.
    """
    boot = "".join(read_lines(_PROC / "sys" / "kernel" / "random" / "boot_id"))[:13]
    try:
        return f"{boot}-{(_PROC / 'self' / 'ns' / 'pid').stat().st_ino}"
    except _NOT_THERE:
        return f"{boot}-0"


def _remove_old(directory: Path) -> None:
    """Remove what earlier boots have left; another computer's is younger if it is in use."""
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            ours = re.fullmatch(r"[0-9a-f-]{13}-[0-9]+", path.name)
            if ours and time.time() - path.stat().st_mtime > _OLD:
                shutil.rmtree(path, ignore_errors=True)
