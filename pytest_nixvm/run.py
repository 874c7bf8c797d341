"""One pytest run: its fleet, and what becomes of its tests."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import pytest

from pytest_nixvm.errors import NixvmError, NothingToTestError, SettingsError, UserError
from pytest_nixvm.hookspecs import gathered
from pytest_nixvm.items import (
    item_machines,
    module_of,
    prepared_machines,
    scope,
)
from pytest_nixvm.progress import Deferred, Progress, Silent
from pytest_nixvm.report.account import Account
from pytest_nixvm.report.cases import Case
from pytest_nixvm.report.timeline import Recorded, Timeline
from pytest_nixvm.selection import Selection
from pytest_nixvm.settings import Settings

if TYPE_CHECKING:
    from pytest_nixvm.change import Change
    from pytest_nixvm.flake.build import Secret
    from pytest_nixvm.fleet import Fleet
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.snapshots import Snapshot
    from pytest_nixvm.tested import Recorder

# The rooms below are imported when a test needs them: a pytest run without VMs, in whose process
# this plugin is as well, should not pay for SSH and QMP.


class Run(Selection):
    """What the plugin knows of one run; `config.stash[RUN]` has it."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        super().__init__(config, settings)
        self.account = Account()
        self.timeline = Timeline()
        self.cases: dict[str, Case] = {}
        self._closed = False
        self._current: pytest.Item | None = None
        self._next: pytest.Item | None = None
        self._own: list[Machine] = []  # what tests have started by themselves
        self._snapshots: dict[str, Snapshot] = {}  # those of `template`, by their fixture's name
        self._told: dict[str, Any] | None = getattr(config, "workerinput", {}).get("nixvm")
        self._failed: set[Path] = set()  # output directories of machines that failed tests used

    @cached_property
    def progress(self) -> Progress:
        """Where steps are shown, and kept for the timeline."""
        return Recorded(Deferred(self._terminal), self.timeline)

    def _terminal(self) -> Progress:
        """Return pytest's terminal, whatever is captured meanwhile."""
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        if self.is_worker or reporter is None or self.config.option.verbose < -1:
            return Silent()
        capture = self.config.pluginmanager.getplugin("capturemanager")
        uncaptured = capture.global_and_fixture_disabled if capture else nullcontext
        with uncaptured():
            try:
                # A duplicate, because the capture replaces descriptor 1 while a test runs.
                number = os.dup(sys.stdout.fileno())
                stream: TextIO = os.fdopen(number, "w", encoding="utf-8", errors="replace")
            except (OSError, ValueError):
                stream = sys.stdout  # no descriptor: pytest runs inside another program

        def before() -> None:
            with uncaptured():
                reporter.ensure_newline()
                writer = self.config.get_terminal_writer()
                if writer.width_of_current_line:  # the dots of -q
                    writer.line()
                reporter.flush()

        from pytest_nixvm.report.progress import TerminalProgress

        return TerminalProgress(stream, live=stream.isatty(), before=before)

    @cached_property
    def fleet(self) -> Fleet:
        """The run's fleet, made when it is first needed."""
        from pytest_nixvm.flake.build import MachineInfo
        from pytest_nixvm.fleet import Fleet

        told = self._told
        fleet = Fleet(
            self.settings,
            progress=self.progress,
            output=Path(told["output"]) if told else None,
            known=[MachineInfo(**machine) for machine in told["machines"]] if told else None,
        )
        if told:
            fleet.unchanged = tuple(told["unchanged"])
        fleet.more_secrets = self._more_secrets
        fleet.on_start = self._started
        fleet.on_end = self._ended
        return fleet

    def _more_secrets(self, name: str) -> Sequence[Secret]:
        """Return what the hook says of a machine. Raises `SettingsError` for what is no secret."""
        from pytest_nixvm.flake.build import Secret

        results = self.config.hook.pytest_nixvm_secrets(machine=name)
        return gathered(f"pytest_nixvm_secrets({name!r})", results, Secret)

    @cached_property
    def recorder(self) -> Recorder:
        """What is known of the tests for `nixvm deploy`, which deploys what has passed them."""
        from pytest_nixvm.tested import Recorder

        flake = self.fleet.flake
        return Recorder(
            str(flake.reference),
            partial(flake.real_toplevel, quiet=True),
            is_current=flake.is_current,
        )

    def expect(self, names: Iterable[str]) -> None:
        """Have the machines' real systems evaluated meanwhile: it is them that tests vouch for."""
        if self.settings.flake is not None:  # else what comes next says so
            self.recorder.expect(names)

    def record(self, report: pytest.TestReport) -> None:
        """Take a report into the record of what was tested."""
        names = getattr(report, MACHINES, None)
        if names is None:  # not ours: xdist's, of a test that its worker did not survive
            names = self.named_in(report.nodeid) if report.failed else []
        for name in names:
            self.recorder.machine_used(report.nodeid, name)
        if "recorder" in self.__dict__:
            self.recorder.outcome(report.nodeid, report.when, report.outcome)

    def finish(self, *, interrupted: bool) -> None:
        """Write the record of what was tested, once, where the reports have come in."""
        if "recorder" in self.__dict__ and not self.is_worker:
            self.account.notes += self.recorder.finish(interrupted=interrupted)

    def close(self) -> None:
        """End every VM."""
        if "fleet" in self.__dict__:
            self.fleet.close()
            if not self._closed:
                for machine in self.fleet.started:  # left running: those that end are told
                    self._account(machine)
                self.account.kept += [kept.lines() for kept in self.fleet.kept]
                self.account.unfreezable |= self.fleet.unfreezable
            self._closed = True
        if "progress" in self.__dict__:
            self.progress.close()

    # --- around each test ------------------------------------------------------------------------

    def acquire(self, item: pytest.Item, name: str) -> Machine:
        """Return the test's own VM, or the one that it shares with others of its isolation."""
        request = self.request(item)
        machine = self.fleet.acquire(name, request, scope(item, request))
        self.used(item, machine, fresh=False)
        return machine

    def change(self, item: pytest.Item, name: str) -> Change:
        """Return a change of the test's own, from the generation that --nixvm-from names.

        Raises `NothingToTestError` where there is none.
        """
        from pytest_nixvm.deployments import NO_BASE

        generations = self.fleet.generations() if self.settings.from_ else None
        if generations is None:
            raise NothingToTestError(NO_BASE)
        request = replace(self.request(item), generations=generations)
        machine = self.fleet.acquire(name, request, item.nodeid)
        self.used(item, machine, fresh=False)
        return self.fleet.change_of(machine, request, self.fleet.under_test)

    def begin(self, item: pytest.Item, following: pytest.Item | None) -> None:
        """Note that a test begins, with the VMs that tests have started by themselves."""
        self._current, self._next = item, following
        for machine in self._own:
            if machine.is_up():
                self.used(item, machine, fresh=False)

    def set_up(self) -> None:
        """Have the next test's VMs loaded while this one runs: it has its own by now."""
        following = self._next
        if following is None or "fleet" not in self.__dict__:
            return
        from pytest_nixvm.fleet import Wanted

        names = getattr(following, "fixturenames", ())
        wanted = [Wanted(snapshot) for name, snapshot in self._snapshots.items() if name in names]
        with suppress(SettingsError):
            request = self.request(following)
            users = (request.user,) if "ssh" in names else ()
            if request.isolation == "test" and {"vm", "machines", "change"} & set(names):
                prepared = prepared_machines(following)
                wanted += [
                    Wanted((machine, replace(each, user=request.user)), users)
                    for each in self._requests(following)
                    for machine in item_machines(following)
                    if machine not in prepared
                ]
        self.fleet.expect(wanted)

    def has_snapshot(self, fixture: str, snapshot: Snapshot) -> None:
        """Take note of what a fixture of `template` hands clones of to each test."""
        self._snapshots[fixture] = snapshot

    def _started(self, machine: Machine, shared: bool) -> None:
        """Note that a VM is about to be powered on; should it not boot, its console counts."""
        if not shared:
            self._own.append(machine)
        if self._current is not None:
            self.used(self._current, machine, fresh=machine.template is None)

    def _ended(self, machine: Machine) -> None:
        """Note that a VM has been ended for good."""
        self._account(machine)
        if machine in self._own:
            self._own.remove(machine)
        if machine.frozen:  # a template: no test has used it
            for case in self.cases.values():
                case.marks = [mark for mark in case.marks if mark.machine is not machine]
        if machine.output not in self._failed and not self.account.shows(machine.output):
            shutil.rmtree(machine.output, ignore_errors=True)

    def _account(self, machine: Machine) -> None:
        """Take a VM into the summary."""
        self.timeline.add_waits(machine.build.name, machine.transcript.entries)
        self.account.add(machine)

    def case(self, item: pytest.Item) -> Case:
        """Return what is known of a test that is under way."""
        return self.cases.setdefault(item.nodeid, Case(item.nodeid))

    def machines_of(self, item: pytest.Item, *, failed: bool) -> list[str]:
        """Return the names of the machines that a test vouches for: those it has used so far.

        One that has `failed` may have done so before it had those it is meant for.
        """
        names = set(item_machines(item)) if failed else set()
        case = self.cases.get(item.nodeid)
        used = [] if case is None else [mark.machine for mark in case.marks]
        return sorted(names | {each.name for each in used if self.fleet.is_under_test(each)})

    def used(self, item: pytest.Item, machine: Machine, *, fresh: bool) -> None:
        """Take note that a test uses a machine from now on."""
        case = self.case(item)
        if not case.uses(machine):
            from pytest_nixvm.report.evidence import Mark

            case.marks.append(Mark.set(machine, fresh=fresh))

    def failed(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Gather what a failed test's machines have to say, while they are there."""
        case = self.cases.get(item.nodeid)
        if case is None or not case.marks:
            return
        found = case.fail(report, self.config, self.settings, self.fleet.out)
        self._failed.update(mark.machine.output for mark in case.marks)
        # junit takes a test's properties from the report of its teardown, which is made of these.
        item.user_properties += [
            each for each in report.user_properties if each not in item.user_properties
        ]
        if self.settings.keep == "failed":
            for mark in case.marks:
                self.fleet.keep(mark.machine)
        if self.config.pluginmanager.hasplugin("html"):
            from pytest_nixvm.report import html

            html.add(report, found)

    def passed(self, item: pytest.Item) -> None:
        """Photograph the machines of a test that has passed, where that is asked for."""
        case = self.cases.get(item.nodeid)
        if case is not None and self.settings.screenshot == "on":
            for mark in case.marks:
                case.photograph(mark, self.fleet.out)

    def leave(self, item: pytest.Item, following: pytest.Item | None) -> None:
        """End the test's own VMs, and those that were shared in a module that is over."""
        if "fleet" not in self.__dict__:
            return
        self.fleet.release(item.nodeid)
        module = module_of(item)
        if following is None or module_of(following) != module:
            self.fleet.release(module)

    def forget(self, item: pytest.Item) -> None:
        """Drop what was known of a test: it is over."""
        self._current = None
        case = self.cases.pop(item.nodeid, None)
        if case is not None:
            case.tidy()

    # --- xdist -----------------------------------------------------------------------------------

    def for_worker(self) -> dict[str, Any] | None:
        """Return what a worker is told: None when there is no flake to evaluate."""
        if self.settings.flake is None:
            return None
        try:
            machines = [asdict(machine) for machine in self.fleet.every_machine]
            unchanged = self.fleet.unchanged
            _ = self.fleet.machines
        except UserError as error:
            raise pytest.UsageError(str(error)) from error
        return {
            "machines": machines,
            "unchanged": unchanged,
            "output": str(self.fleet.output),
        }

    def told(self) -> dict[str, Any]:
        """Return what a worker tells the controller at its end."""
        return {
            "account": self.account.told(),
            "timeline": self.timeline.told(),
            "changed": self._changed(),
        }

    def _changed(self) -> list[str]:
        """Return the machines that were changed while they were tested here."""
        flake = self.__dict__["fleet"].__dict__.get("flake") if "fleet" in self.__dict__ else None
        if flake is None:
            return []
        changed = []
        for name in flake.used:
            try:
                if not flake.is_current(name):
                    changed.append(name)
            except NixvmError:  # it was another one, which could be evaluated
                changed.append(name)
        return changed

    def hear(self, told: dict[str, Any] | None) -> None:
        """Take a worker's tale into this run's."""
        if told is not None:
            self.account.hear(told["account"])
            self.timeline.hear(told["timeline"])
            if told["changed"]:
                self.recorder.changed(told["changed"])


RUN = pytest.StashKey[Run]()
MACHINES = "nixvm_machines"
"""The name under which a report carries the machines that its test has used."""


def fail(error: NixvmError) -> NoReturn:
    """Fail a fixture with an error's own text: what was wrong is said there, not in our code."""
    # From None: it would be shown a second time, as what was handled meanwhile.
    raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None
