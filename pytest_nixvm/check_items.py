"""Checks as ordinary pytest items: `nixvm::dev-vm::boots`.

They are collected beside the tests of files, so that -k, -m, --lf, --deselect, junit and xdist
mean for them what they mean for tests. Session → MachineChecks → CheckItem.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_nixvm.errors import NixvmError, NothingToTestError, SettingsError, UserError
from pytest_nixvm.hookspecs import gathered
from pytest_nixvm.run import RUN, Run

if TYPE_CHECKING:
    from pytest_nixvm.checks import Check, Checked
    from pytest_nixvm.flake.build import MachineInfo
    from pytest_nixvm.machine import Machine

PREFIX = "nixvm"
MARKER = "nixvm_check: what --nixvm-check collects; -m 'not nixvm_check' leaves all of it out."


class CheckWarning(UserWarning):
    """What a check has seen, and what is no defect of the machine."""


# --- collection ----------------------------------------------------------------------------------


class Collection:
    """A plugin that adds the checks to what is collected, before anything selects from it.

    `wanted` names checks (all if it is empty); with `only` nothing else is run.
    """

    def __init__(self, wanted: Sequence[str], only: bool) -> None:
        self.wanted = list(wanted)
        self.only = only

    def told(self) -> dict[str, object]:
        """Return what makes the same in a worker of xdist's."""
        return {"wanted": self.wanted, "only": self.only}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> None:
        """Take the checks' names away from what is looked for in files; xdist repeats them."""
        session.config.args = take_arguments(session.config.args)[0]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Add the checks."""
        run = config.stash[RUN]
        if self.only:
            items.clear()
        try:
            items += collect(run, session, self.wanted)
        except UserError as error:
            run.mistake(error)


def take_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell pytest's positional arguments from those that name checks: (rest, wanted)."""
    wanted = [word for word in arguments if _is_ours(word)]
    return [word for word in arguments if not _is_ours(word)], wanted


def _is_ours(word: str) -> bool:
    return word.startswith(f"{PREFIX}::") or (word == PREFIX and not Path(word).exists())


def collect(run: Run, session: pytest.Session, wanted: Sequence[str] = ()) -> list[pytest.Item]:
    """Return an item for each check of each selected machine.

    With `wanted` only those that it names: node ids, or the beginnings of some. Raises
    `SettingsError` for names that mean nothing, and as the flake's evaluation does.
    """
    machines = [*run.fleet.machines, *_images(run, wanted)]
    every = {each.name: _checks(run, each.name) for each in machines}
    off = parse_off(
        run.settings.check_off,
        [each.name for each in run.fleet.every_machine],
        sorted({check.name for checks in every.values() for check in checks}),
    )
    items: list[pytest.Item] = []
    for machine in machines:
        node = MachineChecks.from_parent(
            session, name=machine.name, nodeid=f"{PREFIX}::{machine.name}"
        )
        node.machine, node.checks, node.off = machine, every[machine.name], off
        items += node.collect()
    # One that is named, and left out by --nixvm-changed, is said to be: that is no mistake.
    gone = [f"{PREFIX}::{name}" for name in run.fleet.unchanged]
    kept = [w for w in wanted if not any(f"{w.rstrip(':')}::".startswith(f"{g}::") for g in gone)]
    items = select(items, kept) if wanted else items
    # As for a file's tests, or nobody would count them.
    report = pytest.CollectReport(PREFIX, "passed", None, [*items])
    session.config.hook.pytest_collectreport(report=report)
    return items


def _images(run: Run, wanted: Sequence[str]) -> list[MachineInfo]:
    """Return the machines that boot from an image, where a check of one is named."""
    from pytest_nixvm.flake.images import split

    there = {machine.name for machine in run.fleet.machines}
    named = dict.fromkeys(word.split("::")[1] for word in wanted if "::" in word)
    found = [run.fleet.machine(name) for name in named if name not in there and split(name)[1]]
    return [info for info in found if info is not None and info.image is not None]


def select(items: Sequence[pytest.Item], wanted: Sequence[str]) -> list[pytest.Item]:
    """Return the items that node ids, or the beginnings of node ids, name.

    Raises `SettingsError` for one that names nothing.
    """
    chosen = set()
    for word in wanted:
        start = word.rstrip(":")
        named = [i for i in items if i.nodeid == start or i.nodeid.startswith(f"{start}::")]
        if not named:
            if start.rpartition("::")[2] in _of_changes():
                raise SettingsError(
                    f"{word} is a check of the change from the deployed generation, which "
                    "--nixvm-from=REF names: HEAD~1, a branch, or a flake reference."
                )
            every = [item.nodeid for item in items]
            near = difflib.get_close_matches(start, every, 1)
            meant = f" Did you mean {near[0]}?" if near else ""
            there = ", ".join(dict.fromkeys(each.rpartition("::")[0] for each in every)) or "none"
            raise SettingsError(f"There is no check {word}.{meant} There are checks of: {there}.")
        chosen.update(named)
    return [item for item in items if item in chosen]


def _of_changes() -> set[str]:
    from pytest_nixvm.checks import BUILT_IN

    return {check.name for check in BUILT_IN if check.change}


def _checks(run: Run, machine: str) -> list[Check]:
    """Return the checks of a machine: the built-in ones, then those of the hook."""
    from pytest_nixvm.checks import BUILT_IN, Check

    found = [check for check in BUILT_IN if not check.change or run.settings.from_ is not None]
    names = {check.name for check in BUILT_IN}
    call = f"pytest_nixvm_checks({machine!r})"
    for check in gathered(call, run.config.hook.pytest_nixvm_checks(machine=machine), Check):
        if check.name in names:
            raise SettingsError(f"{call}: there are two checks called {check.name!r}.")
        if not check.name or set(check.name) & set(": \t\n[]"):
            raise SettingsError(
                f"{call}: {check.name!r} can't be a check's name: it is a part of "
                "`nixvm::MACHINE::NAME`."
            )
        names.add(check.name)
        if not check.change or run.settings.from_ is not None:
            found.append(check)
    return found


# --- what is turned off --------------------------------------------------------------------------


@dataclass(frozen=True)
class Off:
    """A check that the user has turned off."""

    machine: str  # a glob
    check: str
    reason: str


def parse_off(
    entries: Sequence[str], machines: Sequence[str], checks: Sequence[str]
) -> tuple[Off, ...]:
    """Read the entries of nixvm_check_off. Raises `SettingsError`.

    `machines` and `checks` are the names that there are.
    """
    from pytest_nixvm.checks import BUILT_IN

    known = sorted({*checks, *(check.name for check in BUILT_IN)})
    found = []
    for entry in entries:
        parts = [part.strip() for part in entry.split(":", 2)]
        if len(parts) != 3 or not all(parts):
            raise SettingsError(
                f"nixvm_check_off: {entry!r} should be MACHINE: CHECK: REASON, for example "
                "'dev-vm: ports: the print server is meant to be open'."
            )
        machine, check, reason = parts
        if not any(fnmatchcase(name, machine) for name in machines):
            raise SettingsError(
                f"nixvm_check_off: {entry!r}: no machine of the flake is called {machine!r}."
                f"{_meant(machine, machines)} Its machines: {', '.join(machines) or 'none'}."
            )
        if check != "*" and check not in known:
            raise SettingsError(
                f"nixvm_check_off: {entry!r}: there is no check {check!r}.{_meant(check, known)} "
                f"The checks: {', '.join(known)}."
            )
        found.append(Off(machine, check, reason))
    return tuple(found)


def _meant(word: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""


# --- nodes ---------------------------------------------------------------------------------------


class MachineChecks(pytest.Collector):
    """One machine: its checks, and the VMs that they share until the last of them is over."""

    machine: MachineInfo
    checks: Sequence[Check] = ()
    off: Sequence[Off] = ()

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.memory: dict[str, object] = {}
        self.scopes: set[str] = set()

    def collect(self) -> list[CheckItem]:
        """Return the items."""
        items = []
        for check in self.checks:
            item = CheckItem.from_parent(self, name=check.name)
            item.prepare(check, self.machine)
            for off in self.off:
                if fnmatchcase(self.machine.name, off.machine) and off.check in ("*", check.name):
                    reason = f"{self.machine.name}::{check.name} is turned off: {off.reason}"
                    item.add_marker(pytest.mark.skip(reason=reason))
                    break
            items.append(item)
        return items

    def teardown(self) -> None:
        """End the VMs of the checks: the machine's last one is over."""
        fleet = self.config.stash[RUN].fleet
        for scope in self.scopes:
            fleet.release(scope)
        for kept in self.memory.values():
            close = getattr(kept, "close", None)
            if close is not None:
                close()
        self.memory.clear()


class CheckItem(pytest.Item):
    """One check of one machine."""

    check: Check
    parent: MachineChecks

    def prepare(self, check: Check, machine: MachineInfo) -> None:
        """Take in what is to be checked."""
        self.check = check
        self.nixvm_machines = [machine.name]
        self.add_marker(pytest.mark.nixvm(machine.name))
        self.add_marker(pytest.mark.nixvm_check)
        if machine.skip is not None:
            self.add_marker(pytest.mark.skip(reason=f"{machine.name}: {machine.skip}"))

    @property
    def machine(self) -> str:
        """The machine's name."""
        return self.nixvm_machines[0]

    @property
    def obj(self) -> object:
        """What `pytest --collect-only -v` shows the docstring of."""
        return self.check.run

    # "dev-vm::boots" is what a failure's headline shows; there is no file to look into.
    @property
    def location(self) -> tuple[str, int | None, str]:
        """Where pytest's reports say it is."""
        return PREFIX, None, self._short

    def reportinfo(self) -> tuple[str, int | None, str]:
        """Return the same with a line, which pytest wants for a skipped item."""
        return PREFIX, 0, self._short

    def setup(self) -> None:
        """Have the machine built, and booted where that is not itself the check."""
        from pytest_nixvm.checks.base import ToldError

        try:
            if not self.check.change:
                self._checked.once("built", self._build)
            if self.check.shared and self.check.name != "boots":
                _ = self._checked.vm
        except (NothingToTestError, ToldError) as error:
            self._skip(error)
        except NixvmError as error:
            self._fail(error)

    def _build(self) -> bool:
        run = self.config.stash[RUN]
        run.fleet.prepare(self.machine, run.request(self))
        return True

    def runtest(self) -> None:
        """Run the check."""
        from pytest_nixvm.checks.base import DoesNotApply, ToldError

        checked = self._checked
        try:
            self.check.run(checked)
        except (NothingToTestError, DoesNotApply, ToldError) as error:
            self._skip(error)
        except NixvmError as error:
            self._fail(error)
        finally:
            self._tell(checked.notes)

    def _fail(self, error: NixvmError) -> NoReturn:
        from pytest_nixvm.errors import CheckFailedError

        text = f"{type(error).__name__}: {error}"
        if isinstance(error, CheckFailedError):
            text = f"{error}\n{self._off_line()}"
        raise pytest.fail.Exception(text, pytrace=False) from None

    def _skip(self, reason: NixvmError) -> NoReturn:
        # At the item's place; pytest.skip() would name this line as the reason's.
        raise pytest.skip.Exception(f"{self._short}: {reason}", _use_item_location=True) from None

    @property
    def _short(self) -> str:
        return f"{self.machine}::{self.name}"

    def _off_line(self) -> str:
        return (
            f"If that is meant: nixvm_check_off = {self.machine}: {self.name}: WHY "
            "(in pytest's ini file) turns this check off."
        )

    def _tell(self, notes: Sequence[str]) -> None:
        for note in notes:
            self.add_report_section("call", "nixvm", note)
            try:
                warnings.warn_explicit(f"{self.nodeid}: {note}", CheckWarning, PREFIX, 0)
            except CheckWarning:  # -W error: what is no defect does not become one
                continue

    @property
    def _checked(self) -> Checked:
        made: Checked | None = self.__dict__.get("_made")
        if made is None:
            from pytest_nixvm.checks import Checked

            made = Checked(
                self.machine, self.config.stash[RUN].fleet, self._start, self.parent.memory
            )
            self.__dict__["_made"] = made
        return made

    def _start(self, what: str | None) -> Machine:
        """Return the VM: that of the machine's checks, this one's own, or that of a few."""
        scope = self.parent.nodeid if self.check.shared else self.nodeid
        if what is not None:
            scope = f"{self.parent.nodeid} {what}"
        checked = self._checked

        def acquire() -> Machine:
            run = self.config.stash[RUN]
            self.parent.scopes.add(scope)
            machine = run.fleet.acquire(self.machine, run.request(self), scope)
            run.used(self, machine, fresh=False)
            return machine

        # Only a failure is remembered: a VM that has ended is replaced. What does not boot for one
        # check does not for another.
        failed = "unbootable"
        if failed in self.parent.memory:
            checked.once(failed, acquire)
        try:
            return acquire()
        except NixvmError as error:
            from pytest_nixvm.checks.base import Failed

            self.parent.memory[failed] = Failed(error)
            raise

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Show where a user's own check has failed, and nothing of what has called it."""
        code = getattr(self.check.run, "__code__", None)
        if code is not None and not isinstance(excinfo.value, NixvmError):
            excinfo.traceback = excinfo.traceback.cut(path=code.co_filename)
        return super().repr_failure(excinfo, style)
