"""What every verb builds on: a running VM, its channels, and commands in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.console import Console
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.progress import Progress
from pytest_nixvm.qemu.running import Qemu
from pytest_nixvm.transcript import Transcript

if TYPE_CHECKING:
    from pytest_nixvm.guest.ssh import Ssh

DEFAULT_TIMEOUT = 900.0
"""Seconds that the verbs wait, as in the NixOS test driver."""

STRICT = "set -euo pipefail\n"
"""What the NixOS test driver puts before each command."""


class Guest(ABC):
    """A VM as the verbs see it.

    `output` is the directory for what it leaves behind, `transcript` what was done to it.
    """

    name: str
    output: Path
    progress: Progress
    transcript: Transcript

    @abstractmethod
    def run(
        self,
        command: Command,
        *,
        check: bool = False,
        timeout: float = DEFAULT_TIMEOUT,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
    ) -> CommandResult:
        """Run a command and return its result, whatever its exit status unless `check` is set."""

    @property
    @abstractmethod
    def qemu(self) -> Qemu:
        """The QEMU that runs. Raises `MachineGoneError`."""

    @property
    @abstractmethod
    def console(self) -> Console:
        """The serial console's output since power-on. Raises `MachineGoneError`."""

    @property
    @abstractmethod
    def agent(self) -> Agent:
        """The guest agent. Raises `MachineGoneError`."""

    @property
    @abstractmethod
    def ssh(self) -> Ssh:
        """SSH as whoever the machine lets in. Raises `SshError`."""
