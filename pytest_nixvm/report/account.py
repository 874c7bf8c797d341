"""What a run's VMs came to: what was booted, cloned and kept, from this process and from others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

NO_ENTROPY = "none"
"""As `guest.waking` has it, which a run without VMs need not import."""

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_nixvm.machine import Machine


@dataclass
class Account:
    """The numbers of a run. All of it is plain data, for xdist's workers to tell."""

    booted: list[dict[str, Any]] = field(default_factory=list)
    cloned: dict[str, list[float]] = field(default_factory=dict)  # machine -> seconds of each
    unfreezable: dict[str, str] = field(default_factory=dict)  # machine -> why it has no template
    alike: dict[str, None] = field(default_factory=dict)  # clones with the same random numbers
    overrides: dict[str, list[str]] = field(default_factory=dict)
    kept: list[list[str]] = field(default_factory=list)  # how to get into each VM that is left
    notes: list[str] = field(default_factory=list)  # what else the user should know

    def add(self, machine: Machine) -> None:
        """Take in a VM that is about to end."""
        first = machine.build.name not in self.overrides
        self.overrides[machine.build.name] = [
            f"{each.option} = {each.value} ({each.reason})" for each in machine.build.overrides
        ]
        if machine.template is not None:
            if machine.template.facts["entropy"] == NO_ENTROPY:
                self.alike[machine.build.name] = None
            if machine.woken_in > 0 and not machine.frozen:  # that one is no test's
                self.cloned.setdefault(machine.build.name, []).append(machine.woken_in)
            if not machine.boots:
                return
        self.booted.append(
            {
                "name": machine.build.name,
                "accelerator": machine.spec.accelerator.name,
                "evaluated": machine.build.evaluated if first else 0.0,
                "built": machine.build.built if first else 0.0,
                "boots": [boot.seconds for boot in machine.boots],
                "frozen": machine.frozen,
                "failed_units": [unit for boot in machine.boots[-1:] for unit in boot.failed_units],
                "commands": machine.commands_note,
                "output": str(machine.output),
            }
        )

    def shows(self, output: Path) -> bool:
        """Whether the summary names a machine's output directory."""
        return any(each["output"] == str(output) for each in self.booted)

    def told(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self)

    def hear(self, told: dict[str, Any]) -> None:
        """Take in what another process has told."""
        self.booted += told["booted"]
        for name, seconds in told["cloned"].items():
            self.cloned.setdefault(name, []).extend(seconds)
        self.unfreezable |= told["unfreezable"]
        self.alike |= told["alike"]
        self.overrides |= told["overrides"]
        self.kept += told["kept"]
        self.notes += told["notes"]
