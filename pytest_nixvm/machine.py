"""One VM as a test sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.channels import Channels
from pytest_nixvm.errors import MachineGoneError, OutOfMemoryError
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.flake.images import plain
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.boot import BootReport
from pytest_nixvm.guest.console import Console
from pytest_nixvm.guest.result import Command, CommandResult, display
from pytest_nixvm.guest.serial import Serial
from pytest_nixvm.progress import Progress
from pytest_nixvm.qemu.launch import LaunchSpec
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.qemu.running import Qemu
from pytest_nixvm.qemu.supervisor import Supervisor
from pytest_nixvm.qemu.template import Template
from pytest_nixvm.transcript import Transcript
from pytest_nixvm.verbs.cloning import Cloning
from pytest_nixvm.verbs.commands import Commands
from pytest_nixvm.verbs.driver import Driver
from pytest_nixvm.verbs.files import Files
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, STRICT
from pytest_nixvm.verbs.infra import Infra
from pytest_nixvm.verbs.monitor import QemuMonitor
from pytest_nixvm.verbs.network import Network
from pytest_nixvm.verbs.screen import Screen
from pytest_nixvm.verbs.units import Units
from pytest_nixvm.verbs.waits import Waits

if TYPE_CHECKING:
    from pytest_nixvm.guest.keys import KeyPair
    from pytest_nixvm.guest.ssh import Ssh
    from pytest_nixvm.snapshots import Snapshot

_KILLED = 128 + 9
"""The exit status of what SIGKILL has ended, which is how the kernel frees memory."""


class Machine(Driver, Cloning, Commands, Waits, Units, Screen, Network, QemuMonitor, Files, Infra):
    """A VM: its power, its commands, its channels.

        vm.run("hostname")                      # CommandResult
        vm.succeed("id -un")                    # stdout; raises on another exit status than 0
        vm.wait_for_unit("sshd.service")
        vm.ssh.run(["systemctl", "is-active", "sshd"])
        vm.serial.login("alice", "secret")
        vm.agent.read_file("/etc/os-release")
        vm.qmp.execute("query-status")

    The verbs mean what they mean in the NixOS test driver. Every error is a `NixvmError`; a panic,
    emergency mode, memory that ran out, a hung guest and QEMU's end are told by whatever call is
    under way, at once.
    """

    def __init__(
        self,
        build: VmBuild,
        spec: LaunchSpec,
        *,
        supervisor: Supervisor,
        io: IoThread,
        keys: Callable[[], KeyPair],
        progress: Progress,
        boot_timeout: float,
        output: Path,
        template: Template | None = None,
        snapshot: Callable[[Machine, str], Snapshot],
        end: Callable[[Machine], None],
    ) -> None:
        self.name = plain(build.name) if build.image else build.name  # dev-vm, not dev-vm@qcow2
        self.build = build
        self.spec = spec
        self.output = output
        self.template = template
        self.loaded = False  # whether it was powered on as a clone
        self.frozen = False  # whether it has ended as a template
        self.woken_in = 0.0  # seconds that the clone kept somebody waiting
        self.progress = progress
        self.boots: list[BootReport] = []
        self.settled: dict[Path, int] = {}  # bytes of each console log when its last boot was over
        self.qemu_version: tuple[int, ...] = ()  # of the last power-on
        self.transcript = Transcript()
        self._supervisor = supervisor
        self._io = io
        self._keys = keys
        self._boot_timeout = boot_timeout
        self._lock = threading.RLock()
        self._on: Channels | None = None
        self._rests = False  # loaded as a clone, and paused
        self._no_shell = ""
        self._snapshot = snapshot
        self._end = end

    def __repr__(self) -> str:
        return f"<Machine {self.name} {'up' if self.is_up() else 'down'}>"

    def __enter__(self) -> Machine:
        """Return the machine; the block's end ends it, and removes what it has on disk."""
        return self

    def __exit__(self, *_: object) -> None:
        self._end(self)

    # --- channels ------------------------------------------------------------------------------

    @property
    def qemu(self) -> Qemu:
        """The QEMU that runs, whatever has become of the guest. Raises `MachineGoneError`."""
        on = self._on
        if on is None or not on.qemu.alive:
            cause = f": {on.qemu.cause_of_death()}" if on is not None else ""
            raise MachineGoneError(f"{self.name} is not running, vm.start() starts it{cause}.")
        return on.qemu

    @property
    def console(self) -> Console:
        """Everything that the serial console has shown since power-on."""
        if self._on is None:
            raise MachineGoneError(f"{self.name} is not running; vm.start() starts it.")
        return self._on.console

    @property
    def qmp(self) -> Monitor:
        """QEMU's monitor: `execute` commands, wait for events."""
        return self.qemu.monitor

    @property
    def agent(self) -> Agent:
        """The guest agent."""
        return self._opened().agent

    @property
    def serial(self) -> Serial:
        """The serial console."""
        return self._opened().serial

    @property
    def ssh(self) -> Ssh:
        """SSH as whoever the machine's own sshd lets in, root first.

        Raises `SshError` with the reason where nobody may log in with a key.
        """
        return self.ssh_as(None)

    def ssh_as(self, user: str | None) -> Ssh:
        """SSH as `user`; None is whoever may log in, root first. One connection for each user."""
        on = self._opened()
        with on.health.call():
            return on.ssh_as(user)

    def forget_keys(self) -> None:
        """Take the session's key out of the guest again: see `Channels.forget_keys`."""
        self._opened().forget_keys()

    # --- commands ------------------------------------------------------------------------------

    @property
    def commands_note(self) -> str:
        """Why commands take another way than the fast shell; empty where they take that."""
        return self._no_shell

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
        """Run a command as root (or `user`) and return its result.

        A string goes to the guest's shell, in the environment of a log-in; a sequence is an argv
        that no shell interprets. With `check` an exit status other than 0 raises
        `CommandFailedError`. After `timeout` seconds the command is killed with its children and
        `CommandTimeoutError` raised. It needs neither the network nor sshd.

        Raises a `GuestFaultError` as soon as the guest can't go on, `OutOfMemoryError` also when
        the kernel killed the command because its memory ran out.
        """
        data = stdin.encode() if isinstance(stdin, str) else stdin
        shown = display(command).removeprefix(STRICT)
        with self.transcript.note("command", shown) as entry:
            on = self._opened()
            mark = on.console.mark()
            with on.health.call():
                result = on.run(command, timeout=timeout, stdin=data, env=env, cwd=cwd, user=user)
            if on.no_shell:
                self._no_shell = f"commands went through the {result.channel}: {on.no_shell}"
            entry.channel = result.channel
            entry.outcome = f"exit status {result.returncode}"
            entry.ok = result.ok
            entry.output(result.stdout, result.stderr)
            if result.returncode == _KILLED and (kill := on.health.killed_for_memory(mark)):
                raise OutOfMemoryError(
                    f"{self.name} ran out of memory during `{display(command)}`: its kernel killed "
                    f"{kill.name} (pid {kill.pid})."
                )
            return result.check() if check else result
