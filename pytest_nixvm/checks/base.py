"""What a check is, and what it is given. Knows no pytest."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pytest_nixvm.errors import CheckFailedError, MachineError, NixvmError

if TYPE_CHECKING:
    from pytest_nixvm.flake.build import VmBuild
    from pytest_nixvm.flake.declared import Declared
    from pytest_nixvm.fleet import Fleet
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.settings import Settings

Kept = TypeVar("Kept")


class DoesNotApply(NixvmError):
    """A check has nothing to look at on this machine: it is skipped, with this reason."""


class ToldError(MachineError):
    """What an earlier check of the same machine has told in full."""


@dataclass(frozen=True)
class Check:
    """A check: `run` raises `CheckFailedError`, or fails an `assert`, where a machine is not right.

    What it does is its docstring. Checks that are `shared` only look, and a machine's have one VM;
    the others get one of their own. One of a `change` needs --nixvm-from.
    """

    name: str  # ports: the end of `nixvm::dev-vm::ports`
    run: Callable[[Checked], None]
    shared: bool = True
    change: bool = False

    @property
    def doc(self) -> str:
        """What it checks."""
        return (self.run.__doc__ or "").strip()


class Checked:
    """The machine that a check looks at.

        def no_swap(checked):
            if checked.vm.succeed("swapon --show"):
                raise CheckFailedError(f"{checked.name} swaps.")

    Everything is had when it is first asked for: the VM boots, the configuration is evaluated.
    """

    def __init__(
        self,
        name: str,
        fleet: Fleet,
        start: Callable[[str | None], Machine],
        memory: dict[str, object],
    ) -> None:
        self.name = name
        self.fleet = fleet
        self.notes: list[str] = []
        self._start = start
        self._memory = memory

    @property
    def vm(self) -> Machine:
        """The machine, booted: shared with the machine's other checks, or the check's own."""
        return self._start(None)

    def vm_for(self, what: str) -> Machine:
        """Return the VM of those checks that do `what` with it, a fresh one if it has ended."""
        return self._start(what)

    @property
    def build(self) -> VmBuild:
        """What the machine was built of."""
        return self.vm.build

    @property
    def settings(self) -> Settings:
        """What the user asked for."""
        return self.fleet.settings

    @property
    def declared(self) -> Declared:
        """What the machine's configuration declares. Raises `FlakeError`."""
        return self.fleet.declared(self.name)

    @property
    def isolated(self) -> bool:
        """Whether the machine's VMs reach no network."""
        return self.settings.network != "nat"

    def warn(self, text: str) -> None:
        """Say something that is no defect of the machine: it is shown with pytest's warnings."""
        self.notes.append(text)

    def once(self, key: str, make: Callable[[], Kept]) -> Kept:
        """Return what `make` returns, called once for all checks of the machine in this session.

        What it raised is raised for the later ones as well, in short.
        """
        if key not in self._memory:
            try:
                self._memory[key] = make()
            except NixvmError as error:
                self._memory[key] = Failed(error)
                raise
        found = self._memory[key]
        if isinstance(found, Failed):
            raise found.again()
        return found  # type: ignore[return-value] # the key says what it is


class Failed:
    """An error that several checks meet: told in full once, in short to the others."""

    def __init__(self, error: NixvmError) -> None:
        self.error = error

    def again(self) -> NixvmError:
        """Return the error for a later check."""
        from pytest_nixvm.errors import NothingToTestError

        if isinstance(self.error, DoesNotApply | NothingToTestError):
            return type(self.error)(str(self.error))
        first = (str(self.error).splitlines() or [type(self.error).__name__])[0]
        return ToldError(f"not looked at, an earlier check has met this: {first}")


def finding(head: str, *parts: str, todo: str = "") -> CheckFailedError:
    """Build a check's error: what is wrong, what was found (indented), what to do about it."""
    lines = [head, *(textwrap.indent(part.rstrip(), "  ") for part in parts if part.strip())]
    return CheckFailedError("\n".join([*lines, *([todo] if todo else [])]))


def and_more(names: Iterable[str], at_most: int = 8) -> str:
    """Return names as a person lists them, the first few of many."""
    every = list(names)
    more = f" and {len(every) - at_most} more" if len(every) > at_most else ""
    return ", ".join(every[:at_most]) + more
