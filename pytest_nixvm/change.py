"""The change itself: from the deployed generation to the candidate, in one VM, and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pytest_nixvm.change_result import (
    Mode,
    Rebooted,
    SwitchResult,
    system_name,
)
from pytest_nixvm.change_switch import Switcher
from pytest_nixvm.errors import (
    MachineError,
    SwitchError,
)
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.guest.switch_job import PROFILE, Profile, resolve
from pytest_nixvm.guest.switching import DryRun, Outcome, outcome, parse_dry_run, parse_switch

if TYPE_CHECKING:
    from pytest_nixvm.flake.build import VmBuild
    from pytest_nixvm.flake.difference import Difference
    from pytest_nixvm.machine import Machine

SWITCH_TIMEOUT = 600.0
"""Seconds that a switch may take."""

_CURRENT = "/run/current-system"


class Change:
    """A machine that runs its deployed generation, and has the candidate's closure in its store.

        def test_the_till_survives_the_update(change):
            change.before.succeed("till sell 3 apples")
            assert "till.service" in change.dry_activate().restarted
            change.switch()
            assert "3 apples" in change.vm.succeed("till list")
            change.reboot()
            change.rollback()

    `vm` is the machine, whatever it runs; `before` is the same machine, and may be used only while
    it runs the deployed generation. `results` has what was done, in order. `switch`, `rollback`,
    `specialisation` and `reboot` raise `SwitchError` with all that there is to know when something
    is not as it should be, unless `check` is false. All times are in seconds.
    """

    def __init__(
        self,
        vm: Machine,
        base: VmBuild,
        candidate: VmBuild,
        difference: Callable[[], Difference],
    ) -> None:
        self.vm = vm
        self.base = base
        self.candidate = candidate
        self.results: list[SwitchResult | Rebooted] = []
        self._difference = difference
        self._switcher = Switcher(vm)
        self._diff: Difference | None = None
        self._switched = False
        self._booted = _toplevel(base)  # of which the kernel runs
        self._generation = _toplevel(base)  # that runs, without its specialisation
        self._default = _toplevel(base)  # what the boot loader was told
        self._profile = ""  # what we have made the profile

    def __repr__(self) -> str:
        return f"<Change of {self.vm.name} into {system_name(_toplevel(self.candidate))}>"

    # --- what there is -------------------------------------------------------------------------

    @property
    def before(self) -> Machine:
        """The machine while it runs the deployed generation; `MachineError` once it does not."""
        if self._switched:
            raise MachineError(
                f"{self.vm.name} has been switched already: change.before is for what is done "
                "under the deployed generation. Use change.vm."
            )
        return self.vm

    @property
    def diff(self) -> Difference:
        """What differs between the deployed generation and the candidate."""
        if self._diff is None:
            self._diff = self._difference()
        return self._diff

    @property
    def current(self) -> Path:
        """The toplevel that runs: /run/current-system."""
        return Path(resolve(self._run, _CURRENT))

    @property
    def default(self) -> Path:
        """The toplevel that the next boot is into.

        It is the profile's, unless a switch was refused before the boot loader heard of it.
        """
        found = resolve(self._run, PROFILE)
        return self._default if found in ("", self._profile) else Path(found)

    # --- what is done --------------------------------------------------------------------------

    def dry_activate(self, specialisation: str | None = None) -> DryRun:
        """Ask the candidate what a switch would do to the units. Nothing is changed.

        Raises `SwitchError` if a pre-switch check refuses it.
        """
        system = self._system(_toplevel(self.candidate), specialisation)
        with self.vm.transcript.note("switch", f"dry-activate {system_name(system)}"):
            done = self._switcher.dry_run(system)
        text = done.stdout + done.stderr
        if done.ok:
            return parse_dry_run(text)
        result = SwitchResult(
            machine=self.vm.name,
            mode="dry-activate",
            into=system,
            outcome=outcome(done.returncode, text),
            returncode=done.returncode,
            output=text,
            seconds=done.duration,
            generation=self._name(system),
            told=parse_switch(text),
        )
        raise SwitchError(result.text(), result=result)

    def switch(
        self,
        mode: Mode = "switch",
        *,
        check: bool = True,
        timeout: float = SWITCH_TIMEOUT,
        specialisation: str | None = None,
    ) -> SwitchResult:
        """Switch to the candidate as `nixos-rebuild switch` (test, boot) does, and say what it did.

        "switch" activates it and makes it the default for the next boot, "test" only activates it,
        "boot" only makes it the default. Before, a dry run is asked what it promises. The switch is
        not ended when it takes longer than `timeout`: it is `Outcome.UNFINISHED` then.
        """
        if mode not in get_args(Mode):
            raise MachineError(f"switch: {mode!r} is not one of {', '.join(get_args(Mode))}.")
        generation = _toplevel(self.candidate)
        system = self._system(generation, specialisation)
        if mode != "test":
            self._make_generation(generation)
        return self._do(mode, generation, system, check, timeout)

    def specialisation(
        self, name: str, *, check: bool = True, timeout: float = SWITCH_TIMEOUT
    ) -> SwitchResult:
        """Switch to a specialisation of the generation that runs; the next boot's stays as it is.

        As `/run/current-system/specialisation/NAME/bin/switch-to-configuration test`, also from
        within another specialisation.
        """
        system = self._system(self._generation, name)
        return self._do("test", self._generation, system, check, timeout)

    def rollback(self, *, check: bool = True, timeout: float = SWITCH_TIMEOUT) -> SwitchResult:
        """Switch back to the generation before, as `nixos-rebuild switch --rollback` does.

        After `switch("test")`, which makes no generation, that is the deployed one. Raises
        `MachineError` if there is none before.
        """
        profile = Profile(self._run, self.vm.name)
        base = _toplevel(self.base)
        found = profile.resolved()
        if found not in ("", str(base)):
            profile.rollback()
            self._profile = profile.resolved()
        elif self.current == base:
            raise MachineError(
                f"There is nothing to roll back: {self.vm.name} runs its deployed generation."
            )
        system = Path(self._profile or base)
        return self._do("switch", system, system, check, timeout)

    def reboot(self, timeout: float | None = None, *, check: bool = True) -> Rebooted:
        """Reboot into what is the default now, and see that it runs.

        Through the machine's boot loader if it is built with one; else the machine is shut down and
        started with that system's kernel, on the same disk: `Rebooted.how` tells. Raises
        `MachineError` if neither build is the default, `BootError` if it does not boot,
        `SwitchError` if it is something else that boots, or with `check` if units fail that had not
        before.
        """
        began = time.monotonic()
        default = self.default
        failed = set(self.vm.failed_units())
        self._switched = self._switched or default != _toplevel(self.base)
        with self.vm.transcript.note("switch", f"reboot into {system_name(default)}"):
            if self.base.boot_loader:
                self.vm.reboot(timeout)
            else:
                self._start_anew(default)
        current = self.current
        where = self._name(current)
        fresh = [name for name in self.vm.failed_units() if name not in failed]
        result = Rebooted(
            machine=self.vm.name,
            how="boot loader" if self.base.boot_loader else "direct",
            into=current,
            generation=where,
            seconds=time.monotonic() - began,
            failed_units=self._switcher.failures(fresh),
        )
        self.results.append(result)
        self._booted = current
        self._generation = self._default = default if _is(current, default) else current
        if not _is(current, default):
            raise SwitchError(
                f"{self.vm.name} has booted {current} ({where}), though {default} "
                f"({self._name(default)}) is the default: its boot loader was not told, or did not "
                "obey.",
                result=result,
            )
        if check and not result.ok:
            raise SwitchError(result.text(), result=result)
        return result

    # --- a switch ------------------------------------------------------------------------------

    def _do(
        self, mode: str, generation: Path, system: Path, check: bool, timeout: float
    ) -> SwitchResult:
        activates = mode != "boot"
        switched = self._switched
        title = f"{mode} {system_name(system)}"
        step = self.vm.progress.step(f"{self.vm.name}: {title}")
        try:
            with self.vm.transcript.note("switch", title) as entry:
                self._switched = self._switched or activates
                result = self._switcher.switch(mode, system, timeout, booted=self._booted)
                result = replace(result, generation=self._name(system))
                entry.ok = result.ok
                entry.outcome = result.text().splitlines()[0]
                entry.output(result.output, "")
        except BaseException as error:
            step.fail(str(error).partition("\n")[0])
            raise
        if result.outcome.refused or result.outcome is Outcome.NEEDS_REBOOT:
            self._switched = switched
        (step.finish if result.ok else step.fail)(result.verdict)
        self.results.append(result)
        if mode != "test" and not result.outcome.refused:
            self._default = generation
        if activates and result.outcome.activated:
            self._generation = generation
        if check and not result.ok:
            raise SwitchError(result.text(), result=result)
        return result

    # --- generations ---------------------------------------------------------------------------

    def _run(self, command: Command, timeout: float) -> CommandResult:
        return self.vm.run(command, timeout=timeout)

    def _system(self, generation: Path, specialisation: str | None) -> Path:
        """Return the toplevel of a generation, or of its specialisation."""
        if specialisation is None:
            system = generation
        else:
            system = generation / "specialisation" / specialisation
            place = generation / "specialisation"
            names = sorted(each.name for each in place.iterdir()) if place.is_dir() else []
            if specialisation not in names:
                there = ", ".join(names) or "none"
                raise MachineError(
                    f"{system_name(generation)} has no specialisation {specialisation!r}; "
                    f"it has {there}."
                )
        if not (system / "bin" / "switch-to-configuration").exists():
            raise MachineError(
                f"{system_name(system)} can't be switched to: it has no switch-to-configuration "
                "(system.switch.enable = false?)."
            )
        return system

    def _make_generation(self, generation: Path) -> None:
        """Make a generation the profile's, and before that the deployed one if it is not yet."""
        profile = Profile(self._run, self.vm.name)
        base = str(_toplevel(self.base))
        if not self._profile and profile.resolved() != base:
            profile.set(base)
        profile.set(str(generation))
        self._profile = str(generation)

    def _start_anew(self, default: Path) -> None:
        builds = [each for each in (self.candidate, self.base) if each.toplevel == default]
        if not builds:
            raise MachineError(
                f"{self.vm.name} can't be started with {default}, which is the default: only the "
                "deployed generation and the candidate have a VM. With a boot loader "
                "(--nixvm-boot-loader) any generation can be booted."
            )
        self.vm.shutdown()
        self.vm.become(builds[0])
        self.vm.start()

    def _name(self, toplevel: Path) -> str:
        for name, build in (("candidate", self.candidate), ("base", self.base)):
            if _is(toplevel, _toplevel(build)):
                return name
        return system_name(toplevel)


def _is(system: Path, generation: Path) -> bool:
    """Whether a system is a generation, or one of its specialisations."""
    place = generation / "specialisation"
    inside = tuple(place.iterdir()) if place.is_dir() else ()
    return system in (generation, *inside) or any(each.resolve() == system for each in inside)


def _toplevel(build: VmBuild) -> Path:
    if build.toplevel is None:
        raise MachineError(f"{build.output} has no link to its system, so it can't be switched to.")
    return build.toplevel
