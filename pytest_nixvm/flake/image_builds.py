"""The side of a flake that makes images, and machines that boot from them."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import FlakeError, MissingProgramError
from pytest_nixvm.flake import image_script, images
from pytest_nixvm.flake.build import MachineInfo, Secret, VmBuild
from pytest_nixvm.flake.evaluation import Evaluator
from pytest_nixvm.flake.firmware import find_firmware
from pytest_nixvm.flake.images import FORMATS, ImageBuild, ImageVariant
from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.flake.places import Cache
from pytest_nixvm.flake.slirp import network_options
from pytest_nixvm.flake.variant import Variant, overrides_of, secrets_of

QEMU = "qemu-system-x86_64"
_MEMORY, _DISK_SIZE = 1024, 10240  # MiB, where the configuration says nothing


class ImageBuilds(ABC):
    """Images of a flake's machines."""

    nix: Nix
    _cache: Cache
    _evaluator: Evaluator

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
        variants = self._ask(self._info(name), "images")["images"]
        return images.offered(variants or ())

    def _image_vm(self, info: MachineInfo, freezable: bool, secrets: Sequence[Secret]) -> VmBuild:
        """Build the VM that boots from a machine's image. Raises as `Flake.build`."""
        form = FORMATS[str(info.image)]
        variant = ImageVariant(secrets=tuple(secrets), image=form.variant, adapted=True)
        plan, evaluated, built = self._made(info, variant)
        qemu = plan["hardware"]["qemu"]
        if plan["qemu"] is not None:  # the package that the machine's own VM has
            _, _, fetched = self._made(info, variant, "qemu")
            built += fetched
        system = plan["system"] or info.system or self.nix.system
        if system != "x86_64-linux":
            raise FlakeError(f"{info.name}: only images for x86_64-linux are booted, not {system}.")
        program = _program(qemu)
        file = images.file_of(plan)
        script = image_script.make(
            image_script.Guest(
                name=plan["hardware"]["name"],
                image=file,
                format=str(info.image),
                disk_format=form.disk,
                bus=form.bus,
                memory=plan["hardware"]["memory"] or _MEMORY,
                cores=plan["hardware"]["cores"] or 1,
                disk_size=_size(plan["hardware"]["diskSize"]),
                graphics=plan["hardware"]["graphics"],
                firmware=find_firmware(program, info.name) if plan["efi"] else None,
                # A disk in a format that QEMU can't freeze is copied into one that it can.
                copied=freezable and form.disk == "vmdk",
            ),
            program,
        )
        return VmBuild(
            name=info.name,
            attribute=info.attribute,
            start_script=self._cache.script(f"run-{plan['hardware']['name']}-vm", script),
            output=Path(plan["output"]),
            toplevel=_existing(plan["toplevel"]),
            system=system,
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
    def _made(
        self, info: MachineInfo, variant: Variant, part: str | None = None
    ) -> tuple[dict[str, Any], float, float]: ...


def _program(package: str | None) -> Path:
    """Return the QEMU of a package, or of this computer. Raises `MissingProgramError`."""
    if package is not None and (Path(package) / "bin" / QEMU).exists():
        return Path(package) / "bin" / QEMU
    found = shutil.which(QEMU)
    if found is None:
        raise MissingProgramError(
            f"{QEMU} is not on PATH, and the machine's VM names no other QEMU. Install QEMU "
            "(Debian: qemu-system-x86, NixOS: pkgs.qemu)."
        )
    return Path(found)


def _existing(path: str) -> Path | None:
    # Where the image was fetched, what it was made of need not be here.
    return Path(path) if Path(path).exists() else None


def _size(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else _DISK_SIZE
