"""The VM's power: start, shutdown, reboot, reset, crash, pause."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.channels import Channels
from pytest_nixvm.errors import MachineError, MachineGoneError, NixvmError, QmpError
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.guest.boot import BootReport, wait_ready
from pytest_nixvm.progress import Step
from pytest_nixvm.qemu.launch import LaunchSpec, launch
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.supervisor import Supervisor
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, Guest
from pytest_nixvm.wait import Deadline, timed_out

if TYPE_CHECKING:
    from pytest_nixvm.guest.keys import KeyPair

SHELL_PATIENCE = 10.0
"""Seconds that a shell has for an answer before it is taken for ended."""


class Power(Guest):
    """Power, and what is open while it is on."""

    build: VmBuild
    spec: LaunchSpec
    boots: list[BootReport]
    settled: dict[Path, int]
    qemu_version: tuple[int, ...]
    _supervisor: Supervisor
    _io: IoThread
    _keys: Callable[[], KeyPair]
    _boot_timeout: float
    _lock: threading.RLock
    _on: Channels | None

    def is_up(self) -> bool:
        """Whether the machine runs, has booted, and nothing has gone wrong with it since."""
        on = self._on
        return on is not None and on.booted and on.qemu.alive and on.health.fault is None

    @property
    def fault(self) -> MachineError | None:
        """What ended this VM, or all calls to it: a panic, a hung guest, QEMU's end. Else None."""
        on = self._on
        return None if on is None else on.health.fault

    def start(self, allow_reboot: bool = True) -> None:  # noqa: ARG002 - the driver's signature
        """Power on, on the disk as it was left, and wait until the machine is ready.

        Does nothing when it is up. A reboot from inside is always allowed. Raises `QemuError` if
        QEMU does not start, `BootError` if the machine does not get ready within the boot timeout.
        """
        with self._lock:
            if self.is_up():
                return
            self.kill()
            if self.spec.console_log.exists():
                # Each power-on has a log of its own: an old panic must not end a new boot.
                log = self.output / f"console-{len(self.boots) + 1}.log"
                self.spec = replace(self.spec, console_log=log)
            step = self.progress.step(f"Booting {self.build.name}")
            try:
                deadline = Deadline(self._boot_timeout)
                qemu = launch(
                    self.spec,
                    supervisor=self._supervisor,
                    io=self._io,
                    timeout=deadline.remaining(),
                )
                self.qemu_version = qemu.monitor.version
                on = self._on = Channels(qemu, self._io, self._keys)
                on.connect(deadline.remaining(10))
                report = wait_ready(qemu, on.console, on.agent, deadline=deadline, step=step)
                on.watch()
            except BaseException as error:
                step.fail(first_line(error))
                self.kill()
                raise
            self._booted(report)
            step.finish(_summary(report, self.spec))

    def _booted(self, report: BootReport) -> None:
        self.boots.append(report)
        log = self.spec.console_log
        self.settled[log] = log.stat().st_size if log.exists() else 0

    def shutdown(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Shut the machine down from inside, as `poweroff` does, and wait for its end.

        Does nothing when it is down. Raises `WaitTimeoutError` with the console's tail if it still
        runs after `timeout` seconds.
        """
        on = self._on
        if on is None or not on.qemu.alive:
            return
        with self.transcript.note("power", "shutdown"):
            self._opened().agent.shutdown("powerdown")
            self.wait_for_shutdown(timeout)
            on.qemu.kill()

    def wait_for_shutdown(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait until the machine has powered itself off. Does nothing when it is down.

        Raises `WaitTimeoutError` with the console's tail after `timeout` seconds, and at once the
        fault that keeps it from ever getting there.
        """
        on = self._on
        if on is None:
            return
        with self.transcript.note("wait", "power-off"):
            try:
                on.health.wait_for_end(timeout)
            except TimeoutError:
                raise timed_out(f"{self.name} to shut down", timeout, self._saw(on)) from None
            self._drop()

    def reboot(self, timeout: float | None = None) -> None:
        """Reboot from inside and wait until the machine is ready again.

        That it was a reboot is proved by a new boot id. `timeout` in seconds is the boot timeout if
        it is not given. Raises `BootError`, or `WaitTimeoutError` if the old system does not end.
        """
        self._anew("reboot", lambda on: on.agent.shutdown("reboot"), timeout)

    def reset(self, timeout: float | None = None) -> None:
        """Press the reset button and wait until the machine is ready again.

        Nothing in the guest is told: what was not written to the disk yet is lost. As `reboot`.
        """
        self._anew("reset", lambda on: on.qemu.reset(), timeout)

    def _anew(self, what: str, begin: Callable[[Channels], None], timeout: float | None) -> None:
        with self._lock, self.transcript.note("power", what):
            on = self._opened()
            deadline = Deadline(timeout or self._boot_timeout)
            before = self._boot_id(on)
            mark, since = on.qemu.monitor.mark(), on.console.mark()
            step = self.progress.step(f"{self.build.name}: {what}")
            on.health.close()
            try:
                on.hang_up()
                begin(on)
                try:
                    on.qemu.monitor.wait_event("RESET", timeout=deadline.remaining(), since=mark)
                except QmpError as error:
                    if error.error_class != "Timeout":
                        raise
                    goal = f"{self.name} to shut down for its {what}"
                    raise timed_out(goal, deadline.seconds, self._saw(on)) from None
                self._ready_again(on, deadline, step, since)
            except BaseException as error:
                step.fail(first_line(error))
                raise
            if self._boot_id(on) == before:
                raise MachineError(f"{self.name} answers after its {what}, with the same boot id.")

    def _ready_again(self, on: Channels, deadline: Deadline, step: Step, since: int) -> None:
        on.revive()
        report = wait_ready(
            on.qemu, on.console, on.agent, deadline=deadline, step=step, since=since
        )
        on.watch()
        self._booted(report)
        step.finish(_summary(report, self.spec))

    def _boot_id(self, on: Channels) -> bytes:
        return on.agent.read_file("/proc/sys/kernel/random/boot_id")

    def reconnect(self, timeout: float = 60) -> None:
        """Open the channels anew, in a guest that runs on: a switch may restart what serves them.

        The agent is waited for, SSH logs in again when it is next used, and a shell that has ended
        is started again. Raises `AgentError` if the agent does not answer within `timeout` seconds;
        SSH connections that are open stay open then.
        """
        with self._lock, self.transcript.note("power", "reconnect"):
            on = self._opened()
            with on.health.call():
                on.agent.wait_ready(timeout)
            if on.no_shell or not on.shell.answers(SHELL_PATIENCE):
                on.revive()
            on.hang_up()

    def leave_to_person(self) -> None:
        """Watch over it no more: what a person does in there is no fault that ends all calls.

        It may reboot itself then; `reconnect` opens the channels anew.
        """
        self._opened().health.close()

    def become(self, build: VmBuild) -> None:
        """Run another build of this machine from the next start on, on the disk as it is.

        Only for a machine that is off, after it has run. Raises `MachineError` while it is on.
        """
        with self._lock:
            if self._on is not None and self._on.qemu.alive:
                raise MachineError(f"{self.name} runs: it can be another build after a shutdown.")
            self.build = build
            self.spec = replace(
                self.spec,
                start_script=build.start_script,
                network_options=build.network_options,
            )

    def crash(self) -> None:
        """Cut the power: QEMU ends at once, nothing in the guest is told.

        Does nothing when it is down.
        """
        with self.transcript.note("power", "crash"):
            self.kill()

    def pause(self) -> None:
        """Stop the guest's processors. Its clock stops as well, until `resume`."""
        with self.transcript.note("power", "pause"):
            self.qemu.pause()

    def resume(self) -> None:
        """Let the guest's processors go on."""
        with self.transcript.note("power", "resume"):
            self.qemu.resume()

    def kill(self) -> None:
        """End QEMU and every channel, if there are any. Never raises for a VM that is gone."""
        with self._lock:
            on, self._on = self._on, None
            if on is not None:
                on.close()
                on.qemu.kill()

    def leave_running(self) -> None:
        """Close every channel, and let QEMU run on when this process ends."""
        with self._lock:
            on, self._on = self._on, None
            if on is not None:
                on.qemu.process.keep()
                on.close()

    def _drop(self) -> None:
        """Close the channels of a VM that has ended by itself."""
        with self._lock:
            on, self._on = self._on, None
            if on is not None:
                on.close()

    def _opened(self) -> Channels:
        """Return the channels of the VM that runs and has booted; wait for its reboot, if any.

        Raises the fault, `MachineGoneError` when it does not run.
        """
        on = self._on
        if on is None or not on.booted:
            raise MachineGoneError(f"{self.name} is not running; vm.start() starts it.")
        if on.health.fault is not None:
            raise on.health.fault.again()
        if not on.qemu.alive:
            cause = on.qemu.cause_of_death()
            raise MachineGoneError(f"{self.name} is not running, vm.start() starts it: {cause}.")
        if on.health.paused:
            raise MachineError(f"{self.name} is paused; vm.resume() lets it go on.")
        if on.health.rebooted:
            self._await_reboot(on)
        return on

    def _await_reboot(self, on: Channels) -> None:
        """Wait for the end of a reboot that was not ours: a command's, Control-Alt-Delete's."""
        with self._lock:
            if not on.health.rebooted:
                return
            since = on.health.rebooted_at
            on.health.close()
            step = self.progress.step(f"{self.build.name} reboots by itself")
            try:
                self._ready_again(on, Deadline(self._boot_timeout), step, since)
            except BaseException as error:
                step.fail(first_line(error))
                raise

    def _saw(self, on: Channels) -> str:
        return "The console's last lines:\n" + on.console.tail(15)


def first_line(error: BaseException) -> str:
    """Return the first line of an error of ours, for a progress step."""
    return str(error).splitlines()[0] if isinstance(error, NixvmError) and str(error) else ""


def _summary(report: BootReport, spec: LaunchSpec) -> str:
    text = f"{report.state}, {spec.accelerator.name}"
    if report.failed_units:
        text += f"; failed units: {', '.join(report.failed_units)}"
    return text
