"""What nix would see of a flake reference, as one digest.

Two equal digests mean that nix reads the same files, and hands the flake the same `self`. What
can't be known without asking a server has no digest (None) and is evaluated again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote

from pytest_nixvm.flake.process import environment

_REVISION = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

# Above this much, the contents of a tree are only read again if a size, an inode or one of the
# times has changed: nixpkgs as an override has 50,000 files. Where ctime is kept by the kernel,
# as in these file systems, nobody can set it back.
_MANY_FILES = 2000
_MUCH = 32 * 2**20
_HONEST_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "bcachefs"}


def is_fixed(url: str) -> bool:
    """Whether a reference names one content for ever: by revision or hash."""
    base, _, query = url.partition("?")
    parameters = dict(parse_qsl(query))
    if "narHash" in parameters or _REVISION.fullmatch(parameters.get("rev", "")):
        return True
    kind, _, rest = base.partition(":")
    parts = rest.split("/")
    return (
        kind in ("github", "gitlab", "sourcehut")
        and len(parts) == 3
        and bool(_REVISION.fullmatch(parts[2]))
    )


def fingerprint(url: str, cache: Path) -> str | None:
    """Return the digest of what `url` (absolute) refers to now, None if that can't be told.

    `cache` is a directory for what is known of large trees. Nothing else is written.
    """
    base, _, query = url.partition("?")
    parameters = dict(parse_qsl(query))
    try:
        if base.startswith("path:"):
            return _path(_local(base.removeprefix("path:")), query, cache)
        if base.startswith("git+file:"):
            root = _local(base.removeprefix("git+file:").removeprefix("//"))
            return _git(root, query, parameters, cache)
    except (OSError, _GitError):
        return None
    return f"fixed {url}" if is_fixed(url) else None


def tracked_problem(root: Path, relative: str) -> tuple[list[str], bool] | None:
    """Return the files at `relative` that git does not track, and whether they are ignored.

    None if nothing is there, or all of it is tracked.
    """
    if not os.path.lexists(root / relative):
        return None
    try:
        found = _run_git(root, "ls-files", "-z", "--others", "--", f":(literal){relative}")
        plain = _run_git(
            root, "ls-files", "-z", "--others", "--exclude-standard", "--", f":(literal){relative}"
        )
    except _GitError:
        return None
    every = [os.fsdecode(name) for name in found.split(b"\0") if name]
    wanted = [os.fsdecode(name) for name in plain.split(b"\0") if name]
    if not every:
        return None
    return (wanted, False) if wanted else (every, True)


class _GitError(Exception):
    pass


class _Entry(NamedTuple):  # plain strings: there may be 100,000 of them
    name: str
    path: str
    status: os.stat_result | None  # None: it is not there


def _path(root: Path, query: str, cache: Path) -> str:
    """Everything below `root`, and the newest mtime, which is the flake's `lastModified`."""
    entries = list(_walk(root))
    newest = max((int(entry.status.st_mtime) for entry in entries if entry.status), default=0)
    return _digest("path", query, str(newest), _contents("path", root, entries, cache))


def _git(root: Path, query: str, parameters: dict[str, str], cache: Path) -> str:
    revision = parameters.get("rev")
    if revision is None and "ref" in parameters:
        revision = _revision(root, parameters["ref"])
    elif revision is None and not (root / ".git").exists():
        revision = _revision(root, "HEAD")
    if revision is not None:
        return _digest("revision", query, revision)
    # The index and HEAD decide what is tracked and whether the tree is dirty (`self.rev`), the
    # files in the work tree are what nix reads, whatever git's filters and flags say of them.
    index = _run_git(root, "ls-files", "--stage", "-z")
    names = [line.partition(b"\t")[2] for line in index.split(b"\0") if line]
    if b".gitmodules" in names:
        inner = _run_git(root, "ls-files", "-z", "--recurse-submodules")
        names += [name for name in inner.split(b"\0") if name]
    entries = [_entry(root, os.fsdecode(name)) for name in sorted(set(names))]
    head = _head(root)
    tracked = hashlib.blake2b(index).hexdigest()
    return _digest("git", query, head, tracked, _contents("git", root, entries, cache))


def _head(root: Path) -> str:
    try:
        return _run_git(root, "rev-parse", "--verify", "--quiet", "HEAD").decode().strip()
    except _GitError:
        return "no commit yet"


def _revision(root: Path, ref: str) -> str:
    # nix looks for a branch of that name first, then takes it as it stands.
    for name in (f"refs/heads/{ref}", ref):
        try:
            commit = f"{name}^{{commit}}"
            return _run_git(root, "rev-parse", "--verify", "--quiet", commit).decode().strip()
        except _GitError:
            continue
    raise _GitError(ref)


def _run_git(root: Path, *arguments: str) -> bytes:
    git = shutil.which("git")
    if git is None:
        raise _GitError("git is not installed")
    try:
        answer = subprocess.run(
            [git, "-C", str(root), "--no-optional-locks", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            env=environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _GitError("git does not answer") from None
    if answer.returncode != 0:
        raise _GitError(answer.stderr.decode(errors="replace").strip())
    return answer.stdout


def _walk(root: Path) -> Iterator[_Entry]:
    status = root.lstat()
    yield _Entry("", str(root), status)
    if not stat.S_ISDIR(status.st_mode):
        return
    todo = [(str(root), "")]
    while todo:
        folder, prefix = todo.pop()
        with os.scandir(folder) as found:
            inside = sorted(found, key=lambda entry: entry.name)
        for item in inside:
            name = prefix + item.name
            yield _Entry(name, item.path, item.stat(follow_symlinks=False))
            if item.is_dir(follow_symlinks=False):
                todo.append((item.path, name + "/"))


def _entry(root: Path, name: str) -> _Entry:
    path = f"{root}/{name}"
    try:
        return _Entry(name, path, os.lstat(path))
    except OSError:
        return _Entry(name, path, None)


def _contents(kind: str, root: Path, entries: list[_Entry], cache: Path) -> str:
    size = sum(entry.status.st_size for entry in entries if entry.status)
    if len(entries) < _MANY_FILES and size < _MUCH:
        return _read(entries)
    look = _look(entries)
    place = hashlib.blake2b(os.fsencode(f"{kind}:{root}"), digest_size=16).hexdigest()
    record = cache / f"tree-{place}.json"
    try:
        known = json.loads(record.read_text())
        if known["look"] == look and isinstance(known["contents"], str):
            return str(known["contents"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    began = time.time()
    contents = _read(entries)
    newest = max((entry.status.st_ctime for entry in entries if entry.status), default=0.0)
    # A file that is changed twice within one tick of the clock looks the same after both.
    if newest < began - 2 and _file_system(root) in _HONEST_FILE_SYSTEMS:
        write_private(record, json.dumps({"look": look, "contents": contents}))
    return contents


def _look(entries: Iterable[_Entry]) -> str:
    seen = [
        (name, s.st_mode, s.st_size, s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns)
        if s
        else (name,)
        for name, _, s in entries
    ]
    return hashlib.blake2b(repr(seen).encode(errors="surrogateescape")).hexdigest()


def _read(entries: Iterable[_Entry]) -> str:
    """Digest of names, kinds, executable bits and contents: what nix puts into the store."""
    digest = hashlib.blake2b()
    for entry in entries:
        digest.update(os.fsencode(entry.name) + b"\0")
        mode = entry.status.st_mode if entry.status else 0
        if entry.status is None:
            digest.update(b"missing")
        elif stat.S_ISLNK(mode):
            digest.update(b"link " + os.fsencode(Path(entry.path).readlink()))
        elif stat.S_ISREG(mode):
            with Path(entry.path).open("rb") as file:
                inner = hashlib.file_digest(file, "blake2b").digest()
            digest.update((b"program " if mode & stat.S_IXUSR else b"file ") + inner)
        else:
            digest.update(b"kind %o" % stat.S_IFMT(mode))
        digest.update(b"\0")
    return digest.hexdigest()


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds `path`, as in proc_pid_mountinfo(5)."""
    best, kind = -1, ""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), before.split()[4])
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), after.split()[0]
    return kind


def write_private(path: Path, text: str) -> None:
    """Write a file that only we can read, whole or not at all.

    Raises:
        OSError: the place can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _local(text: str) -> Path:
    path = Path(text)
    return path if path.exists() else Path(unquote(text))


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogateescape")).hexdigest()
