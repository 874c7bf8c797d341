"""What a kept template's directory must look like: its manifest, and the content of its files.

An entry is trusted only if it is exactly what was sealed: the same files, ours and private, with
the same content. Reading gigabytes to learn that would take longer than what the store saves, so
the manifest records for each file its inode and the times of its last changes. No program can set
ctime: while it stands, nothing was written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
"""Raise it whenever a manifest, or what it says about files, gets another meaning."""

MANIFEST = "manifest.json"
USED = "used"
"""Locked by whoever uses the entry; its mtime is the last use."""

_NEW_MANIFEST = ".manifest."
_BLOCK = 2**18  # bytes that are read at once
_PAGE = 2**12  # bytes; memory is scattered in pages, of which most are zeros
_ZEROS = bytes(_PAGE)

# The kernel stamps files with the time of its last tick (up to 10 ms old): a second write in the
# same tick leaves the same ctime. A stamp says something only if reading began later than that.
_TICK = 50_000_000  # ns


class Damaged(Exception):
    """An entry is not what was sealed; the text is one line that says what is wrong."""


class Stopped(Exception):
    """Reading was given up, for nobody wants the result any more."""


@dataclass(frozen=True)
class Manifest:
    """What was sealed. `files` has for each name its size (bytes), digest and stamp."""

    key: str
    components: dict[str, Any]
    data: dict[str, Any]
    created: float  # seconds since 1970
    files: dict[str, dict[str, Any]]


def canonical(components: Mapping[str, Any]) -> str:
    """Return the one JSON text of `components`. Raises `TypeError` for what JSON can't hold."""
    return json.dumps(dict(components), sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(components: Mapping[str, Any]) -> str:
    """Return the name of the entry that was made of exactly these components."""
    return hashlib.sha256(canonical(components).encode()).hexdigest()[:32]


# --- content ----------------------------------------------------------------------------------


def digest(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return a digest of a file's content that reads no holes.

    Each run of pages that are not all zeros counts, with its place: a hole and zeros that were
    written are the same content, and a copy may have one where the original has the other. Raises
    `Stopped` soon after `stopped` returns true, and `OSError`.
    """
    result = hashlib.blake2b(digest_size=32)
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        for offset in _blocks(file.fileno(), size):
            if stopped():
                raise Stopped
            file.seek(offset)
            length = _fill(file.readinto, view[: min(_BLOCK, size - offset)])
            for start, end in _runs(buffer, length):
                result.update(
                    (offset + start).to_bytes(8, "big") + (end - start).to_bytes(8, "big")
                )
                result.update(view[start:end])
    result.update(b"size" + size.to_bytes(8, "big"))
    return result.hexdigest()


def _runs(buffer: bytearray, length: int) -> Iterator[tuple[int, int]]:
    """Yield where the pages are that are not all zeros, neighbours together."""
    start = None
    for page in range(0, length, _PAGE):
        end = min(page + _PAGE, length)
        # A slice, not a memoryview: those are compared byte by byte.
        if buffer[page:end] == _ZEROS[: end - page]:
            if start is not None:
                yield start, page
                start = None
        elif start is None:
            start = page
    if start is not None:
        yield start, length


def _fill(readinto: Callable[[memoryview], int | None], view: memoryview) -> int:
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            break  # cut short meanwhile: the digest differs, as it should
        done += count
    return done


def _blocks(descriptor: int, size: int) -> Iterator[int]:
    """Yield the offsets of the blocks in which there are data."""
    offset = 0
    while offset < size:
        try:
            start = os.lseek(descriptor, offset, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # holes to the end
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            start, end = offset, size  # a file system that does not tell
        offset = max(offset, start // _BLOCK * _BLOCK)
        while offset < min(end, size):
            yield offset
            offset += _BLOCK


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _settled(status: os.stat_result, began: int) -> bool:
    return status.st_ctime_ns < began - _TICK


def disk_usage(directory: Path) -> int:
    """Return the bytes of disk that a directory's files really take; 0 if there is none."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(directory) as listing:
        for item in listing:
            with contextlib.suppress(OSError):
                total += item.stat(follow_symlinks=False).st_blocks * 512
    return total


# --- sealing ----------------------------------------------------------------------------------


def describe(
    directory: Path, writable: frozenset[str], stopped: threading.Event
) -> dict[str, dict[str, Any]]:
    """Make all files of `directory` final, put them on the disk, and return what they are.

    Raises `ValueError` for what is no regular file, `Damaged` if a file is written to meanwhile,
    `Stopped` and `OSError`.
    """
    paths = sorted(directory.iterdir())
    for path in paths:
        reserved = path.name in (MANIFEST, USED) or path.name.startswith(".")
        if reserved or not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError(f"{path} can't be part of a template.")
        path.chmod(0o600 if path.name in writable else 0o400)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if stopped.is_set():
            raise Stopped
    newest = max((path.lstat().st_ctime_ns for path in paths), default=0)
    # Bounded: a clock that was set back must not hold us.
    stopped.wait(min(max(newest + _TICK + 1_000_000 - time.time_ns(), 0), 2 * _TICK) / 1e9)
    return {path.name: _describe(path, stopped.is_set) for path in paths}


def _describe(path: Path, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    began = time.time_ns()
    before = path.lstat()
    content = digest(path, stopped)
    after = path.lstat()
    if _stamp(before) != _stamp(after):
        raise Damaged(f"{path.name}: it is being written to")
    stamp = _stamp(before) if _settled(before, began) else None
    return {"size": before.st_size, "digest": content, "stamp": stamp}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all, and durably. Raises `OSError`."""
    record = {"format": FORMAT, **vars(manifest)}
    text = json.dumps({**record, "digest": _self_digest(record)}, indent=1) + "\n"
    name = f"{_NEW_MANIFEST}{os.getpid()}.{threading.get_ident()}"
    temporary = directory / name
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with os.fdopen(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(directory / MANIFEST)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Put a directory's names on the disk. Raises `OSError`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _self_digest(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(canonical(record).encode(), digest_size=32).hexdigest()


# --- checking ---------------------------------------------------------------------------------


def read_manifest(directory: Path) -> Manifest | None:
    """Return an entry's manifest, None if it has none. Raises `Damaged` if it is not sound."""
    try:
        record = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST}: it can't be read") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise Damaged(f"{MANIFEST}: another format")
    seal = record.pop("digest", None)
    try:
        if seal != _self_digest(record):
            raise Damaged(f"{MANIFEST}: content changed")
        del record["format"]
        manifest = Manifest(**record)
    except (TypeError, ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST}: it can't be understood") from error
    return manifest


def verify(directory: Path, key: str, components: Mapping[str, Any]) -> Manifest | None:
    """Return the manifest of an entry that can be trusted, None if it was never finished.

    Raises `Damaged`.
    """
    try:
        _check_private(directory, directory.lstat(), stat.S_ISDIR, "the directory")
        manifest = read_manifest(directory)
        if manifest is None:
            return None
        if manifest.key != key or canonical(manifest.components) != canonical(components):
            raise Damaged(f"{MANIFEST}: it belongs to another machine or version")
        names = {path.name for path in directory.iterdir()}
        found = {name for name in names if not name.startswith(_NEW_MANIFEST)}
        expected = {*manifest.files, MANIFEST, USED}
        for name in sorted(found ^ expected):
            raise Damaged(f"{name}: {'not part of it' if name in found else 'missing'}")
        for name in (MANIFEST, USED):
            _check_private(directory / name, (directory / name).lstat(), stat.S_ISREG, name)
        changed = {
            name: entry
            for name, recorded in manifest.files.items()
            if (entry := _check_file(directory / name, recorded)) != recorded
        }
    except OSError as error:
        raise Damaged(f"{Path(error.filename or '').name}: {error.strerror}") from error
    if changed:
        manifest.files.update(changed)
        # Only the next start is slower without it.
        with contextlib.suppress(OSError):
            write_manifest(directory, manifest)
    return manifest


def _check_file(path: Path, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be recorded of a file from now on. Raises `Damaged` and `OSError`."""
    status = path.lstat()
    _check_private(path, status, stat.S_ISREG, path.name)
    if status.st_size != recorded.get("size"):
        raise Damaged(f"{path.name}: {status.st_size} bytes instead of {recorded.get('size')}")
    if recorded.get("stamp") == _stamp(status):
        return recorded
    entry = _describe(path)
    if entry["digest"] != recorded.get("digest"):
        raise Damaged(f"{path.name}: content changed")
    # Without a stamp of any use, the old record is as good.
    return entry if entry["stamp"] is not None else recorded


def _check_private(
    path: Path, status: os.stat_result, kind: Callable[[int], bool], name: str
) -> None:
    if not kind(status.st_mode):
        link = path.is_symlink()
        raise Damaged(f"{name}: {'a symbolic link' if link else 'not what it should be'}")
    if status.st_uid != os.geteuid():
        raise Damaged(f"{name}: it belongs to user {status.st_uid}")
    if status.st_mode & 0o077:
        raise Damaged(f"{name}: others have access (mode {stat.S_IMODE(status.st_mode):04o})")
