"""What a switch, a rollback or a reboot into another generation has done, as values and as text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pytest_nixvm.errors import tail
from pytest_nixvm.guest.switching import DryRun, Outcome, Switched, explain
from pytest_nixvm.guest.unit_states import Happened

Mode = Literal["switch", "test", "boot"]
"""As nixos-rebuild has them: activate and boot by default; activate only; boot by default only."""

SHOWN_LINES = 40
"""Lines of switch-to-configuration's output that a text has: its end."""

_HASH = re.compile(r"^[0-9a-z]{32}-")


@dataclass(frozen=True)
class UnitFailure:
    """A unit that has failed: why by systemd's account, and its status and journal's end."""

    name: str
    result: str  # exit-code, timeout, signal, oom-kill, …
    report: str

    def text(self) -> str:
        """Return it as a person reads it."""
        return f"{self.name} ({self.result})\n{_indent(self.report)}"


@dataclass(frozen=True)
class SwitchResult:
    """A switch: how it ended, what it said, what happened. `str(result)` is all of it."""

    machine: str
    mode: str  # a `Mode`, or "dry-activate" where that was refused
    into: Path  # the toplevel, a specialisation's own
    outcome: Outcome
    returncode: int | None  # None if it did not end, or nobody can tell
    output: str
    seconds: float
    generation: str = ""  # "candidate", "base", or the toplevel's name where it is neither
    told: Switched = field(default_factory=Switched)
    promised: DryRun | None = None  # by a dry run just before; None for the mode "boot"
    happened: Happened = field(default_factory=Happened)
    surprises: tuple[str, ...] = ()  # where what happened is not what was promised
    failed_units: tuple[str, ...] = ()  # all that are failed now
    failed_before: tuple[str, ...] = ()
    newly_failed: tuple[UnitFailure, ...] = ()  # that were not before
    lost_channels: tuple[str, ...] = ()  # "ssh: …": worked before, and does not any more
    ignored: tuple[str, ...] = ()  # what systemd has read by it, and silently does not obey
    remarks: tuple[str, ...] = ()  # what is no fault, and good to know
    reboot_reasons: tuple[str, ...] = ()  # what is used after the next reboot only

    @property
    def ok(self) -> bool:
        """Whether it went through, no unit failed, nothing is ignored, every way in still works.

        switch-to-configuration also tells of units that had failed before and fail again: those are
        no fault of this switch, whatever its exit status.
        """
        went = self.outcome is Outcome.DONE or self.failed_as_before
        return went and not (self.newly_failed or self.lost_channels or self.ignored)

    @property
    def failed_as_before(self) -> bool:
        """Whether all that failed are units that had failed before the switch."""
        told = self.told
        failed = {*told.failed, *told.jobs_failed}
        return (
            self.outcome is Outcome.UNITS_FAILED
            and bool(failed)
            and failed <= set(self.failed_before)
            and not told.activation_failed
            and not told.users_failed
        )

    @property
    def needs_reboot(self) -> bool:
        """Whether some of it, or all of it, takes effect after a reboot only."""
        return bool(self.reboot_reasons)

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Return all of it for somebody who did not write the change: the verdict comes first."""
        code = "no exit status" if self.returncode is None else f"exit status {self.returncode}"
        parts = [
            f"{self.machine}, {_VERBS[self.mode]} {_named(self.generation, self.into)}: "
            f"{self.verdict}.",
            f"(switch-to-configuration {self.mode}: {code}, {self.seconds:.1f} s; {self.into})",
        ]
        if self.lost_channels:
            parts.append("What worked before the switch, and does not any more:")
            parts += [_item(channel) for channel in self.lost_channels]
        if self.newly_failed:
            parts.append("Units that failed, and had not before:")
            parts += [_indent(failure.text()) for failure in self.newly_failed]
        parts += _listed("Not as the dry run had promised:", self.surprises)
        parts += _listed("Silently ignored, only the journal says so:", self.ignored)
        parts += _listed("In effect only after a reboot:", self.reboot_reasons)
        parts += _listed("Note:", self.remarks)
        parts += self._done()
        if old := [name for name in self.failed_units if name in self.failed_before]:
            parts.append(f"Failed already before: {', '.join(old)}.")
        if self.output.strip():
            parts.append("What switch-to-configuration said:")
            parts.append(_indent(tail(self._said(), SHOWN_LINES)))
        return "\n".join(parts)

    @property
    def verdict(self) -> str:
        """How it went, in one clause for a person."""
        troubles = []
        if self.newly_failed:
            troubles.append(f"{', '.join(each.name for each in self.newly_failed)} failed")
        for channel in self.lost_channels:
            name = channel.partition(":")[0]
            troubles.append(_LOST.get(name, f"{name} can't be reached any more"))
        if self.ignored:
            some = "a setting is" if len(self.ignored) == 1 else f"{len(self.ignored)} settings are"
            troubles.append(f"{some} silently ignored")
        if self.outcome is Outcome.UNITS_FAILED and self.newly_failed:
            return ", and ".join(troubles)
        verdict = explain(self.outcome, self.told, self.returncode)
        if self.failed_as_before:
            verdict = f"{Outcome.DONE.value}, with units that had failed before"
        return ", but ".join([verdict, ", and ".join(troubles)] if troubles else [verdict])

    def _said(self) -> str:
        """Return the output, without what it has of units that are told of above."""
        lines = self.output.rstrip().splitlines()
        for number, line in enumerate(lines):
            if line.startswith("warning: the following units failed: "):
                return "\n".join(lines[: number + 1])
        return "\n".join(lines)

    def _done(self) -> list[str]:
        became = self.happened
        lines = [
            f"  {what}: {', '.join(names)}"
            for what, names in (
                ("stopped", became.stopped),
                ("restarted", became.restarted),
                ("reloaded", became.reloaded),
                ("started", became.started),
                ("changed, and left running as it was", self.told.kept),
            )
            if names
        ]
        if lines:
            return ["What happened to units:", *lines]
        return ["It touched no unit."] if self.outcome is Outcome.DONE and self.promised else []


@dataclass(frozen=True)
class Rebooted:
    """A reboot into the generation that is the default; `str(rebooted)` is all of it."""

    machine: str
    how: Literal["boot loader", "direct"]  # direct: QEMU was started with that system's kernel
    into: Path
    generation: str  # "candidate", "base", or the toplevel's name where it is neither
    seconds: float
    failed_units: tuple[UnitFailure, ...] = ()  # that were not failed before

    @property
    def ok(self) -> bool:
        """Whether no unit failed that had not before."""
        return not self.failed_units

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Return all of it for a person."""
        way = (
            "through its boot loader"
            if self.how == "boot loader"
            else "started by QEMU with that system's kernel, on the same disk; the boot loader "
            "was not tested"
        )
        failed = ", ".join(failure.name for failure in self.failed_units)
        verdict = f"{failed} failed, and had not before" if failed else "all is well"
        return "\n".join(
            [
                f"{self.machine}, reboot into {_named(self.generation, self.into)}: {verdict}.",
                f"({way}; {self.seconds:.1f} s; {self.into})",
                *(_indent(failure.text()) for failure in self.failed_units),
            ]
        )


_VERBS = {
    "switch": "switch into",
    "test": "switch (not for the next boot) into",
    "boot": "default for the next boot,",
    "dry-activate": "dry run of a switch into",
}

_LOST = {
    "ssh": "nobody can log in over SSH any more",
    "agent": "its guest agent does not answer any more",
    "shell": "no shell can be started in it any more",
}

_GENERATIONS = {"candidate": "the candidate", "base": "the deployed generation"}


# What only the next boot uses: a file of the toplevel, and how it is called.
_BOOTED = (
    ("kernel", "the kernel"),
    ("initrd", "the initrd"),
    ("kernel-params", "the kernel's parameters"),
)


def reboot_reasons(mode: str, outcome: Outcome, booted: Path, system: Path) -> tuple[str, ...]:
    """Say what of a system takes effect after the next reboot only; `booted` is what has booted."""
    if outcome is Outcome.NEEDS_REBOOT:
        return ("all of it: the running init can't be switched",)
    if mode == "boot" and outcome is Outcome.DONE:
        return ('all of it: that is what mode="boot" is for',)
    if not outcome.activated:
        return ()
    return tuple(
        what for file, what in _BOOTED if _content(booted / file) != _content(system / file)
    )


def _content(path: Path) -> str:
    """Return where a link of a toplevel leads to, or what the file says."""
    if path.is_symlink() or not path.is_file():
        return str(path.resolve()) if path.exists() else ""
    return path.read_text(errors="replace")


def system_name(toplevel: Path) -> str:
    """Return a toplevel's name without the hash."""
    if toplevel.parent.name == "specialisation":
        return f"the specialisation {toplevel.name}"
    return _HASH.sub("", toplevel.name)


def _named(generation: str, system: Path) -> str:
    if generation not in _GENERATIONS or system.parent.name == "specialisation":
        return system_name(system)
    return f"{_GENERATIONS[generation]}, {system_name(system)}"


def _listed(head: str, items: Iterable[str]) -> list[str]:
    lines = [_item(each) for each in items]
    return [head, *lines] if lines else []


def _item(text: str) -> str:
    return "  - " + text.rstrip().replace("\n", "\n    ")


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines())
