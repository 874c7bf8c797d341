"""KVM or TCG: decided by a trial, since /dev/kvm may open and then abort or hang.

In a container or a nested VM, opening /dev/kvm and even creating a VM with it may succeed where
QEMU then dies of an assertion ("error: failed to set MSR …") or hangs at the guest's first
instruction. Only running a guest tells. The trial boots half a kilobyte, with the options that
NixOS's start scripts use, and takes a fraction of a second. Its result is remembered.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_nixvm.errors import MissingProgramError, QemuError, SettingsError
from pytest_nixvm.qemu.supervisor import Supervisor, describe_status

KVM_DEVICE = Path("/dev/kvm")
TRIAL_TIMEOUT = 5.0  # seconds; with working KVM it takes 0.2
# A trial that failed is believed for a day only: it may have been the machine's load.
_FAILURE_LIFETIME = 24 * 3600.0

# A boot sector. The firmware (SeaBIOS) loads it to 0000:7c00 in real mode and jumps there.
#
#   7c00  b0 2a      mov  al, 0x2a
#   7c02  e6 f4      out  0xf4, al     ; isa-debug-exit: QEMU exits with (0x2a << 1) | 1 = 85
#   7c04  f4         hlt               ; not reached
#   7c05  eb fd      jmp  0x7c04
#   …
#   7dfe  55 aa                        ; the signature that makes it bootable
BOOT_SECTOR = bytes.fromhex("b02a e6f4 f4 ebfd").ljust(510, b"\0") + b"\x55\xaa"
_GOOD_STATUS = (0x2A << 1) | 1

_X86 = ("x86_64", "i386", "i686")


@dataclass(frozen=True)
class Accelerator:
    """What runs the guest's instructions, and why that one."""

    name: Literal["kvm", "tcg"]
    reason: str


def find_qemu(start_script: Path) -> Path:
    """Return the QEMU binary that a start script will run.

    That is the first absolute path to a qemu-system-* or qemu-kvm in its text, else a
    qemu-system-* of its text or of this machine on PATH. Raises `MissingProgramError` if it is not
    there.
    """
    try:
        text = start_script.read_text(errors="replace")
    except OSError as error:
        raise MissingProgramError(f"The start script can't be read: {error}") from None
    match = re.search(r"(?<![\w./-])(/[^\s\"'`$;|&()<>]*/(?:qemu-system-[\w-]+|qemu-kvm))\b", text)
    if match:
        qemu = Path(match[1])
        if not qemu.exists():
            raise MissingProgramError(
                f"{start_script} runs {qemu}, which does not exist. "
                "If it is in the Nix store, build the machine again; else install QEMU."
            )
        return qemu
    name = re.search(r"(?<![\w./-])(qemu-system-[\w-]+|qemu-kvm)\b", text)
    program = name[1] if name else f"qemu-system-{platform.machine()}"
    return on_path(program, str(start_script))


def on_path(program: str, who: str) -> Path:
    """Return the QEMU of that name on PATH, for `who`, who names none of its own.

    Raises `MissingProgramError` if there is none.
    """
    found = shutil.which(program)
    if found is None:
        raise MissingProgramError(
            f"{program} is not on PATH, and {who} names no other QEMU. Install QEMU "
            "(Debian: qemu-system-x86, NixOS: pkgs.qemu)."
        )
    return Path(found)


def architecture(qemu: Path) -> str:
    """Return the guest architecture of a QEMU binary by its name: "x86_64", "aarch64"."""
    match = re.search(r"qemu-system-([\w]+)", qemu.name)
    return match[1] if match else platform.machine()


def choose(qemu: Path, requested: str, cache: Path) -> Accelerator:
    """Return the accelerator for `requested`: "auto", "kvm" or "tcg".

    "tcg" is taken as it is. "kvm" and "auto" run the trial, unless its result for this binary,
    kernel, boot and access to /dev/kvm is in `cache`; "kvm" believes only a good one of those.
    Then "auto" falls back to TCG with the reason, and "kvm" raises `SettingsError` with it.

    The trial exists for x86 guests only. For others KVM is taken if /dev/kvm answers
    KVM_GET_API_VERSION, which proves less.
    """
    if requested == "tcg":
        return Accelerator("tcg", "asked for")
    if requested not in ("auto", "kvm"):
        raise SettingsError(f"Unknown accelerator {requested!r}: use auto, kvm or tcg.")
    trouble = _unusable(qemu)
    reason = "/dev/kvm answers (not tried: no trial for this architecture)"
    if trouble is None and architecture(qemu) in _X86:
        key = _key(qemu)
        remembered = _remembered(cache, key)
        if remembered is not None and (remembered.name == "kvm" or requested == "auto"):
            return remembered
        trouble = trial(qemu, "kvm", TRIAL_TIMEOUT)
        reason = "a trial guest ran"
        result = Accelerator("kvm", reason) if trouble is None else Accelerator("tcg", trouble)
        _remember(cache, key, result)
    if trouble is None:
        return Accelerator("kvm", reason)
    if requested == "kvm":
        raise SettingsError(
            f"KVM was asked for, but does not work here: {trouble}. Use auto or tcg (slower)."
        )
    return Accelerator("tcg", trouble)


def _unusable(qemu: Path) -> str | None:
    """Return what can be seen without a trial, None if it may work."""
    if architecture(qemu) != platform.machine() and not (
        architecture(qemu) in _X86 and platform.machine() in _X86
    ):
        return f"KVM can't run {architecture(qemu)} on {platform.machine()}"
    try:
        descriptor = os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"there is no {KVM_DEVICE}"
    except OSError as error:
        hint = ""
        if isinstance(error, PermissionError):
            hint = " (is the user in the group kvm?)"
        return f"{KVM_DEVICE} can't be opened: {error.strerror}{hint}"
    try:
        kvm_get_api_version = 0xAE00  # linux/kvm.h; 12 since 2007
        version = fcntl.ioctl(descriptor, kvm_get_api_version)
    except OSError as error:
        return f"{KVM_DEVICE} is not KVM: {error.strerror}"
    finally:
        os.close(descriptor)
    return None if version == 12 else f"{KVM_DEVICE} has API version {version}, not 12"


def trial(qemu: Path, accelerator: str, timeout: float) -> str | None:
    """Boot the boot sector and return None if it ran, else what happened instead.

    It runs under a supervisor of its own, so that a QEMU that hangs does not outlive us either.
    """
    try:
        supervisor = Supervisor()
    except QemuError as error:
        return str(error)
    try:
        directory = supervisor.make_directory(Path(tempfile.gettempdir()), "nixvm-trial-")
        disk, log = directory / "disk", directory / "log"
        disk.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))  # a disk must have a cylinder
        process = supervisor.spawn(
            [
                str(qemu), "-machine", f"accel={accelerator}", "-cpu", "max", "-m", "32",
                "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-drive", f"file={str(disk).replace(',', ',,')},format=raw",
                "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04",
            ],
            env=_environment(os.environ),
            cwd=directory,
            log=log,
        )  # fmt: skip
        try:
            status = process.wait(timeout)
        except TimeoutError:
            return f"a trial guest hung (stopped after {timeout:g} s)"
        if status == _GOOD_STATUS:
            return None
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"a trial guest ended with {describe_status(status)}" + (
            f" ({said[0].strip()})" if said else ""
        )
    except (OSError, QemuError) as error:
        return f"the trial could not be made: {error}"
    finally:
        supervisor.close()


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("QEMU_")}


# --- memory -----------------------------------------------------------------------------------


def _key(qemu: Path) -> dict[str, Any]:
    """Return everything whose change calls for another trial."""
    binary, device = qemu.resolve().stat(), KVM_DEVICE.stat()
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {
        "qemu": [str(qemu.resolve()), binary.st_mtime_ns, binary.st_size],
        "kernel": platform.release(),
        "boot": boot,
        "device": [device.st_mode, device.st_uid, device.st_gid, device.st_rdev],
        "user": [os.geteuid(), sorted(os.getgroups())],
        "trial": BOOT_SECTOR[:16].hex(),
    }


def _remembered(cache: Path, key: Mapping[str, Any]) -> Accelerator | None:
    # Whatever is wrong with the file, the answer is another trial.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        entry = json.loads((cache / "accelerator.json").read_text())[key["qemu"][0]]
        if entry["key"] == dict(key):
            if entry["name"] == "kvm":
                return Accelerator("kvm", f"{entry['reason']} (remembered)")
            if 0 <= time.time() - entry["time"] < _FAILURE_LIFETIME:
                return Accelerator("tcg", f"{entry['reason']} (remembered)")
    return None


def _remember(cache: Path, key: Mapping[str, Any], result: Accelerator) -> None:
    # One entry a binary. A cache that can't be written costs a trial a session, no more.
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / "accelerator.json"
        entries: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            loaded = json.loads(path.read_text())
            if isinstance(loaded, dict):
                entries = loaded
        entries[key["qemu"][0]] = {
            "key": dict(key),
            "name": result.name,
            "reason": result.reason,
            "time": time.time(),
        }
        with tempfile.NamedTemporaryFile("w", dir=cache, prefix=".acc", delete=False) as file:
            json.dump(entries, file, indent=1)
        Path(file.name).replace(path)
