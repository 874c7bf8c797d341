"""Changes of a fleet's machines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pytest_nixvm.deployments import NO_BASE, Deployments
from pytest_nixvm.errors import ChangeError
from pytest_nixvm.settings import Generations, MachineRequest

if TYPE_CHECKING:
    from pytest_nixvm.change import Change
    from pytest_nixvm.machine import Machine


class Changes(Deployments, ABC):
    """Deployments of which VMs can be had."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._candidates: WeakKeyDictionary[Machine, str] = WeakKeyDictionary()

    @abstractmethod
    def _request(
        self,
        memory: int | None = None,
        cores: int | None = None,
        network: str | None = None,
        boot_loader: bool | None = None,
    ) -> MachineRequest:
        """Return what is asked of a machine, with the settings where nothing is given."""

    @abstractmethod
    def _fresh(self, name: str, request: MachineRequest, *, shared: bool) -> Machine:
        """Return a machine that is ready and was used by nobody."""

    def change(
        self,
        name: str,
        *,
        base: str | None = None,
        candidate: str | None = None,
        beside: Sequence[str] = (),
        memory: int | None = None,
        cores: int | None = None,
        network: str | None = None,
        boot_loader: bool | None = None,
    ) -> Change:
        """Return a change of a machine: its deployed generation runs, the candidate is at hand.

            change = nixvm.change("web", base="HEAD~1")     # to the flake as it is
            change.switch()

        `base` and `candidate` are flake references, or revisions of the flake under test, which is
        the candidate if none is given; the base is then --nixvm-from's. `beside` are further
        candidates: changes to any of these start from the same frozen machine. The machine lasts
        until the session ends, or `change.vm` is used in a `with`.

        Raises `ChangeError` if the two can't be compared, `NothingToTestError` if there is nothing
        to switch, and as `start` does.
        """
        base = base or self.settings.from_
        if base is None:
            raise ChangeError(NO_BASE)
        candidate = candidate or self.under_test
        request = replace(
            self._request(memory, cores, network, boot_loader),
            generations=Generations.of(base, candidate, *beside),
        )
        return self.change_of(self._fresh(name, request, shared=False), request, candidate)

    def change_of(self, machine: Machine, request: MachineRequest, candidate: str) -> Change:
        """Return the change of a machine that runs the base of `request.generations`."""
        from pytest_nixvm.change import Change

        name, base = machine.name, machine.build
        self._candidates[machine] = candidate
        new = self.candidate(name, candidate, base, boot_loader=request.boot_loader)
        deployed = request.generations.base if request.generations is not None else candidate
        return Change(
            machine, base, new, partial(self.difference, name, deployed, candidate, base, new)
        )

    def is_under_test(self, machine: Machine) -> bool:
        """Whether a test of this machine is one of the flake as it is.

        It is not where a generation runs that is to be changed to another one: a revision, or a
        flake of the test's own.
        """
        candidate = self._candidates.get(machine)
        if candidate is None:
            return not machine.build.carries
        return candidate == self.under_test
