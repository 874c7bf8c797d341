"""What may be tested: the machines of a flake, those that are selected, and their builds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.errors import (
    BuildError,
    EvaluationError,
    FlakeError,
    SettingsError,
    UserError,
)
from pytest_nixvm.flake import images
from pytest_nixvm.flake.build import MachineInfo, Secret, VmBuild
from pytest_nixvm.flake.declared import Declared
from pytest_nixvm.flake.flake import Flake
from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.flake.reference import FlakeReference
from pytest_nixvm.flake.revision import base_reference
from pytest_nixvm.image_machine import start_script
from pytest_nixvm.output import Output
from pytest_nixvm.progress import Progress, Silent
from pytest_nixvm.settings import Generations, Settings

if TYPE_CHECKING:
    from pytest_nixvm.fidelity import NotTested


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
        # What a machine expects besides what sops-nix and agenix declare; for every generation.
        self.more_secrets: Callable[[str], Sequence[Secret]] = lambda _: ()
        self._output = output
        self._known = None if known is None else tuple(known)
        self._flakes: dict[str, Flake] = {}
        self._builds: dict[tuple[str, bool, bool, Generations | None], VmBuild] = {}
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
        return self.flake_of(self.settings.flake)

    def flake_of(self, text: str) -> Flake:
        """Return the flake that a reference names, or a revision of the flake under test."""
        with self._lock:
            if text not in self._flakes:
                if text == self.settings.flake:
                    reference = FlakeReference.parse(text, Path.cwd())
                else:
                    reference = self._other(text)
                self._flakes[text] = Flake(
                    reference,
                    nix=self.nix,
                    cache=self.settings.cache,
                    override_inputs=self.settings.override_input,
                    progress=self.progress,
                    logs=self.out.shared("nix"),
                    label="" if text == self.settings.flake else text,
                    image_script=start_script,
                )
            return self._flakes[text]

    def _other(self, text: str) -> FlakeReference:
        try:
            return base_reference(text, self.flake.reference, Path.cwd())
        except UserError as error:
            settings = self.settings
            given = {settings.from_: "--nixvm-from", settings.changed: "--nixvm-changed"}
            if text in given:
                raise type(error)(f"{given[text]}={text}: {error}") from None
            raise

    # --- machines --------------------------------------------------------------------------------

    @cached_property
    def every_machine(self) -> tuple[MachineInfo, ...]:
        """Every machine of the flake, the ones that can't be tested here included."""
        return self._known if self._known is not None else self.flake.machines()

    @cached_property
    def selected(self) -> tuple[MachineInfo, ...]:
        """The machines that --nixvm-machine selects, all if it is not given.

        `dev-vm@qcow2` selects what boots from dev-vm's image. Raises `SettingsError` for a glob
        that matches nothing, `FlakeError` for an image format that is none.
        """
        every, globs = self.every_machine, self.settings.machine
        if not globs:
            return every
        names = [machine.name for machine in every]
        selected: dict[str, MachineInfo] = {}
        for glob in globs:
            found = images.matching(every, glob)
            if not found:
                raise SettingsError(
                    f"--nixvm-machine {glob!r} matches no machine of {self.settings.flake}. "
                    f"Its machines: {', '.join(names) or 'none'}."
                )
            selected |= {machine.name: machine for machine in found}
        # In the flake's order; images of a machine as they were named.
        order = {name: number for number, name in enumerate(names)}
        return tuple(
            sorted(
                selected.values(),
                key=lambda each: order.get(each.name, order.get(images.plain(each.name), 0)),
            )
        )

    def machine(self, name: str) -> MachineInfo | None:
        """Return the machine of that name, which may be one that boots from an image.

        None if there is none. Raises `FlakeError` for an image format that is none.
        """
        return images.find(self.every_machine, name)

    def chosen(self, name: str) -> list[str]:
        """Return what is meant where a test names `name`, or an image of it that was asked for.

        `--nixvm-machine=dev-vm@qcow2` runs the tests of dev-vm on its image.
        """
        return [
            each.name
            for each in self.selected
            if each.name == name or (each.image and images.plain(each.name) == name)
        ] or [name]

    @cached_property
    def unchanged(self) -> tuple[str, ...]:
        """The selected machines that are the same as in --nixvm-changed=REF; none without it.

        Both are only evaluated. A machine that is not in REF, or can't be evaluated in either, is
        not among them. Raises `ChangeError` for a revision that is none.
        """
        reference = self.settings.changed
        if reference is None:
            return ()
        base = self.flake_of(reference)
        try:
            there = {machine.name for machine in base.machines()}
        except EvaluationError as error:
            raise EvaluationError(f"--nixvm-changed={reference}: {error}") from None
        same = []
        for machine in self.selected:
            if machine.skip is None and images.plain(machine.name) in there:
                try:
                    system = self.flake.real_toplevel(machine.name)
                    if system == base.real_toplevel(images.plain(machine.name)):
                        same.append(machine.name)
                except FlakeError:
                    continue  # its tests will say what is wrong
        return tuple(same)

    @cached_property
    def machines(self) -> tuple[MachineInfo, ...]:
        """The machines that are tested: those that are selected, without `unchanged`."""
        unchanged = self.unchanged
        return tuple(machine for machine in self.selected if machine.name not in unchanged)

    def declared(self, name: str) -> Declared:
        """Return what a machine's configuration declares. Raises `FlakeError`."""
        return self.flake.declared(name)

    def fidelity(self, name: str) -> tuple[NotTested, ...]:
        """Return what a machine's VM does not test: the one that was made last, if one was.

        Raises `FlakeError`.
        """
        from pytest_nixvm.fidelity import fidelity

        settings = self.settings
        made = [build for (of, *_), build in self._builds.items() if of == name]
        build = (
            made[-1]
            if made
            else self.build(
                name,
                freezable=settings.isolation == "test",
                boot_loader=settings.boot_loader,
            )
        )
        # A bare derivation has no configuration; an image has, also where its system is not here.
        bare = build.toplevel is None and build.image is None
        return fidelity(build, None if bare else self.declared(name))

    # --- builds ----------------------------------------------------------------------------------

    def build(
        self,
        name: str,
        *,
        freezable: bool = False,
        boot_loader: bool = False,
        generations: Generations | None = None,
    ) -> VmBuild:
        """Build a machine's VM, once; `freezable` and `boot_loader` as `Flake.build` has them.

        With `generations` it is that of the base, with the candidates in its store. Raises
        `FlakeError` or one of its children, `ChangeError` where the two can't be compared.
        """
        key = (name, freezable, boot_loader, generations)
        with self._lock:
            if key not in self._builds:
                try:
                    build = self._build(name, freezable, boot_loader, generations)
                except (EvaluationError, BuildError) as error:
                    info = self.machine(name)
                    if not freezable or (info is not None and info.image is not None):
                        raise  # an image is the same build either way
                    # As it is, it may well be built; if not, that is what the user has to mend.
                    build = self.build(name, boot_loader=boot_loader, generations=generations)
                    self.unfreezable[name] = f"it can't be built without shares: {error}"
                self._builds[key] = build
            return self._builds[key]

    def _build(
        self, name: str, freezable: bool, boot_loader: bool, generations: Generations | None
    ) -> VmBuild:
        if generations is not None:
            raise TypeError("a catalogue has one generation; Deployments has more")
        return self.flake.build(
            name,
            freezable=freezable,
            boot_loader=boot_loader,
            secrets=self.more_secrets(name),
        )
