"""Templates that are kept between runs: found, made, counted and removed.

    store = Store(cache / "templates", limit)
    entry = store.open(key, components)
    if entry is None:
        made = store.begin(key, components, timeout=600)
        if isinstance(made, Building):
            ...                                 # fill made.directory
            entry = made.seal({"any": "JSON"})
        else:
            entry = made                        # another process made it while we waited
    ...                                         # use entry.directory and entry.data
    entry.close()

An entry is the directory KEY, complete if it has a manifest, which is written last. Without it the
directory is what is left of an attempt, and is never trusted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pytest_nixvm.errors import SettingsError
from pytest_nixvm.store_entry import (
    REMOVED,
    Building,
    Entry,
    Info,
    build_lock,
    holder,
    in_use,
    lock_file,
    remove,
    unusable,
    wipe,
    wipe_rest,
)
from pytest_nixvm.store_files import (
    MANIFEST,
    USED,
    Damaged,
    disk_usage,
    key_of,
    read_manifest,
    verify,
)

__all__ = ["DEFAULT_LIMIT", "Building", "Entry", "Info", "Store", "key_of"]

DEFAULT_LIMIT = 20 * 2**30
"""Bytes of disk that all templates of a user may take."""

# Nothing else is ever removed: the user may have named a directory that has other things in it.
_KEY = re.compile("[0-9a-f]{32}")

# Seconds. Whoever looks at a lock, or removes an entry, is done by then.
_MOMENT = 2.0
_SWEEP = 30.0


class Store:
    """The templates in `directory`, of which all together take at most `limit` bytes of disk.

    Nothing is made on the disk before the first `begin`.
    """

    def __init__(self, directory: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.directory = directory
        self.limit = limit

    # --- use ----------------------------------------------------------------------------------

    def open(
        self,
        key: str,
        components: Mapping[str, Any],
        damaged: Callable[[str], None] = lambda _: None,
    ) -> Entry | None:
        """Return an entry that was verified, in use; None if there is none.

        A damaged one is removed if nobody uses it; `damaged` is told in one line what was wrong.
        Raises `SettingsError` if the directory is somebody else's.
        """
        _check_key(key)
        if not self._private():
            return None
        directory = self.directory / key
        try:
            inode = directory.lstat().st_ino
        except OSError:
            return None
        try:
            return self._open(key, components)
        except Damaged as error:
            damaged(str(error))
            remove(directory, inode)
            return None

    def _open(self, key: str, components: Mapping[str, Any]) -> Entry | None:
        directory = self.directory / key
        if not directory.is_dir() or not (directory / MANIFEST).exists():
            return None
        try:
            lock = lock_file(directory / USED, fcntl.LOCK_SH, _MOMENT)
        except OSError as error:
            raise Damaged(f"{USED}: {error.strerror}") from error
        if lock is None:
            return None
        try:
            manifest = verify(directory, key, components)
            if manifest is None:
                os.close(lock)
                return None
            with contextlib.suppress(OSError):
                os.utime(lock)
            return Entry(key, directory, manifest.data, lock)
        except BaseException:
            os.close(lock)
            raise

    # --- making -------------------------------------------------------------------------------

    def begin(
        self,
        key: str,
        components: Mapping[str, Any],
        timeout: float,
        waiting: Callable[[], None] = lambda: None,
        damaged: Callable[[str], None] = lambda _: None,
    ) -> Building | Entry:
        """Start to make an entry, or return what another process has made meanwhile, in use.

        `waiting` is called once if another process makes it right now; `damaged` as in `open`.

        Raises:
            SettingsError: after `timeout` seconds of waiting, or if the disk can't be written.
        """
        deadline = time.monotonic() + timeout
        _check_key(key)
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise unusable(self.directory, error) from error
        self._private()
        lock = build_lock(self.directory / key)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                waiting()
                lock.acquire(timeout=timeout, poll_interval=0.05)
        except Timeout:
            raise SettingsError(self._held(key, timeout)) from None
        except OSError as error:
            raise unusable(self.directory, error) from error
        try:
            return self._begin(key, components, lock, deadline, waiting, damaged)
        except OSError as error:
            lock.release()
            raise unusable(self.directory, error) from error
        except BaseException:
            lock.release()
            raise

    def _begin(
        self,
        key: str,
        components: Mapping[str, Any],
        lock: FileLock,
        deadline: float,
        waiting: Callable[[], None],
        damaged: Callable[[str], None],
    ) -> Building | Entry:
        directory = self.directory / key
        try:
            entry = self._open(key, components)
        except Damaged as error:
            damaged(str(error))
            entry = None
        if entry is not None:
            lock.release()
            return entry
        used = self._unused(directory, waiting, deadline)
        try:
            wipe(directory)
        finally:
            if used is not None:
                os.close(used)
        directory.mkdir(mode=0o700)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        holder(directory).write_text(json.dumps(note))
        return Building(directory, dict(components), lock, self.trim)

    def _unused(self, directory: Path, waiting: Callable[[], None], deadline: float) -> int | None:
        """Wait until nobody uses what is damaged; return the lock that keeps others away."""
        try:
            used = lock_file(directory / USED, fcntl.LOCK_EX, 0)
            if used is None:
                waiting()
                rest = max(deadline - time.monotonic(), 0)
                used = lock_file(directory / USED, fcntl.LOCK_EX, rest)
        except OSError:
            return None  # never finished
        if used is None and directory.exists():
            raise SettingsError(
                f"The template in {directory} is damaged, and a process that runs uses it. "
                "End that process, or name another place: --nixvm-cache=DIR."
            )
        return used

    # --- the whole ----------------------------------------------------------------------------

    def entries(self) -> list[Info]:
        """Return all there is, complete or not, the last used first."""
        found = [_info(path) for path in self._listing() if _KEY.fullmatch(path.name)]
        return sorted((info for info in found if info), key=lambda info: -info.used)

    def clear(self, keys: list[str] | None = None) -> list[Info]:
        """Remove entries (all, or those named) that nobody uses; return what was removed."""
        with self._sweeping():
            return [
                info
                for info in self.entries()
                if (keys is None or info.key in keys) and remove(self.directory / info.key)
            ]

    def trim(self) -> list[str]:
        """Remove remains, then entries until the limit holds; return the keys of those.

        The least recently used goes first; what is in use stays, even if that is too much.
        """
        removed: list[str] = []
        # Two at once would both find too much, and remove twice as much.
        with self._sweeping():
            for path in self._listing():
                if path.name.startswith(REMOVED):
                    wipe_rest(path)
            infos = self.entries()
            total = sum(info.size for info in infos)
            for info in sorted(infos, key=lambda info: (info.complete, info.used)):
                if info.complete and total <= self.limit:
                    break
                if not info.in_use and remove(self.directory / info.key):
                    removed.append(info.key)
                    total -= info.size
        return removed

    # --- inside -------------------------------------------------------------------------------

    def _private(self) -> bool:
        """Make the directory private, if there is one. Raises `SettingsError` if it is not ours."""
        try:
            status = self.directory.stat()
            if status.st_uid != os.geteuid():
                raise SettingsError(
                    f"{self.directory} belongs to user {status.st_uid}: templates from there can't "
                    "be trusted. Remove it or name another place: --nixvm-cache=DIR."
                )
            if status.st_mode & 0o077:
                self.directory.chmod(0o700)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unusable(self.directory, error) from error
        return True

    def _listing(self) -> list[Path]:
        try:
            return list(self.directory.iterdir())
        except OSError:
            return []

    @contextlib.contextmanager
    def _sweeping(self) -> Iterator[None]:
        """Let one process at a time remove entries that are sound; each removal is safe anyway."""
        lock = FileLock(self.directory / ".sweep.lock", mode=0o600)
        with contextlib.ExitStack() as stack:
            if self.directory.is_dir():
                with contextlib.suppress(Timeout, OSError):
                    lock.acquire(timeout=_SWEEP, poll_interval=0.02)
                    stack.callback(lock.release)
            yield

    def _held(self, key: str, timeout: float) -> str:
        directory = self.directory / key
        try:
            note = json.loads(holder(directory).read_text())
            since = time.strftime("%H:%M:%S", time.localtime(note["since"]))
            who = f"Process {note['pid']} on {note['host']}"
            when = f" since {since}"
        except (OSError, ValueError, KeyError, TypeError):
            who, when = "Another process", ""
        return (
            f"{who} has been making the same template{when}, and we waited {timeout:g} s for it "
            f"(it holds {directory}.lock). Let it finish, end it, or name another place: "
            "--nixvm-cache=DIR."
        )


def _check_key(key: str) -> None:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key: key_of() makes them.")


def _info(directory: Path) -> Info | None:
    try:
        manifest = read_manifest(directory)
    except Damaged:
        manifest = None
    try:
        made = used = directory.lstat().st_mtime
    except OSError:
        return None  # removed meanwhile
    with contextlib.suppress(OSError):
        used = (directory / USED).lstat().st_mtime
    return Info(
        key=directory.name,
        name=str(manifest.components.get("machine", "")) if manifest else "",
        size=disk_usage(directory),
        created=manifest.created if manifest else made,
        used=used,
        in_use=in_use(directory, manifest is not None),
        complete=manifest is not None,
    )
