"""Files and trees as one tar stream, over any channel that runs a command with files as streams."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tarfile
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, cast

from pytest_nixvm.errors import ChannelError
from pytest_nixvm.guest.result import CommandResult

# Archives name what is copied by this word: the real names are not the other side's business.
_TOP = "copied"
# The last member: tar takes an archive that ends early, between two files, for a whole one.
_LAST = "complete"

_PUT = f"""
set -u
fail() {{ echo "$1" >&2; exit 1; }}
command -v tar >/dev/null || fail "the guest has no tar"
to=$1; name=$2; kind=$3
if [ -d "$to" ]; then to=${{to%/}}/$name
else case $to in */) fail "the guest has no directory $to";; esac; fi
dir=$(dirname -- "$to")
[ -d "$dir" ] || fail "the guest has no directory $dir"
[ "$kind" = tree ] || [ ! -d "$to" ] || fail "$to is a directory in the guest"
[ "$kind" = file ] || [ -d "$to" ] || [ ! -e "$to" ] || fail "$to is no directory in the guest"
part=$(mktemp -d -- "${{dir%/}}/.nixvm-XXXXXX") || exit 1
trap 'rm -rf -- "$part"' EXIT
trap 'exit 1' HUP INT TERM
tar -C "$part" --no-same-owner -xpf - || exit 1
[ -f "$part/{_LAST}" ] || fail "the copy was cut short"
if [ -d "$to" ]; then cp -a -- "$part/{_TOP}/." "$to/"; else mv -fT -- "$part/{_TOP}" "$to"; fi
"""

_GET = f"""
fail() {{ echo "$1" >&2; exit 1; }}
command -v tar >/dev/null || fail "the guest has no tar"
[ -e "$1" ] || fail "the guest has no $1"
from=$(readlink -f -- "$1") || exit 1
[ -d "$from" ] || [ -f "$from" ] || fail "$1 is neither a file nor a directory"
[ "$from" != / ] || fail "the whole root file system is not copied"
cd -- "$(dirname -- "$from")" || exit 1
# The top component alone is renamed; what symbolic links say is left alone.
tar --transform='s,^\\./[^/]*,{_TOP},rhS' -cf - -- "./$(basename -- "$from")"
"""


Moved = Callable[[int], None]
"""Is told how many more bytes have gone over the channel, from another thread."""


class Stream(Protocol):
    """A channel that runs an argv with a file as its stdin and a file as its stdout."""

    def __call__(
        self,
        argv: Sequence[str],
        *,
        stdin: BinaryIO | None,
        stdout: BinaryIO | None,
        timeout: float,
    ) -> CommandResult:
        """Run it to its end; raises what the channel raises, also after `timeout` seconds."""


def _uncounted(count: int) -> None: ...


class _Counted:
    """One end of a pipe that tells how many bytes have gone through it.

    It has no `read1`: the shell would send each pipeful by itself, and the guest start a program
    for each.
    """

    def __init__(self, end: BinaryIO, moved: Moved) -> None:
        self._end = end
        self._moved = moved

    def fileno(self) -> int:
        return self._end.fileno()

    def read(self, size: int = -1) -> bytes:
        data = self._end.read(size)
        self._moved(len(data))
        return data

    def write(self, data: bytes) -> int:
        self._end.write(data)
        self._moved(len(data))
        return len(data)


def size(local: Path) -> int:
    """Return about how many bytes `put` sends for a file or a tree; 0 for what can't be read."""
    if not local.is_dir():
        return local.stat().st_size if local.exists() else 0
    found = (os.path.join(at, name) for at, _, names in os.walk(local) for name in names)  # noqa: PTH118 - many
    total = 0
    for path in found:
        with suppress(OSError):
            total += os.lstat(path).st_size
    return total


def put(
    stream: Stream, local: Path, remote: str, timeout: float = 600, moved: Moved = _uncounted
) -> None:
    """Copy a file or a tree to `remote` in the guest, as `cp -r` does.

    It goes into `remote` if that is a directory, else it gets that name. Modes, times and links are
    kept, except that `local` itself is followed if it is a link. The files belong to the user that
    the channel runs as. Raises `OSError` if `local` can't be read, `ChannelError` if the guest does
    not take it; then no half file has the final name.
    """
    source = local.resolve(strict=True)
    kind = "tree" if source.is_dir() else "file"
    reader, writer = _pipe()
    trouble: list[Exception] = []

    def pack() -> None:
        try:
            out = cast("BinaryIO", _Counted(writer, moved))
            with writer, tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                tar.add(source, _TOP, filter=_of_root)
                tar.addfile(tarfile.TarInfo(_LAST))
        except (BrokenPipeError, ValueError):
            pass  # the guest has stopped reading, and says itself why
        except (OSError, tarfile.TarError) as error:
            trouble.append(error)

    argv = ["sh", "-c", _PUT, "put", remote, local.absolute().name or source.name, kind]
    whole = cast("BinaryIO", _Counted(reader, _uncounted))
    result = _both(
        pack, reader, lambda: stream(argv, stdin=whole, stdout=None, timeout=timeout), trouble
    )
    _check(result, f"{local} to {remote}")


def get(
    stream: Stream, remote: str, local: Path, timeout: float = 600, moved: Moved = _uncounted
) -> None:
    """Copy a file or a tree from the guest to `local`, as `cp -r` does; the counterpart of `put`.

    Devices, pipes and names that lead out of the copy are refused: the guest is not trusted. Raises
    `OSError` if `local` can't be written, else `ChannelError`; then `local` is as it was.
    """
    target = local / PurePosixPath(remote).name if local.is_dir() else local
    if target.is_dir() and not target.is_symlink():
        raise FileExistsError(f"{target} is there already: {remote} is not mixed into it.")
    part = Path(tempfile.mkdtemp(prefix=".nixvm-", dir=target.parent))
    reader, writer = _pipe()
    trouble: list[Exception] = []

    def unpack() -> None:
        try:
            with reader:
                _extract(cast("BinaryIO", _Counted(reader, moved)), part, remote)
                while reader.read(1 << 16):
                    pass  # the padding after the archive's end
        except tarfile.ReadError:
            pass  # cut short: the guest's exit status says why
        except (OSError, ValueError, tarfile.TarError, ChannelError) as error:
            trouble.append(error)

    try:
        argv = ["sh", "-c", _GET, "get", remote]
        result = _both(
            unpack,
            writer,
            lambda: stream(argv, stdin=None, stdout=writer, timeout=timeout),
            trouble,
        )
        _check(result, f"{remote} to {local}")
        if not os.path.lexists(part / _TOP):
            raise ChannelError(f"Copying {remote} to {local} failed: the guest sent no archive.")
        (part / _TOP).replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _pipe() -> tuple[BinaryIO, BinaryIO]:
    reader, writer = os.pipe()
    return os.fdopen(reader, "rb"), os.fdopen(writer, "wb")


def _both(
    work: Callable[[], None],
    end: BinaryIO,
    run: Callable[[], CommandResult],
    trouble: list[Exception],
) -> CommandResult:
    """Run the host's half in a thread and the guest's here; the host's error comes first."""
    thread = threading.Thread(target=work, name="nixvm-copy", daemon=True)
    thread.start()
    try:
        result = run()
    except Exception as error:
        with suppress(OSError):
            end.close()
        thread.join()
        if trouble:
            raise trouble[0] from error
        raise
    with suppress(OSError):
        end.close()
    thread.join()
    if trouble:
        raise trouble[0]
    return result


def _check(result: CommandResult, what: str) -> None:
    if result.returncode != 0:
        reason = result.stderr.strip() or f"exit status {result.returncode}"
        if re.search(r"No space left|Wrote only \d+ of \d+", reason):
            reason = f"the disk in the guest is full.\n{reason}"
        raise ChannelError(f"Copying {what} failed: {reason}")


def _of_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _extract(archive: BinaryIO, into: Path, remote: str) -> None:
    """Unpack what a guest has sent, and nothing outside of `into`."""
    directories: list[tuple[Path, tarfile.TarInfo]] = []
    with tarfile.open(fileobj=archive, mode="r|") as tar:
        for member in tar:
            path = _inside(into, member.name, remote)
            if os.path.lexists(path):
                # Writing to a name a second time would follow a link of that name.
                raise _refused(remote, member.name, "is there twice")
            if member.islnk():
                origin = _inside(into, member.linkname, remote)
                if not os.path.lexists(origin) or not stat.S_ISREG(origin.lstat().st_mode):
                    raise _refused(remote, member.name, "is a hard link to no file of the copy")
                os.link(origin, path)
            elif member.issym():
                path.symlink_to(member.linkname)
                os.utime(path, (member.mtime, member.mtime), follow_symlinks=False)
            elif member.isdir():
                path.mkdir(mode=0o700)
                directories.append((path, member))
            elif member.isreg():
                data = tar.extractfile(member)
                with path.open("xb") as file:
                    if data is not None:
                        shutil.copyfileobj(data, file, 1 << 18)
                _finish(path, member)
            else:
                raise _refused(remote, member.name, "is neither file, directory nor link")
            tar.members = []  # type: ignore[attr-defined]  # else it grows with the archive
    for path, member in reversed(directories):
        _finish(path, member)  # last: a directory may forbid writing, and writing changes its time


def _finish(path: Path, member: tarfile.TarInfo) -> None:
    path.chmod(member.mode & 0o7777)
    os.utime(path, (member.mtime, member.mtime))


def _inside(into: Path, name: str, remote: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] != _TOP or ".." in parts:
        raise _refused(remote, name, "lies outside of it")
    path = into
    for part in parts[:-1]:
        path /= part
        if not os.path.lexists(path) or not stat.S_ISDIR(path.lstat().st_mode):
            raise _refused(remote, name, "does not lie in a directory of the copy")
    return path / parts[-1]


def _refused(remote: str, name: str, why: str) -> ChannelError:
    return ChannelError(f"The guest's archive of {remote} is refused: {name!r} {why}.")
