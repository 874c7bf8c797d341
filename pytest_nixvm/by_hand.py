"""What a person or a script does with a fleet's machines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.settings import MachineRequest, Settings

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine


class ByHand(ABC):
    """Scripts of the NixOS test driver, and a look around."""

    settings: Settings

    @abstractmethod
    def _request(self) -> MachineRequest:
        """Return what the settings ask of a machine."""

    @abstractmethod
    def _to_start(self, name: str, request: MachineRequest) -> Machine:
        """Return a machine that is off, for somebody who is going to start it."""

    @abstractmethod
    def keep(self, machine: Machine) -> None:
        """Leave a VM running when the session ends."""

    @abstractmethod
    def end(self, machine: Machine) -> None:
        """End a machine and remove what it has on disk."""

    def run_test_script(
        self,
        text: str | Path,
        machines: Mapping[str, str | Machine] | Sequence[str | Machine],
        *,
        name: str = "testScript",
    ) -> None:
        """Run a script of the NixOS test driver, a `testScript`, as it is.

            nixvm.run_test_script(text, ["dev-vm", "test-vm"])       # VMs of its own, by name
            nixvm.run_test_script(text, {"machine": vm})             # a VM that is there already

        A name of the flake's is a VM of the script's own: started when the script first uses it,
        ended with the script. `text` may be a file's path. The script's output goes to stdout;
        `name` stands in tracebacks. Raises `ScriptError` for a syntax error in the script, and
        whatever the script raises.
        """
        from pytest_nixvm import script

        __tracebackhide__ = True  # the script's own lines are what its author reads
        made: list[Machine] = []

        def make(machine: str) -> Machine:
            made.append(self._to_start(machine, self._request()))
            return made[-1]

        try:
            script.run(text, script.makers(machines, make), name)
        except BaseException:
            if self.settings.keep == "failed":
                for machine in made:
                    self.keep(machine)
            raise
        finally:
            for machine in made:
                self.end(machine)

    def interact(self, machine: Machine) -> None:
        """Open a shell in a VM on this terminal, for a look around; `pytest -s` has one.

        Raises `MachineError` where there is no terminal.
        """
        from pytest_nixvm import interact

        interact.shell(machine)
