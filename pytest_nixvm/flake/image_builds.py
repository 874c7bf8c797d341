"""The side of a flake that makes images, and machines that boot from them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_nixvm.flake import images
from pytest_nixvm.flake.build import MachineInfo, Secret, VmBuild
from pytest_nixvm.flake.evaluation import Evaluator
from pytest_nixvm.flake.images import FORMATS, ImageBuild, ImageMachine, ImageVariant
from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.flake.places import Cache
from pytest_nixvm.flake.slirp import network_options
from pytest_nixvm.flake.variant import Variant, overrides_of, secrets_of

StartScript = Callable[[ImageMachine], str]
"""Makes the program that starts a machine from its image; raises `UserError`.

Where the image is None yet, it only looks for what it takes, and returns "".
"""


class ImageBuilds(ABC):
    """Images of a flake's machines."""

    nix: Nix
    _cache: Cache
    _evaluator: Evaluator
    _start_script: StartScript | None

    def image(self, name: str, format: str) -> ImageBuild:
        """Build a machine's image, or find that this was done before.

        It is what its owner gets by `config.system.build.images`: nothing of ours is in it.
        `format` is one of `FORMATS`, or any other name that nixpkgs has for one.

        Raises:
            FlakeError: there is no such machine, or no such format.
            EvaluationError: Nix can't evaluate it.
            BuildError: Nix can't build it.
        """
        info = self._info(name)
        began = time.monotonic()
        plan, evaluated, built = self._made(info, ImageVariant(image=images.variant_of(format)))
        return ImageBuild(
            name=images.plain(info.name),
            format=images.known_as(format),
            file=images.file_of(plan),
            output=Path(plan["output"]),
            toplevel=_existing(plan["toplevel"]),
            overrides=overrides_of(plan),
            seconds=time.monotonic() - began if evaluated or built else 0.0,
        )

    def images(self, name: str) -> list[str]:
        """Return the formats that there are images of a machine in. Builds nothing.

        Raises:
            FlakeError, EvaluationError: as `image` does.
        """
        info = self._info(name)
        what = f"{info.attribute} of {self._evaluator.what}"
        return images.formats_of(self._ask(info, "images"), what)

    def _image_vm(self, info: MachineInfo, freezable: bool, secrets: Sequence[Secret]) -> VmBuild:
        """Build the VM that boots from a machine's image. Raises as `Flake.build`."""
        if self._start_script is None:
            raise TypeError("this Flake was made without `image_script`: it starts no images")
        wanted = FORMATS[str(info.image)].variant
        variant = ImageVariant(secrets=tuple(secrets), image=wanted, adapted=True)
        # What is lacking here is told before the image is built, which takes minutes.
        plan, evaluated = self._plan(info, variant.question(info.attribute), variant)
        fetched = 0.0
        if plan["qemu"] is not None:  # the package that the machine's own VM has
            plan, _, fetched = self._made(info, variant, "qemu")
        hardware = plan["hardware"]
        machine = ImageMachine(
            name=info.name,
            host=hardware["name"],
            image=None,
            format=str(info.image),
            memory=hardware["memory"],
            cores=hardware["cores"],
            disk_size=_size(hardware["diskSize"]),
            graphics=hardware["graphics"],
            efi=plan["efi"],
            qemu=None if hardware["qemu"] is None else Path(hardware["qemu"]),
            freezable=freezable,
        )
        self._start_script(machine)
        plan, again, built = self._made(info, variant)
        evaluated, built = evaluated + again, built + fetched
        script = self._start_script(replace(machine, image=images.file_of(plan)))
        return VmBuild(
            name=info.name,
            attribute=info.attribute,
            start_script=self._cache.script(f"run-{hardware['name']}-vm", script),
            output=Path(plan["output"]),
            toplevel=_existing(plan["toplevel"]),
            system=plan["system"] or info.system or self.nix.system,
            overrides=overrides_of(plan),
            freezable=freezable,
            evaluated=evaluated,
            built=built,
            boot_loader=True,
            network_options=network_options(plan["network"]),
            secrets=secrets_of(plan["secrets"]),
            image=info.image,
        )

    @abstractmethod
    def _info(self, name: str) -> MachineInfo: ...

    @abstractmethod
    def _ask(self, info: MachineInfo, what: str) -> dict[str, Any]: ...

    @abstractmethod
    def _plan(
        self, info: MachineInfo, question: str, variant: Variant
    ) -> tuple[dict[str, Any], float]: ...

    @abstractmethod
    def _made(
        self, info: MachineInfo, variant: Variant, part: str | None = None
    ) -> tuple[dict[str, Any], float, float]: ...


def _existing(path: str) -> Path | None:
    # Where the image was fetched, what it was made of need not be here.
    return Path(path) if Path(path).exists() else None


def _size(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None  # "auto"
