"""What may be tested: the machines of a flake, those that are selected, and their builds."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from pytest_nixvm.errors import BuildError, EvaluationError, SettingsError
from pytest_nixvm.flake.build import MachineInfo, VmBuild
from pytest_nixvm.flake.flake import Flake
from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.flake.reference import FlakeReference
from pytest_nixvm.output import Output
from pytest_nixvm.progress import Progress, Silent
from pytest_nixvm.settings import Settings


class Catalogue:
    """The machines of one flake. Nothing is evaluated or built before it is asked for.

    `known` replaces the evaluation of the flake's machines (an xdist worker is told them).
    """

    def __init__(
        self,
        settings: Settings,
        *,
        progress: Progress | None = None,
        output: Path | None = None,
        known: Sequence[MachineInfo] | None = None,
    ) -> None:
        self.settings = settings
        self.progress: Progress = progress or Silent()
        self.unfreezable: dict[str, str] = {}  # machine -> why each test boots one of its own
        self._output = output
        self._known = None if known is None else tuple(known)
        self._builds: dict[tuple[str, bool], VmBuild] = {}
        self._lock = threading.RLock()

    @cached_property
    def out(self) -> Output:
        """Where this run leaves what it has to show. Raises `SettingsError`."""
        if self._output is not None:
            return Output(self._output)
        if self.settings.output is not None:
            return Output.below(self.settings.output)
        return Output.fresh(self.settings.cache / "runs")

    @property
    def output(self) -> Path:
        """The directory of `out`."""
        return self.out.path

    @cached_property
    def nix(self) -> Nix:
        """The nix command. Raises `MissingProgramError`."""
        return Nix.find(options=self.settings.nix_option, offline=self.settings.offline)

    @cached_property
    def flake(self) -> Flake:
        """The flake under test. Raises `SettingsError` if there is none, or `FlakeError`."""
        if self.settings.flake is None:
            raise SettingsError(
                "No flake to test: give --nixvm-flake=REF (--nixvm-flake=. is the one in this "
                "directory), or nixvm_flake in the ini file."
            )
        reference = FlakeReference.parse(self.settings.flake, Path.cwd())
        return Flake(
            reference,
            nix=self.nix,
            cache=self.settings.cache,
            override_inputs=self.settings.override_input,
            progress=self.progress,
            logs=self.out.shared("nix"),
        )

    @cached_property
    def every_machine(self) -> tuple[MachineInfo, ...]:
        """Every machine of the flake, the ones that can't be tested here included."""
        return self._known if self._known is not None else self.flake.machines()

    @cached_property
    def machines(self) -> tuple[MachineInfo, ...]:
        """The machines that --nixvm-machine selects, all if it is not given.

        Raises `SettingsError` for a glob that matches nothing.
        """
        selected = self.every_machine
        globs = self.settings.machine
        names = [machine.name for machine in selected]
        for glob in globs:
            if not fnmatch.filter(names, glob):
                raise SettingsError(
                    f"--nixvm-machine {glob!r} matches no machine of {self.settings.flake}. "
                    f"Its machines: {', '.join(names) or 'none'}."
                )
        return tuple(
            machine
            for machine in selected
            if not globs or any(fnmatch.fnmatchcase(machine.name, glob) for glob in globs)
        )

    def build(self, name: str, *, freezable: bool = False) -> VmBuild:
        """Build a machine's VM, once; `freezable` as `Flake.build` has it.

        Raises `FlakeError` or one of its children.
        """
        with self._lock:
            if (name, freezable) not in self._builds:
                try:
                    build = self.flake.build(name, freezable=freezable)
                except (EvaluationError, BuildError) as error:
                    if not freezable:
                        raise
                    # As it is, it may well be built; if not, that is what the user has to mend.
                    build = self.build(name)
                    self.unfreezable[name] = f"it can't be built without shares: {error}"
                self._builds[name, freezable] = build
            return self._builds[name, freezable]
