"""Files over an SSH session: by SFTP, or by `cat` where the guest's sshd does not offer it."""

from __future__ import annotations

import posixpath
import shlex
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import paramiko

from pytest_nixvm.errors import SshError

Stream = Callable[[str, BinaryIO | None, BinaryIO | None], None]
"""Runs a line in the guest with a file as stdin and a file as stdout; raises if it fails."""


class Files(Protocol):
    """A way to copy files. Directories are copied with all that is in them; modes are kept."""

    def put(self, local: Path, remote: str) -> None:
        """Copy to the guest."""

    def get(self, remote: str, local: Path) -> None:
        """Copy from the guest."""


class SftpFiles:
    """Copies over SFTP."""

    def __init__(self, sftp: paramiko.SFTPClient) -> None:
        self._sftp = sftp

    def put(self, local: Path, remote: str) -> None:
        """Copy to the guest; a file may go into a directory, as with cp."""
        if local.is_dir():
            self._put_tree(local, remote)
        else:
            into = remote.endswith("/") or self._is_directory(remote)
            self._put_file(local, posixpath.join(remote, local.name) if into else remote)

    def get(self, remote: str, local: Path) -> None:
        """Copy from the guest; a file may go into a directory, as with cp."""
        if self._is_directory(remote):
            self._get_tree(remote, local)
        else:
            self._get_file(remote, local / posixpath.basename(remote) if local.is_dir() else local)

    def _put_file(self, local: Path, remote: str) -> None:
        self._sftp.put(str(local), remote)
        self._sftp.chmod(remote, stat.S_IMODE(local.stat().st_mode))

    def _put_tree(self, local: Path, remote: str) -> None:
        if not self._is_directory(remote):
            self._sftp.mkdir(remote)
        for entry in sorted(local.iterdir()):
            target = posixpath.join(remote, entry.name)
            if entry.is_symlink():
                self._sftp.symlink(str(entry.readlink()), target)
            elif entry.is_dir():
                self._put_tree(entry, target)
            else:
                self._put_file(entry, target)
        # Last: a directory may be one that forbids writing into it.
        self._sftp.chmod(remote, stat.S_IMODE(local.stat().st_mode))

    def _get_file(self, remote: str, local: Path) -> None:
        self._sftp.get(remote, str(local))
        local.chmod(stat.S_IMODE(self._sftp.stat(remote).st_mode or 0o644))

    def _get_tree(self, remote: str, local: Path) -> None:
        local.mkdir(exist_ok=True)
        for entry in self._sftp.listdir_attr(remote):
            # The guest may be under test for anything: its names stay inside `local`.
            if "/" in entry.filename or entry.filename in {"", ".", ".."}:
                raise SshError(f"{remote} has an impossible file name: {entry.filename!r}.")
            source, target = posixpath.join(remote, entry.filename), local / entry.filename
            mode = entry.st_mode or 0
            if stat.S_ISLNK(mode):
                target.symlink_to(self._sftp.readlink(source) or "")
            elif stat.S_ISDIR(mode):
                self._get_tree(source, target)
            elif stat.S_ISREG(mode):
                self._get_file(source, target)
        local.chmod(stat.S_IMODE(self._sftp.stat(remote).st_mode or 0o755))

    def _is_directory(self, remote: str) -> bool:
        try:
            return stat.S_ISDIR(self._sftp.stat(remote).st_mode or 0)
        except FileNotFoundError:
            return False


class CatFiles:
    """Copies single files through commands."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def put(self, local: Path, remote: str) -> None:
        """Copy a file to the guest; raises `SshError` for a directory."""
        if local.is_dir():
            raise self._no_tree(str(local))
        path, name = shlex.quote(remote), shlex.quote(local.name)
        mode = f"{stat.S_IMODE(local.stat().st_mode):o}"
        script = (
            f"to={path}; name={name}\n"
            'case $to in */) to=$to$name ;; *) [ ! -d "$to" ] || to=$to/$name ;; esac\n'
            f'cat >"$to" && chmod {mode} "$to"'
        )
        with local.open("rb") as file:
            self._stream(shlex.join(["/bin/sh", "-c", script]), file, None)

    def get(self, remote: str, local: Path) -> None:
        """Copy a file from the guest; raises `SshError` for a directory."""
        target = local / posixpath.basename(remote) if local.is_dir() else local
        part = target.with_name(target.name + ".part")
        try:
            with part.open("wb") as file:
                self._stream(shlex.join(["cat", "--", remote]), None, file)
            shutil.move(part, target)
        finally:
            part.unlink(missing_ok=True)

    def _no_tree(self, path: str) -> SshError:
        return SshError(f"{path} is a directory, and the guest's sshd offers no SFTP to copy it.")
