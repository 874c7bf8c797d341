"""Units in the guest: their state, their journal, and the wait for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pytest_nixvm.errors import MachineError
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.wait import poll

COMMAND_TIMEOUT = 60.0
"""Seconds for one call of systemctl or journalctl."""


class Systemd:
    """systemd in one guest, or one user's own manager in it.

    `run` runs an argv in the guest with a timeout in seconds, on whatever channel there is.
    """

    def __init__(
        self,
        run: Callable[[Sequence[str], float], CommandResult],
        *,
        where: str,
        user: str | None = None,
    ) -> None:
        self._run = run
        self._where = where
        self._user = user
        self._systemctl = (
            ["systemctl"] if user is None else ["systemctl", f"--machine={user}@", "--user"]
        )

    def properties(self, unit: str) -> dict[str, str]:
        """Return what `systemctl show` says of a unit, whether or not it exists."""
        shown = self._call([*self._systemctl, "show", "--no-pager", unit]).check()
        pairs = (line.partition("=") for line in shown.stdout.splitlines())
        return {name: value for name, equals, value in pairs if equals}

    def failed_units(self) -> tuple[str, ...]:
        """Return the names of the units that have failed."""
        listing = ["list-units", "--failed", "--plain", "--no-legend", "--full", "--no-pager"]
        listed = self._call([*self._systemctl, *listing])
        return tuple(line.split()[0] for line in listed.stdout.splitlines() if line.split())

    def report(self, unit: str) -> str:
        """Return a unit's status and the end of its journal, as a person reads them."""
        status = self._call([*self._systemctl, "status", "--no-pager", "-n", "0", unit])
        which = "-u" if self._user is None else "--user-unit"
        logged = self._call(["journalctl", "-b", "--no-pager", "-n", "20", which, unit])
        said = status.stdout.rstrip() or status.stderr.rstrip()
        return f"{said}\nIts journal:\n{logged.stdout.rstrip()}"

    def wait_for_unit(self, unit: str, timeout: float) -> None:
        """Wait until a unit is active.

        Raises `MachineError` at once when it can't become active by itself: it has failed, does not
        exist, is masked, or is inactive without a job that would start it. Raises
        `WaitTimeoutError` after `timeout` seconds. Both show `report(unit)`.
        """
        unit = unit if "." in unit else f"{unit}.service"
        state: dict[str, str] = {}

        def decided() -> bool:
            state.clear()
            state.update(self.properties(unit))
            return state.get("ActiveState") == "active" or hopeless(state) is not None

        def saw() -> str:
            return f"It is {state.get('ActiveState')}.\n{self.report(unit)}"

        poll(decided, f"{unit} on {self._where}", timeout=timeout, longest=0.5, saw=saw)
        if (reason := hopeless(state)) is not None:
            raise MachineError(f"{unit} on {self._where} {reason}.\n{self.report(unit)}")

    def _call(self, argv: Sequence[str]) -> CommandResult:
        return self._run(argv, COMMAND_TIMEOUT)


def hopeless(state: Mapping[str, str]) -> str | None:
    """Say why a unit with these properties won't become active by itself; None if it may."""
    active, load = state.get("ActiveState"), state.get("LoadState")
    if active == "active":
        return None
    if load == "not-found":
        return "does not exist"
    if load == "masked":
        return "is masked"
    if active == "failed":
        return f"has failed (result: {state.get('Result')})"
    # Job is the id of a queued job, and is left out or 0 when there is none.
    if active == "inactive" and state.get("Job", "0") in ("", "0"):
        return "is inactive, and no job is waiting to start it"
    return None
