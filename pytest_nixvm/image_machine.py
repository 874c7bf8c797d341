"""How a machine is started from its image: what nix knows of it, on the QEMU that there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm.flake.images import ImageMachine
from pytest_nixvm.qemu import image_script
from pytest_nixvm.qemu.accelerator import on_path
from pytest_nixvm.qemu.firmware import find_firmware

QEMU = "qemu-system-x86_64"


@dataclass(frozen=True)
class _Hardware:
    """What the disk in an image is, and what the machine has that the image is for."""

    disk: str  # as QEMU calls the format
    bus: str = "virtio"  # or sata
    card: str = "virtio-net-pci"


_DISK = _Hardware("qcow2")
_HARDWARE = {
    "raw": _Hardware("raw"),
    "raw-efi": _Hardware("raw"),
    "iso": _Hardware("raw"),
    # nixpkgs' appliance has a virtio card.
    "ova": _Hardware("vmdk", bus="sata"),
    "vmdk": _Hardware("vmdk", bus="sata", card="e1000"),
}
_MEMORY, _CORES, _DISK_SIZE = 1024, 1, 10240  # MiB, where the configuration says nothing


def start_script(machine: ImageMachine) -> str:
    """Return the script that starts a machine from its image.

    Raises:
        FlakeError: an image that has no disk in it.
        MissingProgramError: no QEMU, or no EFI firmware for it.
    """
    hardware = _HARDWARE.get(machine.format, _DISK)
    program = _program(machine.qemu)
    firmware = find_firmware(program, machine.name) if machine.efi else None
    if machine.image is None:
        return ""
    guest = image_script.Guest(
        name=machine.host,
        image=machine.image,
        format=machine.format,
        disk_format=hardware.disk,
        bus=hardware.bus,
        card=hardware.card,
        memory=machine.memory or _MEMORY,
        cores=machine.cores or _CORES,
        disk_size=machine.disk_size or _DISK_SIZE,
        graphics=machine.graphics,
        firmware=firmware,
        # A disk in a format that QEMU can't freeze is copied into one that it can.
        copied=machine.freezable and hardware.disk == "vmdk",
    )
    return image_script.make(guest, program)


def _program(package: Path | None) -> Path:
    if package is not None and (package / "bin" / QEMU).exists():
        return package / "bin" / QEMU
    return on_path(QEMU, "the machine's VM")
