"""Which test runs on which machine, and what these need before the first of them runs."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_nixvm.errors import NothingToTestError, SettingsError, UserError
from pytest_nixvm.items import (
    PARAMETER,
    Mistake,
    is_change,
    is_check,
    item_machines,
    marked_machines,
    prepared_machines,
)
from pytest_nixvm.settings import MachineRequest, Settings

if TYPE_CHECKING:
    from pytest_nixvm.flake.build import MachineInfo
    from pytest_nixvm.fleet import Fleet


class Selection(ABC):
    """What a run knows of its tests before they run."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.config = config
        self.settings = settings
        self._problems: list[str] = []
        self._prepared: set[tuple[str, MachineRequest | None]] = set()

    @property
    @abstractmethod
    def fleet(self) -> Fleet:
        """The run's fleet, made when it is first needed."""

    @property
    def is_worker(self) -> bool:
        """Whether this process is one of xdist's workers."""
        return hasattr(self.config, "workerinput")

    @property
    def is_controller(self) -> bool:
        """Whether this process hands the tests to xdist's workers."""
        return self.config.pluginmanager.hasplugin("dsession")

    @abstractmethod
    def expect(self, names: Iterable[str]) -> None:
        """Take note that these machines are about to be tested."""

    # --- which test runs on which machine --------------------------------------------------------

    def parametrize(self, metafunc: pytest.Metafunc) -> None:
        """Give a test its machines: the marker's, else every selected one.

        Mistakes are kept for `check`: raised from here they would end in a traceback.
        """
        names = marked_machines(metafunc.definition)
        found: dict[str, MachineInfo | None] = {}
        if not self._problems:
            try:
                # Those that are unchanged as well: `is_selected` leaves them out, and it is said.
                names = [
                    each
                    for name in names or [machine.name for machine in self.fleet.selected]
                    for each in self.fleet.chosen(name)
                ]
                found = {name: self.fleet.machine(name) for name in names}
            except UserError as error:
                self._problems.append(str(error))
        parameters = []
        for name in dict.fromkeys(names):
            info = found.get(name)
            skip = info.skip if info is not None else None
            marks = [pytest.mark.skip(reason=f"{name}: {skip}")] if skip else []
            parameters.append(pytest.param(name, id=name, marks=marks))
        metafunc.parametrize(PARAMETER, parameters, indirect=True, scope="session")

    def is_selected(self, item: pytest.Item) -> bool:
        """Whether --nixvm-machine and --nixvm-changed select a test, by its machines.

        One of several machines needs the others: it is left out with any of them that is not
        selected by name, but only if all of them are unchanged.
        """
        names = item_machines(item)
        if not names or self._problems or not (self.settings.machine or self.settings.changed):
            return True
        # Not at the top: without --nixvm-flake nothing of it is needed.
        from pytest_nixvm.flake.images import plain

        try:
            every = {name for name in names if self.fleet.machine(name) is not None}
            selected = {machine.name for machine in self.fleet.selected}
            unchanged = set(self.fleet.unchanged)
        except UserError as error:
            self._problems.append(str(error))
            return True
        # A name that nobody knows is not left out: `check` says that it is wrong.
        if every.isdisjoint(names):
            return True
        # An image is not selected unless it is named, and it changes with its machine.
        by_name = not self.settings.machine or selected.issuperset(names)
        return by_name and not all({name, plain(name)} & unchanged for name in names)

    def mistake(self, error: UserError) -> None:
        """Keep a mistake for `check`: raised while collecting it would end in a traceback."""
        self._problems.append(str(error))

    def check(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Raise `pytest.UsageError` for the mistakes that were found while collecting."""
        if not self._problems:
            for item in items:
                try:
                    self._check(item)
                except UserError as error:
                    self._problems.append(str(error))
        if self._problems:
            message = "\n".join(dict.fromkeys(self._problems))
            items.clear()
            if not self.is_worker:
                raise pytest.UsageError(message)
            items.append(Mistake.from_parent(session, name=message))

    def _check(self, item: pytest.Item) -> None:
        names = item_machines(item)
        if names or item.get_closest_marker("nixvm"):
            self.request(item)
        if not names:
            return
        every = [machine.name for machine in self.fleet.every_machine]
        for name in names:
            if self.fleet.machine(name) is None:
                near = difflib.get_close_matches(name, every, 1)
                meant = f" Did you mean {near[0]!r}?" if near else ""
                where = item.nodeid.partition("[")[0]
                by = "its template" if name in prepared_machines(item) else "the nixvm marker"
                raise SettingsError(
                    f"{where}: {by} names {name!r}, which is no machine of "
                    f"{self.settings.flake}.{meant} Its machines: {', '.join(every)}."
                )
        if is_change(item):
            for name in names:
                self.fleet.check_base(name)

    def request(self, item: pytest.Item) -> MachineRequest:
        """Return what a test asks of its VM. Raises `SettingsError`."""
        keywords: dict[str, object] = {}
        for marker in reversed(list(item.iter_markers("nixvm"))):
            keywords.update(marker.kwargs)
        return MachineRequest.read(keywords, self.settings, item.nodeid)

    @property
    def nothing_changed(self) -> bool:
        """Whether tests were left out because their machines are the same as in --nixvm-changed."""
        return "fleet" in self.__dict__ and bool(self.fleet.__dict__.get("unchanged"))

    # --- before the tests ------------------------------------------------------------------------

    def prepare(self, items: Sequence[pytest.Item]) -> None:
        """Build what these tests need. Raises `pytest.UsageError`."""
        if self.is_worker or self.is_controller:
            return
        self._prepare(
            dict.fromkeys(
                (name, request)
                for item in items
                # A check says by itself that its machine can't be built; others go on.
                if item.get_closest_marker("skip") is None and not is_check(item)
                for request in self._requests(item)
                for name in item_machines(item)
            )
        )

    def _requests(self, item: pytest.Item) -> list[MachineRequest]:
        """Return what a test asks of each of its machines: as it is, or as it is deployed."""
        request = replace(self.request(item), user=None)
        names = getattr(item, "fixturenames", ())
        if "change" not in names:
            return [request]
        plain = [request] if {"vm", "machines"} & set(names) else []
        generations = self.fleet.generations()
        return plain + ([replace(request, generations=generations)] if generations else [])

    def prepare_ids(self, ids: Iterable[str]) -> None:
        """Build what the tests of these node ids need: a controller has no more than ids.

        Raises `pytest.UsageError`, also for the mistake that a worker reports as an id.
        """
        # A check builds its machine itself, so that those of others go on if that fails.
        text = "\n".join(each for each in ids if not each.startswith("nixvm::"))
        if text.startswith(Mistake.PREFIX):
            raise pytest.UsageError(text.removeprefix(Mistake.PREFIX))
        self._prepare((name, None) for name in self.named_in(text))

    def named_in(self, ids: str) -> list[str]:
        """Return the machines that node ids, a line each, show to be tested."""
        if self.settings.flake is None:
            return []
        testable = [machine.name for machine in self.fleet.machines if machine.skip is None]
        if "@" in ids:
            from pytest_nixvm.flake.images import NAMES

            plain = [each.name for each in self.fleet.every_machine if each.skip is None]
            testable += [f"{name}@{form}" for name in plain for form in NAMES]
        return [
            name
            for name in dict.fromkeys(testable)
            if re.search(rf"([\[+-]|::){re.escape(name)}(?!-efi)([\]+-]|::)", ids)
        ]

    def _prepare(self, needed: Iterable[tuple[str, MachineRequest | None]]) -> None:
        needed = list(needed)
        try:
            if needed:
                self.expect(name for name, _ in needed)
            for name, request in needed:
                if (name, request) not in self._prepared:
                    self._prepared.add((name, request))
                    with suppress(NothingToTestError):  # its tests are skipped, with the reason
                        self.fleet.prepare(name, request)
        except UserError as error:
            raise pytest.UsageError(str(error)) from error
