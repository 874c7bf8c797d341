"""QEMU's monitor in the NixOS test driver's way. `vm.qmp` is the one that knows errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_nixvm.errors import QmpError
from pytest_nixvm.qemu.monitor import Event, Monitor
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, Guest
from pytest_nixvm.wait import Deadline, timed_out


class QemuMonitor(Guest):
    """Commands of the human monitor, and events."""

    _seen: tuple[Monitor | None, int] = (None, 0)

    def send_monitor_command(self, command: str) -> str:
        """Run a line of QEMU's human monitor and return what it prints.

        Raises `QmpError` if that reads like an error, which is all that this monitor gives.
        """
        with self.transcript.note("monitor", command):
            return self.qemu.monitor.hmp(command)

    def wait_for_qmp_event(
        self, event_filter: Callable[[dict[str, Any]], bool], timeout: float = DEFAULT_TIMEOUT
    ) -> dict[str, Any]:
        """Wait for a QMP event for which `event_filter` is true, and return it.

            vm.wait_for_qmp_event(lambda event: event["event"] == "RESET")

        The filter is given the event as QMP has it: "event", "data", "timestamp". Events since
        power-on count, but those that an earlier call has looked at do not, as in the NixOS test
        driver. Raises `WaitTimeoutError` after `timeout` seconds, with the events that came,
        `MachineGoneError` when QEMU ends without it.
        """
        monitor = self.qemu.monitor
        deadline = Deadline(timeout)
        came: list[str] = []
        with self.transcript.note("wait", "a QMP event") as entry:
            while True:
                known, since = self._seen
                since = since if known is monitor else 0
                try:
                    event = monitor.wait_event(None, timeout=deadline.remaining(), since=since)
                except QmpError as error:
                    if error.error_class != "Timeout":
                        raise
                    saw = ", ".join(came[-10:]) or "none"
                    raise timed_out(
                        f"a QMP event of {self.name}", timeout, f"Events that came instead: {saw}."
                    ) from None
                self._seen = (monitor, event.sequence)
                raw = _raw(event)
                if event_filter(raw):
                    entry.outcome = event.name
                    return raw
                came.append(event.name)


def _raw(event: Event) -> dict[str, Any]:
    seconds, fraction = divmod(event.timestamp, 1)
    return {
        "event": event.name,
        "data": dict(event.data),
        "timestamp": {"seconds": int(seconds), "microseconds": round(fraction * 1e6)},
    }
