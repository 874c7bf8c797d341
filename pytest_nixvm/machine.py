"""One VM as a test sees it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pytest_nixvm.errors import (
    AgentError,
    CommandTimeoutError,
    MachineError,
    MachineGoneError,
    NixvmError,
)
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.boot import BootReport, wait_ready
from pytest_nixvm.guest.console import Console
from pytest_nixvm.guest.keys import KeyPair
from pytest_nixvm.guest.result import Command, CommandResult, display
from pytest_nixvm.guest.serial import Serial
from pytest_nixvm.guest.ssh import Ssh
from pytest_nixvm.guest.sshd import SshRefusal, access, install_key
from pytest_nixvm.progress import Progress
from pytest_nixvm.qemu.launch import LaunchSpec, Qemu, launch
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.qemu.supervisor import Supervisor
from pytest_nixvm.transcript import Transcript
from pytest_nixvm.verbs.commands import Commands
from pytest_nixvm.verbs.files import Files
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT
from pytest_nixvm.verbs.network import Network
from pytest_nixvm.verbs.screen import Screen
from pytest_nixvm.verbs.units import Units
from pytest_nixvm.verbs.waits import Waits
from pytest_nixvm.wait import Deadline, timed_out

__tracebackhide__ = lambda info: info.errisinstance(NixvmError)  # noqa: E731 - pytest's protocol

# runuser keeps root's environment, and with --login it would take no argv.
_AS_USER = (
    'USER=$1 LOGNAME=$1 HOME=$(getent passwd "$1" | cut -d: -f6); '
    'export USER LOGNAME HOME; shift; exec "$@"'
)


class Machine(Commands, Waits, Units, Screen, Network, Files):
    """A VM: its power, its commands, its channels.

        vm.run("hostname")                      # CommandResult
        vm.succeed("id -un")                    # stdout; raises on another exit status than 0
        vm.wait_for_unit("sshd.service")
        vm.ssh.run(["systemctl", "is-active", "sshd"])
        vm.serial.login("alice", "secret")
        vm.agent.read_file("/etc/os-release")
        vm.qmp.execute("query-status")

    The verbs `execute`, `succeed`, `fail`, `wait_for_unit`, `wait_until_succeeds`,
    `wait_until_fails`, `shutdown`, `reboot`, `crash` and `screenshot` mean what they mean in the
    NixOS test driver. Every error is a `NixvmError`.
    """

    def __init__(
        self,
        build: VmBuild,
        spec: LaunchSpec,
        *,
        supervisor: Supervisor,
        io: IoThread,
        keys: KeyPair,
        progress: Progress,
        boot_timeout: float,
        output: Path,
    ) -> None:
        self.name = build.name
        self.build = build
        self.spec = spec
        self.output = output
        self.boots: list[BootReport] = []
        self.transcript = Transcript()
        self._supervisor = supervisor
        self._io = io
        self._keys = keys
        self.progress = progress
        self._boot_timeout = boot_timeout
        self._lock = threading.RLock()
        self._qemu: Qemu | None = None
        self._console: Console | None = None
        self._agent: Agent | None = None
        self._serial: Serial | None = None
        self._ssh: dict[str | None, Ssh] = {}

    def __repr__(self) -> str:
        return f"<Machine {self.name} {'up' if self.is_up() else 'down'}>"

    # --- power ---------------------------------------------------------------------------------

    def is_up(self) -> bool:
        """Whether QEMU runs and the machine got ready."""
        return self._qemu is not None and self._qemu.alive and self._agent is not None

    def start(self) -> None:
        """Power on, on the disk as it was left, and wait until the machine is ready.

        Does nothing when it is up. Raises `QemuError` if QEMU does not start, `BootError` if the
        machine does not get ready within the boot timeout.
        """
        with self._lock:
            if self.is_up():
                return
            self.kill()
            if self.spec.console_log.exists():
                # Each power-on has a log of its own: an old panic must not end a new boot.
                log = self.output / f"console-{len(self.boots) + 1}.log"
                self.spec = replace(self.spec, console_log=log)
            step = self.progress.step(f"Booting {self.name}")
            try:
                deadline = Deadline(self._boot_timeout)
                self._qemu = launch(
                    self.spec,
                    supervisor=self._supervisor,
                    io=self._io,
                    timeout=deadline.remaining(),
                )
                self._console = Console(self._io, self._qemu.console_socket, self._qemu.console_log)
                self._console.connect(deadline.remaining(10))
                agent = Agent(self._io, self._qemu.agent_socket)
                try:
                    report = wait_ready(
                        self._qemu, self._console, agent, deadline=deadline, step=step
                    )
                except BaseException:
                    agent.close()
                    raise
                self._agent = agent
            except BaseException as error:
                step.fail(str(error).splitlines()[0] if isinstance(error, NixvmError) else "")
                self.kill()
                raise
            self.boots.append(report)
            step.finish(_summary(report, self.spec))

    def shutdown(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Shut the machine down from inside, as `poweroff` does, and wait for its end.

        Raises `WaitTimeoutError` with the console's tail if it still runs after `timeout` seconds.
        """
        qemu = self._running()
        self.agent.shutdown("powerdown")
        self.wait_for_shutdown(timeout)
        qemu.kill()

    def wait_for_shutdown(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait until the machine has powered itself off."""
        qemu = self._running()
        try:
            qemu.process.wait(timeout)
        except TimeoutError:
            raise timed_out(f"{self.name} to shut down", timeout, self._console_tail()) from None
        self._drop_channels()

    def reboot(self, timeout: float | None = None) -> None:
        """Reboot from inside and wait until the machine is ready again.

        That it was a reboot is proved by a new boot id. `timeout` in seconds is the boot timeout if
        it is not given. Raises `BootError`, or `WaitTimeoutError` if the old system does not end.
        """
        with self._lock:
            qemu, console, agent = self._running(), self._console, self.agent
            if console is None:
                raise MachineGoneError(f"{self.name} has no console.")
            deadline = Deadline(timeout or self._boot_timeout)
            before = self._boot_id()
            mark, since = qemu.monitor.mark(), console.mark()
            self._close_ssh()
            step = self.progress.step(f"Rebooting {self.name}")
            try:
                agent.shutdown("reboot")
                qemu.monitor.wait_event("RESET", timeout=deadline.remaining(), since=mark)
                report = wait_ready(qemu, console, agent, deadline=deadline, step=step, since=since)
            except BaseException:
                step.fail()
                raise
            if self._boot_id() == before:
                step.fail("the boot id is the old one")
                raise MachineError(f"{self.name} answers after its reset, with the same boot id.")
            self.boots.append(report)
            step.finish(_summary(report, self.spec))

    def _boot_id(self) -> bytes:
        return self.agent.read_file("/proc/sys/kernel/random/boot_id")

    def crash(self) -> None:
        """Cut the power: QEMU ends at once, nothing in the guest is told."""
        self._running()
        self.kill()

    def kill(self) -> None:
        """End QEMU and every channel, if there are any. Never raises for a VM that is gone."""
        with self._lock:
            qemu, self._qemu = self._qemu, None
            self._drop_channels()
            if qemu is not None:
                qemu.kill()

    def _running(self) -> Qemu:
        if self._qemu is None:
            raise MachineGoneError(f"{self.name} is not running; vm.start() starts it.")
        if not self._qemu.alive:
            cause = self._qemu.cause_of_death()
            raise MachineGoneError(f"{self.name} is not running, vm.start() starts it: {cause}.")
        return self._qemu

    def _close_ssh(self) -> None:
        for ssh in self._ssh.values():
            ssh.close()
        self._ssh.clear()

    def _drop_channels(self) -> None:
        self._close_ssh()
        agent, console = self._agent, self._console
        self._agent = self._console = self._serial = None
        if agent is not None:
            agent.close()
        if console is not None:
            console.close()

    def _console_tail(self) -> str:
        if self._console is None:
            return ""
        return "The console's last lines:\n" + self._console.tail(15)

    # --- channels ------------------------------------------------------------------------------

    @property
    def qemu(self) -> Qemu:
        """The QEMU that runs. Raises `MachineGoneError`."""
        return self._running()

    @property
    def console(self) -> Console:
        """Everything that the serial console has shown since power-on."""
        self._running()
        if self._console is None:
            raise MachineGoneError(f"{self.name} has not booted; vm.start() starts it.")
        return self._console

    @property
    def qmp(self) -> Monitor:
        """QEMU's monitor: `execute` commands, wait for events."""
        return self._running().monitor

    @property
    def agent(self) -> Agent:
        """The guest agent."""
        self._running()
        if self._agent is None:
            raise MachineGoneError(f"{self.name} has not booted; vm.start() starts it.")
        return self._agent

    @property
    def serial(self) -> Serial:
        """The serial console."""
        console = self.console
        if self._serial is None:
            self._serial = Serial(console)
        return self._serial

    @property
    def ssh(self) -> Ssh:
        """SSH as whoever the machine's own sshd lets in, root first.

        Raises `SshError` with the reason where nobody may log in with a key.
        """
        return self.ssh_as(None)

    def ssh_as(self, user: str | None) -> Ssh:
        """SSH as `user`; None is whoever may log in, root first. One connection for each user."""
        qemu, agent = self._running(), self.agent
        with self._lock:
            if user not in self._ssh:
                found = access(agent, user=user)
                if isinstance(found, SshRefusal):
                    raise found.error(self.name)
                install_key(agent, found, self._keys.public_line)
                self._ssh[user] = Ssh(
                    agent=agent,
                    access=found,
                    keys=self._keys,
                    port=qemu.forward(found.port),
                    directory=self.spec.sockets,
                )
            return self._ssh[user]

    # --- commands ------------------------------------------------------------------------------

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
        """
        agent = self.agent
        argv = agent.shell_argv(command) if isinstance(command, str) else list(command)
        if cwd is not None:
            argv = ["env", f"--chdir={cwd}", *argv]
        if user is not None:
            argv = ["runuser", "-u", user, "--", "/bin/sh", "-c", _AS_USER, "sh", user, *argv]
        data = stdin.encode() if isinstance(stdin, str) else stdin
        try:
            result = agent.exec(argv, stdin=data, env=env, timeout=timeout)
        except CommandTimeoutError as error:
            raise CommandTimeoutError(
                f"`{display(command)}` did not end on {self.name} within {timeout:g} s.",
                command=command,
                stdout=error.stdout,
                stderr=error.stderr,
            ) from None
        except (AgentError, MachineGoneError):
            self._running()  # names QEMU's end instead, if that is the cause
            raise
        result = replace(result, command=command)
        return result.check() if check else result


def _summary(report: BootReport, spec: LaunchSpec) -> str:
    text = f"{report.state}, {spec.accelerator.name}"
    if report.failed_units:
        text += f"; failed units: {', '.join(report.failed_units)}"
    return text
