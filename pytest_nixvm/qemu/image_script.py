"""The script that starts a machine from its image.

It is to its caller what nixpkgs' qemu-vm.nix makes of a machine: the same variables say where its
disk is and what QEMU gets besides, and arguments go to QEMU. The image itself is never written to:
the disk is an overlay over it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from pytest_nixvm.errors import FlakeError
from pytest_nixvm.qemu.firmware import Firmware

_SECTOR = 512

_BEGIN = """\
#!/bin/sh
# {name}, booted from its own image: {format}.
set -e

NIX_DISK_IMAGE=$(readlink -f "${{NIX_DISK_IMAGE:-./{name}-{format}.qcow2}}")
if [ -z "$TMPDIR" ] || [ -z "$USE_TMPDIR" ]; then
    TMPDIR=$(mktemp -d nix-vm.XXXXXXXXXX --tmpdir)
fi
"""

# $disk is on the machine's side, the argument of -b on the image's.
_MAKE = {
    "overlay": "{img} create -q -f qcow2 -b {image} -F {format} {disk}",
    "copy": "{img} convert -f {format} -O qcow2 {image} {disk}.new\n    mv {disk}.new {disk}",
    "scratch": "{img} create -q -f qcow2 {disk} {size}M",
}
_DISK = """
if ! test -e {disk}; then
    {make}
fi
"""
_VARIABLES = """
NIX_EFI_VARS=$(readlink -f "${{NIX_EFI_VARS:-./{name}-{format}-efi-vars.fd}}")
if ! test -e "$NIX_EFI_VARS"; then
    cp {variables} "$NIX_EFI_VARS"
    chmod 0644 "$NIX_EFI_VARS"
fi
"""
_START = """
cd "$TMPDIR"
exec {qemu} {options} \\
    $QEMU_OPTS \\
    "$@"
"""


@dataclass(frozen=True)
class Guest:
    """A machine's image, and the hardware that it is given. Sizes in MiB."""

    name: str
    image: Path
    format: str  # qcow2, iso, ova, …
    disk_format: str  # of the disk in it, as QEMU calls it
    bus: str  # virtio or sata
    card: str  # of the network
    memory: int
    cores: int
    disk_size: int  # of the empty disk that a medium is given
    graphics: bool
    firmware: Firmware | None  # None: a BIOS
    copied: bool = False  # whether the disk is a copy, not an overlay


def make(guest: Guest, qemu: Path) -> str:
    """Return the script. Raises `FlakeError` for an image that has no disk in it."""
    img = quote(str(qemu.parent / "qemu-img"))
    text = _BEGIN.format(name=guest.name, format=guest.format)
    options = [
        f"-machine {'q35' if guest.bus == 'sata' or guest.firmware else 'pc'},accel=kvm:tcg",
        "-cpu max",
        f"-name {quote(guest.name)}",
        f"-m {guest.memory}",
        f"-smp {guest.cores}",
        "-device virtio-rng-pci",
        '-netdev user,id=user.0,"$QEMU_NET_OPTS"',
        f"-device {guest.card},netdev=user.0",
    ]
    if guest.firmware is not None:
        text += _VARIABLES.format(
            name=guest.name, format=guest.format, variables=quote(str(guest.firmware.variables))
        )
        code = _value(guest.firmware.code)
        options += [
            f"-drive if=pflash,unit=0,format=raw,readonly=on,file={code}",
            '-drive if=pflash,unit=1,format=raw,file="$NIX_EFI_VARS"',
        ]
    if guest.format == "iso":
        options.append(
            f"-drive file={_value(guest.image)},format=raw,media=cdrom,readonly=on,if=none,"
            "id=medium -device ide-cd,drive=medium,bootindex=1"
        )
    for number, image in enumerate(_disks(guest)):
        disk = '"$NIX_DISK_IMAGE"' if number == 0 else f'"$NIX_DISK_IMAGE-{number}"'
        way = "scratch" if guest.format == "iso" else "copy" if guest.copied else "overlay"
        making = _MAKE[way].format(
            img=img, image=quote(image), format=guest.disk_format, disk=disk, size=guest.disk_size
        )
        text += _DISK.format(disk=disk, make=making)
        options.append(_attached(guest, number, disk))
    if not guest.graphics:
        options.append("-nographic")
    return text + _START.format(qemu=quote(str(qemu)), options=" \\\n    ".join(options))


def _attached(guest: Guest, number: int, disk: str) -> str:
    identity = "root" if number == 0 else f"disk{number}"
    place = number + (2 if guest.format == "iso" else 1)
    drive = f"-drive file={disk},format=qcow2,if=none,id={identity},cache=writeback,werror=report"
    device = f"ide-hd,bus=ide.{number}" if guest.bus == "sata" else "virtio-blk-pci"
    return f"{drive} -device {device},drive={identity},bootindex={place},serial={identity}"


def _disks(guest: Guest) -> list[str]:
    """Return the disks as QEMU finds them, the one with the system first."""
    if guest.format == "iso":
        return [""]
    if guest.format != "ova":
        return [str(guest.image)]
    found = list(_in_archive(guest.image))
    if not found:
        raise FlakeError(f"{guest.image} has no VMDK in it.")
    return found


def _in_archive(archive: Path) -> Iterator[str]:
    """Find the disks in an OVA: a tar holds them as they are, so QEMU reads them in their place.

    https://www.dmtf.org/sites/default/files/standards/documents/DSP0243_2.1.1.pdf, section 5.3
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(".vmdk"):
                    size = -(-member.size // _SECTOR) * _SECTOR  # the tar's padding is zeros
                    file = {"driver": "file", "filename": str(archive)}
                    part = {
                        "driver": "raw",
                        "offset": member.offset_data,
                        "size": size,
                        "file": file,
                    }
                    yield "json:" + json.dumps({"driver": "vmdk", "file": part})
    except (OSError, tarfile.TarError) as error:
        raise FlakeError(f"{archive} is no archive that an OVA would be: {error}") from None


def _value(path: Path) -> str:
    return quote(str(path).replace(",", ",,"))
