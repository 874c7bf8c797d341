"""One switch of a machine: the promise, the states before, the switch, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.change_result import SwitchResult, UnitFailure, reboot_reasons
from pytest_nixvm.errors import ChannelError, CommandTimeoutError
from pytest_nixvm.guest.ignored import ignored
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.guest.switch_job import Ended, run_job
from pytest_nixvm.guest.switching import DryRun, Outcome, outcome, parse_dry_run, parse_switch
from pytest_nixvm.guest.unit_states import (
    Happened,
    UnitStates,
    surprises,
    unit_states,
    what_became,
)
from pytest_nixvm.guest.ways_in import WaysIn

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

DRY_RUN_TIMEOUT = 300.0

LOOK_AFTER = 2.0
"""Seconds after a switch's end at which the units are looked at, at the earliest."""

REPORTED = 10
"""Failed units whose status and journal are fetched: one cause may fail dozens."""


class Switcher:
    """Switches one machine, and looks at it before and after."""

    def __init__(self, vm: Machine) -> None:
        self._vm = vm
        self._ways = WaysIn(vm)
        self._jobs = 0

    def switch(self, mode: str, system: Path, timeout: float, *, booted: Path) -> SwitchResult:
        """Run switch-to-configuration, and tell what came of it. `booted` is what has booted.

        Raises `MachineError` for what is no outcome: it can't be begun, the guest has a fault.
        """
        activates = mode != "boot"
        promised: DryRun | None = None
        before = UnitStates()
        working: dict[str, str] = {}
        if activates:
            dry = self.dry_run(system)
            promised = parse_dry_run(dry.stdout + dry.stderr) if dry.ok else None
            working = self._ways.working()
            before = self._states(promised.named if promised is not None else ())
        self._jobs += 1
        argv = [f"{system}/bin/switch-to-configuration", mode]
        ended = run_job(self._vm, self._jobs, argv, timeout)
        over = time.monotonic()
        told = parse_switch(ended.output)
        result = _outcome(ended)
        after = before
        became = Happened()
        lost: tuple[str, ...] = ()
        disobeyed: tuple[str, ...] = ()
        remarks: list[str] = []
        if activates:
            lost, remarks = self._ways.lost(working)
            if result is not Outcome.UNREACHABLE and not result.refused:
                # A service that fails at once had time for that now, in most cases.
                time.sleep(max(0.0, LOOK_AFTER - (time.monotonic() - over)))
                try:
                    after, became = what_became(self._states, promised or DryRun(), before)
                    disobeyed = self._ignored(ended.began)
                except (ChannelError, CommandTimeoutError) as error:
                    remarks.append(f"what became of the units could not be read: {error}")
        if ended.unreachable:
            lost += (f"the machine: {ended.unreachable}",)
        if ended.returncode == 127:
            remarks.append(f"{argv[0]} is not in the machine's store, or can't be run there")
        return SwitchResult(
            machine=self._vm.name,
            mode=mode,
            into=system,
            outcome=result,
            returncode=ended.returncode,
            output=ended.output,
            seconds=ended.seconds,
            told=told,
            promised=promised,
            happened=became,
            surprises=surprises(promised, became, before, after)
            if promised is not None and result.activated and after is not before
            else (),
            failed_units=after.failed,
            failed_before=before.failed,
            newly_failed=self.failures(became.newly_failed, after),
            lost_channels=lost,
            ignored=disobeyed,
            remarks=tuple(remarks),
            reboot_reasons=reboot_reasons(mode, result, booted, system),
        )

    def dry_run(self, system: Path) -> CommandResult:
        """Run `switch-to-configuration dry-activate`, whatever its exit status is."""
        argv = [f"{system}/bin/switch-to-configuration", "dry-activate"]
        return self._vm.run(argv, timeout=DRY_RUN_TIMEOUT)

    def _states(self, names: Iterable[str] = ()) -> UnitStates:
        return unit_states(self._run, where=self._vm.name, names=names)

    def _ignored(self, since: float) -> tuple[str, ...]:
        """Return what is not obeyed since then; a reload of systemd tells the old ones again."""
        entries = self._vm.journal(priority="notice")
        new = [each for each in entries if each.time.timestamp() >= since]
        old = {str(each) for each in ignored(entries[: len(entries) - len(new)], "")}
        return tuple(said for each in ignored(new, "") if (said := str(each)) not in old)

    def failures(
        self, names: Sequence[str], states: UnitStates | None = None
    ) -> tuple[UnitFailure, ...]:
        """Return why units have failed, with status and journal; of many, only some have those."""
        systemd = self._vm.systemd()
        found = []
        for number, name in enumerate(names):
            if states is not None:
                result = states[name].result
            else:
                result = systemd.properties(name, "Result").get("Result", "")
            report = systemd.report(name) if number < REPORTED else ""
            found.append(UnitFailure(name, result, report))
        return tuple(found)

    def _run(self, command: Command, timeout: float) -> CommandResult:
        return self._vm.run(command, timeout=timeout)


def _outcome(ended: Ended) -> Outcome:
    if ended.unreachable:
        return Outcome.UNREACHABLE
    if not ended.finished:
        return Outcome.UNFINISHED
    return Outcome.ERROR if ended.returncode is None else outcome(ended.returncode, ended.output)
