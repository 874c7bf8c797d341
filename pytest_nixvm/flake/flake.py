"""A flake as the tests see it: its machines, and the VM built of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import FlakeError, NotAVirtualMachineError
from pytest_nixvm.flake import explain, images
from pytest_nixvm.flake.build import MachineInfo, Secret, VmBuild
from pytest_nixvm.flake.declared import Declared
from pytest_nixvm.flake.evaluation import MACHINES, Evaluator
from pytest_nixvm.flake.image_builds import ImageBuilds, StartScript
from pytest_nixvm.flake.naming import candidates, no_such_attribute
from pytest_nixvm.flake.nix import Nix, NixFailure
from pytest_nixvm.flake.places import Cache, log_file
from pytest_nixvm.flake.reference import FlakeReference, attribute_path, attribute_text
from pytest_nixvm.flake.slirp import network_options
from pytest_nixvm.flake.variant import RealSystem, Variant, let_go, overrides_of, secrets_of
from pytest_nixvm.flake.words import listed, near, nix_list, nix_string
from pytest_nixvm.progress import Progress, Silent

__all__ = ["Flake", "MachineInfo", "VmBuild"]


class Flake(ImageBuilds):
    """One flake, evaluated and built on demand.

    nix = Nix.find()
    flake = Flake(FlakeReference.parse(".#dev-vm", Path.cwd()), nix=nix, cache=cache)
    vm = flake.build(flake.machines()[0].name)

    `override_inputs` are pairs of an input's name and the reference to use in its place. `cache`
    is a directory that outlives the session; results are rooted there, and what an unchanged
    flake gave is remembered there. `logs`, if given, gets the output of evaluations and builds.
    Timeouts are in seconds. `label` tells it from another flake of the session in what is shown.
    `image_script` makes what starts a machine from its image; without it none can be built so.
    """

    def __init__(
        self,
        reference: FlakeReference,
        *,
        nix: Nix,
        cache: Path,
        override_inputs: Sequence[tuple[str, str]] = (),
        progress: Progress | None = None,
        logs: Path | None = None,
        evaluation_timeout: float = 600,
        build_timeout: float = 7200,
        label: str = "",
        image_script: StartScript | None = None,
    ) -> None:
        self.reference = reference
        self._label = f" ({label})" if label else ""
        self.nix = nix
        self._cache = Cache(cache)
        self._progress = progress or Silent()
        self._logs = logs
        self._build_timeout = build_timeout
        self._evaluator = Evaluator(
            reference,
            nix=nix,
            cache=self._cache,
            override_inputs=override_inputs,
            progress=self._progress,
            logs=logs,
            timeout=evaluation_timeout,
        )
        self._start_script = image_script
        self._machines: tuple[MachineInfo, ...] | None = None
        self._given: dict[tuple[str, str | None], tuple[MachineInfo, Variant, str]] = {}

    def machines(self) -> tuple[MachineInfo, ...]:
        """Return the flake's machines, or just the one its reference names.

        One evaluation, remembered between runs. Machines that can't run here (Darwin, another
        architecture) are listed with the reason in `skip`.

        Raises:
            FlakeError: there is no flake, no such attribute, nothing that could be tested.
            EvaluationError: Nix can't evaluate the listing.
        """
        if self._machines is None:
            attribute = self.reference.attribute
            if attribute is None or attribute == "nixosConfigurations":
                self._machines = self._list()
            else:
                self._machines = (self._named(attribute),)
        return self._machines

    def build(
        self,
        name: str,
        *,
        freezable: bool = False,
        boot_loader: bool = False,
        carries: Sequence[Path] = (),
        secrets: Sequence[Secret] = (),
    ) -> VmBuild:
        """Evaluate and build a machine's VM, or find that this was done before.

        With `freezable` it is built without shares, and its store is an image: so a running
        machine can be frozen and cloned. With `boot_loader` it boots through its own boot loader
        from a disk image. `carries` are systems (see `toplevel`) that are in its store besides its
        own, to switch to. `secrets` are given throwaway values when it boots, besides those that
        sops-nix and agenix are configured with. `overrides` of the result say what that changes in
        the system. A bare derivation stays as it is, and its result says so.

        Sessions and xdist workers that want the same machine at the same time share the work.

        Raises:
            FlakeError: there is no machine of that name, or it can't run here.
            EvaluationError: Nix can't evaluate it.
            BuildError: Nix can't build it.
            NotAVirtualMachineError: what was built is no VM.
        """
        info = self._info(name)
        if info.image is not None:
            if carries:
                raise images.unchanging(info.name)
            return self._image_vm(info, freezable, secrets)
        variant = Variant(
            freezable, boot_loader, _toplevels(carries), tuple(secrets), switching=bool(carries)
        )
        plan, evaluated, built = self._made(info, variant)
        return self._result(info, plan, evaluated, built)

    def toplevel(
        self,
        name: str,
        *,
        freezable: bool = False,
        boot_loader: bool = False,
        secrets: Sequence[Secret] = (),
        switching: bool = False,
    ) -> Path:
        """Evaluate and build the system that the VM of `build` runs, without the VM.

        With `switching` it is as in a VM that carries others, and can be switched to.

        Raises as `build` does.
        """
        info = self._info(name)
        if info.image is not None:
            raise images.unchanging(info.name)
        variant = Variant(freezable, boot_loader, (), tuple(secrets), switching)
        plan, _, _ = self._made(info, variant, "toplevel")
        if plan["toplevel"] is not None:
            return Path(plan["toplevel"]["output"])
        toplevel = self._result(info, plan, 0.0, 0.0).toplevel  # a bare derivation's
        if toplevel is None:
            raise NotAVirtualMachineError(
                f"{info.attribute} of {self._evaluator.what} has no link to its system: which one "
                "it runs can't be told."
            )
        return toplevel

    def real_toplevel(self, name: str, *, quiet: bool = False) -> str:
        """Return the path of the system that the real machine runs, without building it.

        With `quiet` it is no step for the user to see: for a thread that asks beside the tests.

        Raises:
            FlakeError, EvaluationError: as `build` does.
            NotAVirtualMachineError: it is no NixOS configuration.
        """
        info = self._info(name)
        output = self._ask(info, "toplevelOf", quiet=quiet)["output"]
        if output is None:
            raise NotAVirtualMachineError(
                f"{info.attribute} of {self._evaluator.what} is no NixOS configuration: it has no "
                "config.system.build.toplevel."
            )
        return str(output)

    def build_real(self, name: str) -> Path:
        """Build the system that the real machine runs, or find that this was done before.

        Raises as `build` does.
        """
        self.real_toplevel(name)  # which says what is no system
        plan, _, _ = self._made(self._info(name), RealSystem())
        return Path(plan["output"])

    @property
    def used(self) -> list[str]:
        """The machines of which something was built through this object."""
        return sorted({images.plain(info.name) for info, _, _ in self._given.values()})

    def is_current(self, name: str) -> bool:
        """Whether the flake gives the same VMs of a machine as when they were built for us.

        It may have been edited since. Builds nothing. Raises as `build` does.
        """
        for (question, part), (info, variant, output) in [*self._given.items()]:
            if images.plain(info.name) == images.plain(name):
                plan, _ = self._plan(info, question, variant, quiet=True)
                if _part(plan, part)["output"] != output:
                    return False
        return True

    def declared(self, name: str) -> Declared:
        """Return what the configuration says of the machine. Evaluates, builds nothing.

        Raises:
            FlakeError, EvaluationError: as `build` does.
        """
        info = self._info(name)
        if info.image is None:
            return Declared.from_json(self._ask(info, "declared"))
        what = f"declaredImage {nix_string(images.variant_of(info.image))}"
        return Declared.from_json(self._ask(info, what))

    def options(self, name: str) -> dict[str, str]:
        """Return the options that the flake's own modules define, with their values as text.

        Members of a set are told one by one: `users.users.alice.shell`. Passwords are not shown.

        Raises:
            FlakeError, EvaluationError: as `build` does.
        """
        return self._ask(self._info(name), "options")

    # --- machines ----------------------------------------------------------------------------

    def _list(self) -> tuple[MachineInfo, ...]:
        what = self._evaluator.what
        answer, _ = self._evaluator.ask(MACHINES, "", title=what)
        systems: dict[str, str | None] = answer["systems"]
        found = [
            MachineInfo(name, attribute_text(["nixosConfigurations", name]), *self._runs(system))
            for name, system in systems.items()
        ]
        for name in answer["darwin"]:
            if name not in systems:
                reason = "it is a Darwin (macOS) host: there is no NixOS to boot"
                attribute = attribute_text(["darwinConfigurations", name])
                found.append(MachineInfo(name, attribute, "darwin", reason))
        if not found:
            raise FlakeError(
                f"{what} has no nixosConfigurations. Its outputs are: "
                f"{listed(answer['outputs'])}. Name what to test: --nixvm-flake=REF#ATTRIBUTE."
            )
        return tuple(found)

    def _named(self, attribute: str) -> MachineInfo:
        base, text = images.split(attribute)
        paths = candidates(attribute, self.nix.system)
        if text is not None:  # unless a machine is really called so
            paths += candidates(base, self.nix.system)
        answer, _ = self._evaluator.ask(
            f"describe {attribute}",
            f"this.describe [ {' '.join(map(nix_list, paths))} ]",
            title=self._evaluator.what,
            attribute=attribute,
        )
        if not answer["found"]:
            raise FlakeError(no_such_attribute(self._evaluator.what, base, answer["siblings"]))
        path: list[str] = answer["path"]
        last = attribute_path(attribute.removeprefix("."))[-1]
        shown = attribute_text(path)
        if answer["kind"] == "other":
            raise NotAVirtualMachineError(
                f"{shown} of {self._evaluator.what} is neither a NixOS configuration nor a "
                "derivation."
            )
        name = path[1] if path[0] == "nixosConfigurations" and len(path) > 1 else path[-1]
        info = MachineInfo(name, shown, *self._runs(answer["system"]))
        return images.machine_of(info, text) if text is not None and path[-1] != last else info

    def _runs(self, system: str | None) -> tuple[str, str | None]:
        """Return the system, and why it can't run here, if so."""
        here = self.nix.system
        if not system or system == here or (system, here) == ("i686-linux", "x86_64-linux"):
            return system or "", None
        return system, f"it is for {system}, this machine is {here}"

    def _info(self, name: str) -> MachineInfo:
        every = self.machines()
        info = images.find(every, name)
        if info is not None:
            if info.skip is not None:
                what = f"{name} of {self._evaluator.what}"
                raise FlakeError(f"{what} can't be tested here: {info.skip}.")
            return info
        names = [each.name for each in every]
        raise FlakeError(
            f"{self._evaluator.what} has no machine {name}{near(name, names)} "
            f"It has: {listed(names)}."
        )

    # --- builds ------------------------------------------------------------------------------

    def _made(
        self, info: MachineInfo, variant: Variant, part: str | None = None
    ) -> tuple[dict[str, Any], float, float]:
        """Plan and realise a machine's VM, or only `part` of it; return the seconds that took."""
        memory = self._evaluator.memory()
        question = variant.question(info.attribute)
        overrides = self._evaluator.overrides
        place = (self._cache, info.name, self.reference.url, info.attribute, overrides)
        root = variant.root(*place, part)
        plan = memory.recall(question)
        if plan is not None and _is_built(_part(plan, part), root):
            self._given[question, part] = info, variant, _part(plan, part)["output"]
            return plan, 0.0, 0.0
        lock = f"build-{memory.name(f'{part} {question}' if part else question)}"
        with self._cache.lock(lock, self._progress, timeout=self._build_timeout):
            plan, evaluated = self._plan(info, question, variant)
            if not _can_realise(_part(plan, part)):  # remembered, but the store was cleaned since
                memory.forget(question)
                plan, evaluated = self._plan(info, question, variant)
            built = 0.0
            if not _is_built(_part(plan, part), root):
                words = [*variant.words, part] if part else variant.words
                built = self._realise(info, _part(plan, part), root, words)
                let_go(root)
        self._given[question, part] = info, variant, _part(plan, part)["output"]
        return plan, evaluated, built

    def _ask(self, info: MachineInfo, what: str, *, quiet: bool = False) -> dict[str, Any]:
        answer, _ = self._evaluator.ask(
            f"{what} {info.attribute}",
            f"this.{what} {nix_list(attribute_path(info.attribute))}",
            title=f"{info.name}{self._label}",
            attribute=info.attribute,
            quiet=quiet,
        )
        return answer

    def _plan(
        self, info: MachineInfo, question: str, variant: Variant, *, quiet: bool = False
    ) -> tuple[dict[str, Any], float]:
        plan, seconds = self._evaluator.ask(
            question,
            variant.expression(attribute_path(info.attribute)),
            title=f"{info.name}{self._label}",
            attribute=info.attribute,
            quiet=quiet,
        )
        what = f"{info.attribute} of {self._evaluator.what}"
        variant.check(plan, what)
        return plan, seconds

    def _realise(
        self, info: MachineInfo, plan: Mapping[str, Any], root: Path, words: Sequence[str]
    ) -> float:
        log = "-".join([f"build-{info.name}", *words])
        step = self._progress.step(f"Building {info.name}{self._label}")
        began = time.monotonic()
        output_only = not Path(plan["derivation"]).exists()
        try:
            with log_file(self._logs, log) as (write, path):
                try:
                    self.nix.realise(
                        plan["output"] if output_only else plan["derivation"],
                        "" if output_only else plan["outputName"],
                        root,
                        timeout=self._build_timeout,
                        watch=step.update,
                        write=write,
                    )
                except NixFailure as failure:
                    subject = self._evaluator.subject(info.attribute)
                    raise explain.build_failed(failure, subject, path) from None
        except BaseException as error:
            step.fail("failed" if isinstance(error, FlakeError) else "")
            raise
        step.finish()
        return time.monotonic() - began

    def _result(
        self, info: MachineInfo, plan: Mapping[str, Any], evaluated: float, built: float
    ) -> VmBuild:
        output = Path(plan["output"])
        scripts = sorted(output.glob("bin/run-*-vm"))
        if not scripts:
            programs = sorted(path.name for path in output.glob("bin/*"))
            raise NotAVirtualMachineError(
                f"{info.attribute} of {self._evaluator.what} is no VM: its build has no "
                "bin/run-NAME-vm" + (f", only {listed(programs)}" if programs else "") + "."
                f"\nWhat was built: {output}"
            )
        system = output / "system"
        return VmBuild(
            name=info.name,
            attribute=info.attribute,
            start_script=scripts[0],
            output=output,
            toplevel=system.resolve() if system.exists() else None,
            system=plan.get("system") or info.system or self.nix.system,
            overrides=overrides_of(plan),
            freezable=plan["freezable"],
            evaluated=evaluated,
            built=built,
            boot_loader=plan["bootLoader"],
            carries=tuple(map(Path, plan["carries"])),
            network_options=network_options(plan["network"]),
            secrets=secrets_of(plan["secrets"]),
        )


def _toplevels(carries: Sequence[Path]) -> tuple[Path, ...]:
    """Each once, in an order that does not matter, so that the same build is the same."""
    return tuple(sorted(set(carries)))


def _part(plan: Mapping[str, Any], part: str | None) -> Mapping[str, Any]:
    return plan if part is None or plan.get(part) is None else plan[part]


def _is_built(plan: Mapping[str, Any], root: Path) -> bool:
    """Whether the result is in the store, and rooted."""
    output = Path(plan.get("output", "/nonexistent"))
    # Nix appends the output's name to the root's, unless that is `out`.
    named = root.with_name(f"{root.name}-{plan.get('outputName')}")
    try:
        link = named if plan.get("outputName") != "out" and named.is_symlink() else root
        return output.exists() and link.readlink() == output
    except OSError:
        return False


def _can_realise(plan: Mapping[str, Any]) -> bool:
    return Path(plan["output"]).exists() or Path(plan["derivation"]).exists()
