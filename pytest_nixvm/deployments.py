"""Two generations of a machine: the deployed one runs, and has the candidates in its store.

Both are built through the same overlay, or a switch would see the overlay as part of the change
(nixpkgs #346702).
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from pytest_nixvm.catalogue import Catalogue
from pytest_nixvm.errors import (
    BuildError,
    ChangeError,
    EvaluationError,
    FlakeError,
    NothingToTestError,
)
from pytest_nixvm.flake import images
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.flake.flake import Flake
from pytest_nixvm.flake.words import listed, near
from pytest_nixvm.settings import Generations

if TYPE_CHECKING:
    from pytest_nixvm.flake.difference import Difference

NO_BASE = (
    "Which generation is deployed? --nixvm-from=REF names it (nixvm_from in the ini file): HEAD~1, "
    "a branch, or a flake reference such as git+file:.?ref=main or github:me/config/REVISION."
)


class Deployments(Catalogue):
    """A catalogue that also builds deployed generations, and what they may be switched to."""

    def generations(self) -> Generations | None:
        """Return the generations of --nixvm-from, None if that is not given."""
        base = self.settings.from_
        return None if base is None else Generations.of(base, self.under_test)

    @property
    def under_test(self) -> str:
        """The reference of the flake under test. Raises `SettingsError` if there is none."""
        _ = self.flake
        return str(self.settings.flake)

    def _build(
        self, name: str, freezable: bool, boot_loader: bool, generations: Generations | None
    ) -> VmBuild:
        if generations is None:
            return super()._build(name, freezable, boot_loader, None)
        info = self.machine(name)
        if info is not None and info.image is not None:
            raise images.unchanging(name)
        secrets = self.more_secrets(name)
        carries = []
        for candidate in generations.candidates:
            flake = self.flake_of(candidate)
            other = self._name_in(flake, name)
            names = [machine.name for machine in flake.machines()]
            if other not in names:  # or it would be said to be new
                raise ChangeError(
                    f"{flake.reference} has no machine {other}{near(other, names)} "
                    f"It has: {listed(names)}."
                )
            _compare(flake, other, self._base(generations.base, name), name)
            carries.append(
                flake.toplevel(
                    other,
                    freezable=freezable,
                    boot_loader=boot_loader,
                    secrets=secrets,
                    switching=True,
                )
            )
        base, there = self._base(generations.base, name)
        try:
            build = base.build(
                there,
                freezable=freezable,
                boot_loader=boot_loader,
                carries=carries,
                secrets=secrets,
            )
        except (EvaluationError, BuildError) as error:
            raise type(error)(f"The deployed generation, {generations.base}: {error}") from None
        if not set(carries) <= set(build.carries):
            raise ChangeError(
                f"{name} can't be switched to another system in a VM: {build.attribute} of "
                f"{base.reference} has no virtualisation.additionalPaths, by which the other is "
                "in its store. Name a NixOS configuration (nixosConfigurations.NAME), not what "
                "was built of one."
            )
        if all(path == build.toplevel for path in carries):
            raise _same(name, build)
        return build

    def check_base(self, name: str) -> None:
        """Find the machine in the deployed generation. Evaluates what is there, builds nothing.

        Raises `ChangeError` or `FlakeError`, but not where there is just nothing to test.
        """
        generations = self.generations()
        info = self.machine(name)
        if generations is not None and (info is None or info.image is None):
            with suppress(NothingToTestError):
                self._base(generations.base, name)

    def candidate(self, name: str, reference: str, base: VmBuild, *, boot_loader: bool) -> VmBuild:
        """Build the VM of a candidate, from which the base can be switched back to.

        Raises `NothingToTestError` if both are the same.
        """
        flake = self.flake_of(reference)
        carries = () if base.toplevel is None else (base.toplevel,)
        build = flake.build(
            self._name_in(flake, name),
            freezable=base.freezable,
            boot_loader=boot_loader,
            carries=carries,
            secrets=self.more_secrets(name),
        )
        if build.toplevel == base.toplevel:
            raise _same(name, base)
        return build

    def difference(
        self, name: str, deployed: str, reference: str, base: VmBuild, candidate: VmBuild
    ) -> Difference:
        """Return what differs between two builds' systems, made of the flakes at two references.

        Options that differ are asked for when they are looked at. Raises as `difference` does.
        """
        from pytest_nixvm.flake.difference import difference

        def options() -> tuple[dict[str, str], dict[str, str]]:
            old, there = self._base(deployed, name)
            new = self.flake_of(reference)
            return old.options(there), new.options(self._name_in(new, name))

        if base.toplevel is None or candidate.toplevel is None:
            raise ChangeError(f"{name} has no system that could be compared.")
        return difference(self.nix, base.toplevel, candidate.toplevel, options=options)

    def _base(self, reference: str, name: str) -> tuple[Flake, str]:
        """Return the flake of the deployed generation, and the machine's name there."""
        flake = self.flake_of(reference)
        try:
            machines = flake.machines()
        except FlakeError as error:
            raise type(error)(f"The deployed generation, {reference}: {error}") from None
        there = self._name_in(flake, name)
        if reference == self.settings.from_:
            self._check_name(reference, there, name)
        names = [machine.name for machine in machines]
        if there in names:
            return flake, there
        if not {machine.name for machine in self.every_machine} & set(names):
            raise ChangeError(
                f"{reference} and {self.settings.flake} have no machine in common: "
                f"{reference} has {', '.join(names)}. Is that the right flake? With another name "
                f"for {name}: {reference}#NAME."
            )
        raise NothingToTestError(
            f"{name} is new: {reference} has no such machine, so nothing is deployed that could "
            f"be switched. (It has: {', '.join(names)}.)"
        )

    def _check_name(self, reference: str, there: str, name: str) -> None:
        """Raise where `reference` is `there`, one machine, and that is not what became of `name`.

        One that now has another name is the one that is tested; of several it can't be told.
        """
        if there == name:
            return
        if there in {machine.name for machine in self.every_machine}:
            raise NothingToTestError(f"--nixvm-from={reference} is about {there}, not {name}.")
        if len(self.selected) > 1:
            raise ChangeError(
                f"--nixvm-from={reference}: which machine was called {there}? Name that one as "
                f"well, with --nixvm-machine=NAME. There are: "
                f"{', '.join(machine.name for machine in self.selected)}."
            )

    def _name_in(self, flake: Flake, name: str) -> str:
        """Return what a machine is called in another flake: its name, or what stands behind #."""
        attribute = flake.reference.attribute
        if flake is self.flake or attribute in (None, "nixosConfigurations"):
            return name
        return flake.machines()[0].name


def _same(name: str, build: VmBuild) -> NothingToTestError:
    return NothingToTestError(
        f"{name} is the same in both generations: there is nothing to switch to ({build.toplevel})."
    )


def _compare(candidate: Flake, name: str, base: tuple[Flake, str], shown: str) -> None:
    """Raise `ChangeError` where one can't be switched to the other."""
    flake, there = base
    systems = [
        next((m.system for m in each.machines() if m.name == called), "")
        for each, called in ((flake, there), (candidate, name))
    ]
    if all(systems) and systems[0] != systems[1]:
        raise ChangeError(
            f"{shown} is for {systems[0]} in {flake.reference} and for {systems[1]} in "
            f"{candidate.reference}: a machine can't be switched to another architecture."
        )
    for each, called, role in ((flake, there, "deployed"), (candidate, name, "candidate")):
        if not each.declared(called).switchable:
            raise NothingToTestError(
                f"{shown} can't be switched: system.switch.enable is false in the {role} "
                f"generation ({each.reference})."
            )
