"""Images of machines: their formats, and what is known of one that was built.

nixpkgs builds them (`system.build.images`, since 25.05). `FORMATS` has the names that people know
them by; nixpkgs' own names are understood as well. A machine's name with one, `dev-vm@qcow2`, is a
machine of its own: one that boots from that image.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import FlakeError, NothingToTestError
from pytest_nixvm.flake.build import MachineInfo, Override
from pytest_nixvm.flake.variant import Variant, as_json
from pytest_nixvm.flake.words import listed, near, nix_list, nix_string, nix_value


@dataclass(frozen=True)
class Format:
    """A format: nixpkgs' name for it."""

    variant: str
    what: str


FORMATS: Mapping[str, Format] = {
    "qcow2": Format("qemu", "disk for QEMU, libvirt, Proxmox; boots with a BIOS"),
    "raw": Format("raw", "disk to be written to a drive as it is; boots with a BIOS"),
    "iso": Format("iso", "medium that starts the system, with its root in memory"),
    "ova": Format("virtualbox", "appliance for VirtualBox"),
    "vmdk": Format("vmware", "disk for VMware; boots with EFI"),
    "qcow2-efi": Format("qemu-efi", "disk for QEMU; boots with EFI"),
    "raw-efi": Format("raw-efi", "disk to be written to a drive; boots with EFI"),
}

# Names that they had, or have elsewhere, in small letters.
_ALIASES = {
    "qemu": "qcow2",
    "virtualbox": "ova",
    "virtualboxova": "ova",
    "vmware": "vmdk",
    "vmwareimage": "vmdk",
    "isoimage": "iso",
    "qemu-efi": "qcow2-efi",
}
NAMES = (*FORMATS, *(name for name in _ALIASES if name not in FORMATS))
"""All that a format is called, besides nixpkgs' names of formats that are not booted."""


@dataclass(frozen=True)
class ImageBuild:
    """A machine's image, built and safe from garbage collection."""

    name: str  # dev-vm
    format: str  # qcow2
    file: Path  # the image itself, in the store
    output: Path  # the derivation's output
    toplevel: Path | None  # the system in it
    overrides: tuple[Override, ...]
    seconds: float = 0.0  # spent evaluating and building, 0 if it was there


@dataclass(frozen=True)
class ImageMachine:
    """A machine that boots from its image, as far as nix knows. Sizes in MiB; None: it is not said.

    What starts it is not made here: that takes a QEMU.
    """

    name: str  # dev-vm@qcow2
    host: str  # what it calls itself
    image: Path | None  # None: it is not built yet
    format: str
    memory: int | None
    cores: int | None
    disk_size: int | None
    graphics: bool
    efi: bool
    qemu: Path | None  # the package that the machine's own VM has
    freezable: bool


# --- names -------------------------------------------------------------------------------------


def known_as(text: str) -> str:
    """Return the usual name of a format, or `text` where that is none: nixpkgs may have more."""
    low = text.lower()
    return low if low in FORMATS else _ALIASES.get(low, text)


def variant_of(text: str) -> str:
    """Return nixpkgs' name of a format."""
    name = known_as(text)
    return FORMATS[name].variant if name in FORMATS else name


def offered(variants: Iterable[str]) -> list[str]:
    """Return formats by their usual names, these first, of nixpkgs' names."""
    there = set(variants)
    usual = [name for name, each in FORMATS.items() if each.variant in there]
    return [*usual, *sorted(there - {each.variant for each in FORMATS.values()})]


def split(name: str) -> tuple[str, str | None]:
    """Take `dev-vm@qcow2` apart; None where no format is named."""
    machine, _, text = name.rpartition("@")
    # A quote would be the end of an attribute that is called so.
    return (machine, text) if machine and text and '"' not in text else (name, None)


def plain(name: str) -> str:
    """Return the machine's name without a format."""
    return split(name)[0]


def unchanging(name: str) -> NothingToTestError:
    """Return the error for a change that is to be tested on an image."""
    return NothingToTestError(
        f"{name} is an image: a change to another generation is tested on {plain(name)} itself."
    )


def machine_of(info: MachineInfo, text: str) -> MachineInfo:
    """Return the machine that boots from an image of `info`, in the format that `text` names.

    Raises `FlakeError` for a format that QEMU would not boot.
    """
    name = known_as(text)
    if name not in FORMATS:
        raise FlakeError(
            f"{info.name}@{text}: there is no image format {text!r} that could be booted"
            f"{near(text.lower(), list(FORMATS))} There are: {', '.join(FORMATS)}."
        )
    return replace(info, name=f"{info.name}@{text}", image=name)


def find(machines: Sequence[MachineInfo], name: str) -> MachineInfo | None:
    """Return the machine of that name, or with that name and a format. None if there is none.

    Raises `FlakeError` as `machine_of`.
    """
    by_name = {machine.name: machine for machine in machines}
    if name in by_name:
        return by_name[name]
    base, text = split(name)
    if text is None or base not in by_name or by_name[base].image is not None:
        return None
    return machine_of(by_name[base], text)


def matching(machines: Sequence[MachineInfo], glob: str) -> list[MachineInfo]:
    """Return the machines that a glob selects; one like `*-vm@qcow2` selects images of them.

    Raises `FlakeError` as `machine_of`.
    """
    found = [each for each in machines if fnmatch.fnmatchcase(each.name, glob)]
    base, text = split(glob)
    if found or text is None:
        return found
    formats = [name for name in FORMATS if fnmatch.fnmatchcase(name, text)] or [text]
    return [
        machine_of(each, name)
        for each in machines
        if each.image is None and fnmatch.fnmatchcase(each.name, base)
        for name in formats
    ]


# --- what nix is asked -------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageVariant(Variant):
    """What is asked of an image's build. `adapted`: with what lets the tests in."""

    image: str = ""  # nixpkgs' name of the format
    adapted: bool = False

    @property
    def words(self) -> list[str]:
        """What tells it from another one, for names of logs and questions."""
        adapted = ["adapted"] if self.adapted else []
        return ["image", self.image, *adapted, *(["secrets"] if self.secrets else [])]

    def expression(self, attribute: Sequence[str]) -> str:
        """Return the question as modules/target.nix takes it."""
        return (
            f"this.image {{ variant = {nix_string(self.image)}; "
            f"adapted = {nix_value(self.adapted)}; "
            f"secrets = builtins.fromJSON {nix_string(as_json(self.secrets))}; }} "
            f"{nix_list(attribute)}"
        )

    def check(self, plan: Mapping[str, Any], what: str) -> None:
        """Raise `FlakeError` where there is no such image, or none that could be booted."""
        if not plan.get("noImage"):
            if self.adapted:
                _check_bootable(plan, what)
            return
        formats = formats_of(plan, what)
        asked = next((n for n, each in FORMATS.items() if each.variant == self.image), self.image)
        raise FlakeError(
            f"There is no image of {what} in the format {asked!r}{near(asked.lower(), formats)} "
            f"There are: {listed(formats, 40)}."
        )


def formats_of(plan: Mapping[str, Any], what: str) -> list[str]:
    """Return the formats that there are images in. Raises `FlakeError` where there are none."""
    variants: list[str] | None = plan["images"]
    if variants is None:
        raise FlakeError(f"{what} is no NixOS configuration: there are no images of it.")
    if not variants and plan["own"]:
        raise FlakeError(
            f"{what} is an image itself: a module that it imports makes its "
            "config.system.build.image, and nixpkgs has no other images of such a machine. "
            "Build that one by nix build, or leave the module out: system.build.images needs none."
        )
    if not variants:
        raise FlakeError(
            f"There are no images of {what}: its nixpkgs is older than 25.05, and has no "
            "system.build.images."
        )
    return offered(variants)


def _check_bootable(plan: Mapping[str, Any], what: str) -> None:
    system = plan["system"] or "x86_64-linux"
    if system != "x86_64-linux":
        raise FlakeError(f"{what}: only images for x86_64-linux are booted, not {system}.")
    if Path(plan["filePath"] or "").suffix in _COMPRESSED:
        raise FlakeError(
            f"The image of {what} is compressed ({Path(plan['filePath']).name}), and nothing boots "
            "from that. Turn it off: for an ISO, isoImage.compressImage in image.modules.iso."
        )


def file_of(plan: Mapping[str, Any]) -> Path:
    """Return the image's file in a build. Raises `FlakeError` if there is none."""
    output = Path(plan["output"])
    file = output / (plan["filePath"] or "")
    if file.is_file():
        return file
    found = [path for path in sorted(output.rglob("*")) if path.suffix[1:] in _SUFFIXES]
    if len(found) == 1:
        return found[0]
    raise FlakeError(f"What was built is no image that is understood: {file} is not there.")


_SUFFIXES = frozenset(
    {"qcow2", "img", "raw", "iso", "ova", "vmdk", "vdi", "vhd", "vhdx", "gz", "xz", "zst"}
)
_COMPRESSED = frozenset({".gz", ".xz", ".zst", ".bz2"})
