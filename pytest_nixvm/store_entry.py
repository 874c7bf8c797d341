"""One template in the store: while it is being made, and while it is used.

Two locks keep it whole, and both fall when a process ends, however it ends: KEY.lock beside it
(exclusive) is held by whoever makes or removes it, and `used` in it (shared) by everybody who uses
it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from pytest_nixvm.errors import MachineError, SettingsError
from pytest_nixvm.store_files import (
    MANIFEST,
    USED,
    Damaged,
    Manifest,
    Stopped,
    canonical,
    describe,
    sync_directory,
    write_manifest,
)

REMOVED = ".removed-"
"""How the names of entries begin that are on their way out."""

# Seconds. The kernel has no wait for a lock that ends.
_POLL = 0.02


class Entry:
    """A complete template, which nobody removes until `close()`.

    `data` is what was sealed with it, as JSON gives it back.
    """

    def __init__(self, key: str, directory: Path, data: dict[str, Any], lock: int) -> None:
        self.key = key
        self.directory = directory
        self.data = data
        self._lock: int | None = lock
        self._guard = threading.Lock()

    def close(self) -> None:
        """Let it be removed, as far as we are concerned. A second call does nothing."""
        with self._guard:
            descriptor, self._lock = self._lock, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.utime(descriptor)
            os.close(descriptor)

    def __enter__(self) -> Entry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Info:
    """An entry as a person sees it. Times are seconds since 1970, sizes bytes on the disk."""

    key: str
    name: str  # the machine's, "" if nobody can tell
    size: int
    created: float
    used: float
    in_use: bool  # being used or being made right now
    complete: bool


class Building:
    """A template that is being made, under the build lock.

    Fill `directory`, then `seal` or `abandon` it; any thread may do that. The files can be used
    from here at once: nobody else touches the directory while the lock is held.
    """

    def __init__(
        self,
        directory: Path,
        components: Mapping[str, Any],
        lock: FileLock,
        made: Callable[[], object],
    ) -> None:
        self.key = directory.name
        self.directory = directory
        self._components = components
        self._made = made  # called when it is sealed and the lock is free again
        self._lock: FileLock | None = lock
        self._stop = threading.Event()
        self._guard = threading.Lock()

    def seal(self, data: Mapping[str, Any], writable: frozenset[str] = frozenset()) -> Entry:
        """Make an entry of it, and return that, in use.

        All files become read-only; those in `writable` are only made private: programs that have
        to open them for writing, though they don't write, can do so. Nobody may write to any of
        them any more. Other entries go if the store's limit asks for it.

        Takes as long as the disk needs for the files. If it fails, the files stay until
        `abandon()`, for they may be in use.

        Raises:
            SettingsError: the disk is full, or can't be written.
            MachineError: a file is being written to, or `abandon()` was called meanwhile.
            ValueError: there is something in the directory that is no plain file.
        """
        with self._guard:
            if self._lock is None:
                raise ValueError(f"The template in {self.directory} is sealed or abandoned.")
            try:
                return self._seal(data, writable)
            except OSError as error:
                raise unusable(self.directory.parent, error) from error
            except Damaged as error:
                why = f"The template in {self.directory} is not kept: {error}."
                raise MachineError(why) from error
            except Stopped:
                raise MachineError(f"The template in {self.directory} was given up.") from None

    def _seal(self, data: Mapping[str, Any], writable: frozenset[str]) -> Entry:
        files = describe(self.directory, writable, self._stop)
        used = self.directory / USED
        lock = os.open(used, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            # As it will be read again: what JSON changes, it changes for the first user as well.
            kept = json.loads(canonical(data))
            components = json.loads(canonical(self._components))
            write_manifest(self.directory, Manifest(self.key, components, kept, time.time(), files))
            sync_directory(self.directory.parent)
        except BaseException:
            os.close(lock)
            for name in (MANIFEST, USED):
                (self.directory / name).unlink(missing_ok=True)
            raise
        self._release()
        self._made()
        return Entry(self.key, self.directory, kept, lock)

    def abandon(self) -> None:
        """Remove the directory, if it is not sealed, and let others try.

        A `seal` that runs in another thread ends soon, with an error.
        """
        self._stop.set()
        with self._guard:
            if self._lock is not None:
                # What can't be removed now is found by the next `trim`.
                with contextlib.suppress(OSError):
                    wipe(self.directory)
                self._release()

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError):
                holder(self.directory).unlink(missing_ok=True)
            lock.release()


# --- the directory and its locks --------------------------------------------------------------


def unusable(directory: Path, error: OSError) -> SettingsError:
    """Return the error for a store in `directory` that can't be written."""
    return SettingsError(
        f"Templates can't be kept in {directory}: {error.strerror or error}. "
        "Make room there or name another place: --nixvm-cache=DIR."
    )


def holder(directory: Path) -> Path:
    """Return the file that says who makes the entry in `directory`."""
    return directory.with_name(f"{directory.name}.holder")


def build_lock(directory: Path) -> FileLock:
    """Return the lock of whoever makes or removes an entry; any thread may release it.

    Its file stays when the entry goes: others may have opened it, and wait.
    """
    return FileLock(directory.with_name(f"{directory.name}.lock"), mode=0o600, thread_local=False)


def lock_file(path: Path, operation: int, seconds: float) -> int | None:
    """Lock a file that is there (LOCK_SH or LOCK_EX), return its descriptor, which is the lock.

    None if others hold it for `seconds`, or if it was removed while we waited. Raises `OSError`.
    """
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        while True:
            try:
                fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return None
                time.sleep(_POLL)
        try:
            current = path.lstat()
        except FileNotFoundError:
            return None
        if not os.path.samestat(os.fstat(descriptor), current):
            return None
        stack.pop_all()
        return descriptor


def in_use(directory: Path, complete: bool) -> bool:
    """Say whether an entry is used or made by anybody right now."""
    try:
        descriptor = lock_file(directory / USED, fcntl.LOCK_EX, 0)
        if descriptor is None:
            return True
        os.close(descriptor)
    except OSError:
        pass  # never finished
    if complete or not directory.with_name(f"{directory.name}.lock").exists():
        return False
    lock = build_lock(directory)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    lock.release()
    return False


def remove(directory: Path, inode: int | None = None) -> bool:
    """Remove an entry, unless somebody uses or makes it, or it can't be removed.

    With `inode` only that directory is meant, not one that was made in its place meanwhile.
    """
    lock = build_lock(directory)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    try:
        if inode not in (None, directory.lstat().st_ino):
            return False
        used = None
        with contextlib.suppress(OSError):
            # Without that file nobody can use it.
            used = lock_file(directory / USED, fcntl.LOCK_EX, 0)
            if used is None:
                return False
        try:
            wipe(directory)
            holder(directory).unlink(missing_ok=True)
        finally:
            if used is not None:
                os.close(used)
    except OSError:
        return False
    finally:
        lock.release()
    return True


def wipe(directory: Path) -> None:
    """Remove a directory under the build lock: at once for others, whatever ends us."""
    rest = directory.with_name(f"{REMOVED}{directory.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        directory.rename(rest)
    except FileNotFoundError:
        return
    wipe_rest(rest)


def wipe_rest(path: Path) -> None:
    """Remove what has no entry's name any more, as far as that goes."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            path.chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
