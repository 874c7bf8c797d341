"""The EFI firmware for QEMU that this computer has.

Who installs one also installs a description of it, which says for what it is:
https://gitlab.com/qemu-project/qemu/-/blob/master/docs/interop/firmware.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import MissingProgramError

# As the specification has it, but for a user's own: of files with one name the first counts, and an
# empty one stands for none.
_PLACES = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
_ARCHITECTURE, _MACHINE = "x86_64", "pc-q35-*"
# With these it would boot only what somebody has signed, or wants another machine.
_NOT = frozenset({"requires-smm", "secure-boot", "enrolled-keys"})


@dataclass(frozen=True)
class Firmware:
    """Two flash chips: the firmware, which is only read, and its variables, to be copied."""

    code: Path
    variables: Path


def find_firmware(qemu: Path, name: str) -> Firmware:
    """Return the EFI firmware for a guest of that QEMU; that of its own package comes first.

    Raises `MissingProgramError` without one; `name` is who needs it.
    """
    own = qemu.resolve().parent.parent / "share" / "qemu"
    for found in (*_described(own / "firmware"), *_described(*_PLACES)):
        return found
    # QEMU's own build of it, where the descriptions were left out.
    ours = Firmware(own / "edk2-x86_64-code.fd", own / "edk2-i386-vars.fd")
    if ours.code.is_file() and ours.variables.is_file():
        return ours
    raise MissingProgramError(
        f"{name} boots with EFI, and there is no EFI firmware for QEMU (OVMF) here, in "
        f"{', '.join(map(str, dict.fromkeys((own / 'firmware', *_PLACES))))}. Install it (Debian "
        "and Ubuntu: ovmf, Fedora: edk2-ovmf), or take a format that boots with a BIOS, such as "
        "qcow2."
    )


def _described(*directories: Path) -> Iterator[Firmware]:
    files: dict[str, Path] = {}
    for file in (file for directory in directories for file in directory.glob("*.json")):
        files.setdefault(file.name, file)
    for _, file in sorted(files.items()):
        try:
            found = _usable(json.loads(file.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not for us to complain of
        if found is not None and found.code.is_file() and found.variables.is_file():
            yield found


def _usable(description: dict[str, Any]) -> Firmware | None:
    mapping = description["mapping"]
    fits = any(
        target["architecture"] == _ARCHITECTURE and _MACHINE in target["machines"]
        for target in description["targets"]
    )
    if (
        not fits
        or "uefi" not in description["interface-types"]
        or _NOT & set(description["features"])
        or mapping["device"] != "flash"
        or mapping.get("mode", "split") != "split"
        or any(mapping[part]["format"] != "raw" for part in ("executable", "nvram-template"))
    ):
        return None
    return Firmware(
        Path(mapping["executable"]["filename"]), Path(mapping["nvram-template"]["filename"])
    )
