"""Files into the VM and out of it."""

from __future__ import annotations

import posixpath
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from pytest_nixvm.channels import Channels
from pytest_nixvm.errors import ChannelError, SshError
from pytest_nixvm.guest import files
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.progress import Step
from pytest_nixvm.verbs.guest import Guest

if TYPE_CHECKING:
    from pytest_nixvm.guest.ssh import Ssh

_TIMEOUT = 600.0
_QUIET = 1.0
"""Seconds after which a copy shows its progress."""

_MIB = 1 << 20


class Files(Guest):
    """Copies of files and trees, with modes, times and links.

    They go over SSH where root may log in and sshd answers, else over the shell on virtio ports.
    What is copied into the guest belongs to root, as with the NixOS test driver.
    """

    @abstractmethod
    def ssh_as(self, user: str | None) -> Ssh:
        """SSH as `user`. Raises `SshError` where that user may not log in."""

    @abstractmethod
    def _opened(self) -> Channels:
        """Return the channels of the VM that runs."""

    def put(self, local: str | Path, remote: str, timeout: float = _TIMEOUT) -> None:
        """Copy a file or a tree to `remote` in the guest, as `cp -r` does.

        It goes into `remote` if that is a directory, else it gets that name. Raises `OSError` if
        `local` can't be read, `ChannelError` if the guest does not take it; then no half file has
        the final name.
        """
        self._put(Path(local), remote, timeout)

    def get(self, remote: str, local: str | Path, timeout: float = _TIMEOUT) -> None:
        """Copy a file or a tree from the guest to `local`, as `cp -r` does.

        Devices, pipes and names that lead out of the copy are refused. Raises `OSError` if `local`
        can't be written or is a tree already, `ChannelError` for all else.
        """
        with self._copy(f"{remote} to {local}") as (stream, moved):
            files.get(stream, remote, Path(local), timeout, moved)

    def copy_from_host(self, source: str | Path, target: str) -> None:
        """Copy a file or a tree into the guest; the directory of `target` is made if need be.

        The NixOS test driver's verb. Raises as `put`.
        """
        self._make_parent(target)
        self._put(Path(source), target, _TIMEOUT)

    def copy_from_host_via_shell(self, source: str | Path, target: str) -> None:
        """Copy as `copy_from_host` does, over the shell even where there is SSH."""
        self._make_parent(target)
        self._put(Path(source), target, _TIMEOUT, ssh=False)

    def copy_from_machine(self, source: str, target_dir: str = "") -> None:
        """Copy a file or a tree out of the guest, to its own name below `output` / `target_dir`.

        The NixOS test driver's verb. Raises as `get`.
        """
        directory = self.output / target_dir
        directory.mkdir(parents=True, exist_ok=True)
        self.get(source, directory / posixpath.basename(source.rstrip("/")))

    def copy_from_vm(self, source: str, target_dir: str = "") -> None:
        """Do what `copy_from_machine` does: its older name."""
        self.copy_from_machine(source, target_dir)

    def _put(self, source: Path, target: str, timeout: float, *, ssh: bool = True) -> None:
        with self._copy(f"{source} to {target}", ssh=ssh) as (stream, moved):
            moved.total = files.size(source)
            files.put(stream, source, target, timeout, moved)

    def _make_parent(self, target: str) -> None:
        self.run(["mkdir", "-p", "--", posixpath.dirname(target) or "/"], check=True)

    @contextmanager
    def _copy(self, what: str, *, ssh: bool = True) -> Iterator[tuple[files.Stream, _Moved]]:
        with self.transcript.note("copy", what) as entry:
            stream, entry.channel = self._channel(ssh=ssh)
            moved = _Moved(lambda: self.progress.step(f"{self.name}: copying {what}"))
            try:
                yield stream, moved
            except BaseException:
                moved.end(well=False)
                raise
            moved.end(well=True)
            entry.outcome = f"{moved.bytes / _MIB:.1f} MiB"

    def _channel(self, *, ssh: bool) -> tuple[files.Stream, str]:
        on = self._opened()
        no_ssh = ""
        if ssh:
            try:
                root = self.ssh_as("root")
                _ = root.client  # whether sshd answers is known before anything is sent
            except SshError as error:
                no_ssh = f" SSH as root is not to be had either: {error}"
            else:
                return root.stream, "ssh"
        if not on.has_shell():
            raise ChannelError(f"{self.name} has no shell for copies: {on.no_shell}{no_ssh}")

        def run(
            argv: Sequence[str],
            *,
            stdin: BinaryIO | None,
            stdout: BinaryIO | None,
            timeout: float,
        ) -> CommandResult:
            with on.health.call():
                return on.shell.run(list(argv), stdin=stdin, stdout=stdout, timeout=timeout)

        return run, "shell"


class _Moved:
    """Counts what is copied, and shows it once the copy has taken a while."""

    def __init__(self, begin: Callable[[], Step]) -> None:
        self.bytes = 0
        self.total: int | None = None
        self._begin = begin
        self._since = time.monotonic()
        self._shown = 0.0
        self._step: Step | None = None
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        self.bytes += count
        now = time.monotonic()
        if now - self._since < _QUIET or now - self._shown < 0.2:
            return
        with self._lock:
            self._shown = now
            if self._step is None:
                self._step = self._begin()
            done = self.bytes // _MIB
            total = None if self.total is None else max(done, self.total // _MIB)
            self._step.update("MiB", done, total)

    def end(self, *, well: bool) -> None:
        if self._step is not None:
            (self._step.finish if well else self._step.fail)(f"{self.bytes // _MIB} MiB")
