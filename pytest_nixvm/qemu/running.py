"""A running QEMU: power, forwarded ports, the screen, and how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from pytest_nixvm.errors import QmpError
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.qemu.network import Network
from pytest_nixvm.qemu.output import full_disk, quote, read_end
from pytest_nixvm.qemu.ports import Ports
from pytest_nixvm.qemu.spec import LaunchSpec
from pytest_nixvm.qemu.supervisor import Process, describe_status
from pytest_nixvm.wait import timed_out

_SHUTDOWN_REASONS = {
    "guest-shutdown": "the guest shut down",
    "guest-reset": "the guest rebooted, and its command line forbids that",
    "guest-panic": "the guest's kernel panicked",
    "host-qmp-quit": "QMP's quit was called",
    "host-signal": "a signal ended it",
    "host-ui": "its window was closed",
    "host-error": "an error on the host ended it",
    "subsystem-reset": "a subsystem was reset",
}


class Qemu:
    """One running QEMU. All methods may be called from several threads."""

    def __init__(
        self, spec: LaunchSpec, process: Process, monitor: Monitor, started_in: float
    ) -> None:
        self.spec = spec
        self.process = process
        self.monitor = monitor
        self.started_in = started_in  # seconds from the script's start to the first answer
        self.agent_socket = spec.agent_socket
        self.ports = Ports(monitor, spec.sockets)  # of shells in the guest
        self.console_socket = spec.console_socket
        self.console_log = spec.console_log
        self.pid = monitor.pid or process.pid
        self.argv = _command_line(self.pid)  # as QEMU got it, () if it was already gone
        self._killed = False
        self.network = Network(monitor, self.argv, spec.name)
        monitor.describe_end = self.cause_of_death

    def __repr__(self) -> str:
        return f"<Qemu {self.spec.name} pid={self.pid} {'alive' if self.alive else 'gone'}>"

    @property
    def alive(self) -> bool:
        """Whether QEMU runs (a paused or panicked guest's does)."""
        return self.process.returncode is None and self.monitor.connected

    # --- power ---

    def powerdown(self) -> None:
        """Press the power button (ACPI); the guest decides. See `wait_exit`."""
        self.monitor.execute("system_powerdown")

    def reset(self) -> None:
        """Press the reset button: the guest starts anew at once, disks as they are."""
        self.monitor.execute("system_reset")

    def pause(self) -> None:
        """Stop the guest's processors."""
        self.monitor.execute("stop")

    def resume(self) -> None:
        """Let the guest's processors go on."""
        self.monitor.execute("cont")

    def kill(self) -> None:
        """End it at once with its helpers; return when they are dead. May be called twice."""
        if self.process.returncode is None:
            self._killed = True
        try:
            self.process.kill()
        finally:
            self.monitor.close()

    def wait_exit(self, timeout: float) -> int:
        """Wait until QEMU has ended and return its exit status (negative for a signal).

        Raises `WaitTimeoutError` after `timeout` seconds.
        """
        try:
            return self.process.wait(timeout)
        except TimeoutError:
            raise timed_out(f"{self.spec.name}'s QEMU to end", timeout) from None

    def cause_of_death(self) -> str:
        """Say how QEMU ended: who ended it, its exit status or signal, its last words."""
        if self.alive:
            return "it is running"
        # The monitor's end is seen a moment before the process's.
        with contextlib.suppress(TimeoutError):
            self.process.wait(1.0)
        status = self.process.returncode
        if self._killed:
            return "it was killed by the tests"
        if status is None:
            return "QEMU closed its monitor, but its start script still runs"
        ended = f"QEMU ended with {describe_status(status)}"
        shutdowns = self.monitor.events("SHUTDOWN")
        if shutdowns:
            reason = str(shutdowns[-1].data.get("reason", ""))
            ended = f"{_SHUTDOWN_REASONS.get(reason, reason or 'it was shut down')}; {ended}"
        if self.monitor.events("GUEST_PANICKED"):
            ended = f"the guest's kernel had panicked; {ended}"
        said = read_end(self.spec.qemu_log)
        if status not in (0, -signal.SIGKILL):  # it had no time for last words
            ended += full_disk(said, self.spec.places, status)
            if said.strip():
                ended += f"\nIts last words:\n{quote(said, 15)}"
        return ended

    # --- network ---

    def forward(self, guest_port: int) -> int:
        """Forward a free port of 127.0.0.1 to a TCP port of the guest; see `Network.forward`."""
        return self.network.forward(guest_port)

    # --- screen ---

    def screenshot(self, path: Path) -> Path:
        """Write the screen as PNG to `path` and return it.

        Raises `QmpError` if the VM has no display device, or QEMU can't write there.
        """
        if not self._has_display():
            raise QmpError(f"{self.spec.name} has no display device, so it has no screen to show.")
        path = path.absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.monitor.execute("screendump", {"filename": str(path), "format": "png"}, timeout=20)
        return path

    def _has_display(self) -> bool:
        # Without one, QEMU would show the text console that it makes for the parallel port.
        consoles = [
            entry["name"]
            for entry in self.monitor.execute("qom-list", {"path": "/backend"})
            if entry["name"].startswith("console[")
        ]
        return any(
            self.monitor.execute("qom-get", {"path": f"/backend/{name}", "property": "device"})
            for name in consoles
        )


def _command_line(pid: int) -> tuple[str, ...]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(argument) for argument in raw.split(b"\0")[:-1])
