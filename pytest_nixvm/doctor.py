"""What this computer lacks for VMs, what that means, and how to mend it.

Each subject is a function that looks and returns a `Finding`; none changes anything but the
remembered result of the KVM trial. `doctor_nix` has the subjects that nix knows about.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pytest_nixvm import memory
from pytest_nixvm.errors import MissingProgramError, NixvmError
from pytest_nixvm.qemu.accelerator import KVM_DEVICE, choose
from pytest_nixvm.qemu.firmware import find_firmware

State = Literal["ok", "warn", "fail"]

OLDEST_QEMU = (7, 2)
_GIB = 2**30
_TIMEOUT = 30  # seconds that a program may take to say what it is

_SOCKET_PATH = 107  # bytes, without the closing zero: unix(7)
_BELOW = 60  # what a session puts behind the temporary directory, at most
_SYS_MODULES = Path("/sys/module")
_DENIED = "Permission denied"


@dataclass(frozen=True)
class Finding:
    """What was seen of one subject.

    `meaning` says what comes of it, `mend` what to do: pairs of where ("NixOS", "Debian", "" for
    everywhere) and a command or a setting. Both are empty where all is well.
    """

    subject: str  # KVM
    state: State
    seen: str  # what is there
    meaning: str = ""
    mend: tuple[tuple[str, str], ...] = field(default=())


def kvm(qemu: Path | None, cache: Path) -> Finding:
    """Look whether this user can use KVM, by running a guest."""
    qemu = qemu or _used_before(cache)
    slower = "QEMU emulates the processor (TCG): all works, some ten times slower."
    if qemu is None:
        if os.access(KVM_DEVICE, os.R_OK | os.W_OK):
            seen = f"{KVM_DEVICE} may be used (not tried: there is no QEMU to try it with)"
            return Finding("KVM", "ok", seen)
        there = KVM_DEVICE.exists()
        seen = f"{KVM_DEVICE} can't be opened: {_DENIED}" if there else f"there is no {KVM_DEVICE}"
        return Finding("KVM", "warn", seen, slower, _mend_kvm(seen))
    try:
        chosen = choose(qemu, "auto", cache)
    except NixvmError as error:
        return Finding("KVM", "warn", str(error), slower, _mend_kvm(str(error)))
    if chosen.name == "kvm":
        return Finding("KVM", "ok", chosen.reason)
    return Finding("KVM", "warn", chosen.reason, slower, _mend_kvm(chosen.reason))


def _used_before(cache: Path) -> Path | None:
    """Return a QEMU that tests have used, in the Nix store, say: where the trials are kept."""
    try:
        known = json.loads((cache / "accelerator.json").read_text())
        return next((path for path in map(Path, known) if os.access(path, os.X_OK)), None)
    except (OSError, ValueError, TypeError):
        return None


def _mend_kvm(reason: str) -> tuple[tuple[str, str], ...]:
    # The device may be there before its driver is: udev makes it, so that opening it loads that.
    if not KVM_DEVICE.exists() or "No such device" in reason:
        flags = _read("/proc/cpuinfo")
        found = re.search(r"^flags.*\b(vmx|svm)\b", flags, re.MULTILINE)
        if found and any((_SYS_MODULES / name).exists() for name in ("kvm_intel", "kvm_amd")):
            return (("", "in a container, pass the device: --device /dev/kvm"),)
        if found:
            maker = "intel" if found[1] == "vmx" else "amd"
            return (
                ("NixOS", f'boot.kernelModules = [ "kvm-{maker}" ];'),
                ("Debian", f"sudo modprobe kvm_{maker}"),
            )
        if re.search(r"^flags.*\bhypervisor\b", flags, re.MULTILINE):
            return (
                (
                    "",
                    "this is a VM: turn on nested virtualisation on its host (kvm_intel nested=1)",
                ),
                ("", "in a container, pass the device: --device /dev/kvm"),
            )
        return (("", "turn on VT-x or AMD-V in the computer's firmware set-up"),)
    if _DENIED in reason:
        user = os.environ.get("USER") or "USER"
        return (
            ("NixOS", f'users.users.{user}.extraGroups = [ "kvm" ];'),
            ("Debian", f"sudo usermod -aG kvm {user}    (then log in again)"),
        )
    return (("", "nested virtualisation is broken here: use another host, or --nixvm-accel=tcg"),)


def qemu(found: Path | None, name: str) -> Finding:
    """Look at the QEMU on PATH and the `qemu-img` beside it."""
    mend = (
        ("NixOS", "environment.systemPackages = [ pkgs.qemu ];   (or: nix shell nixpkgs#qemu)"),
        ("Debian", f"sudo apt-get install {_debian_qemu()} qemu-utils"),
    )
    if found is None:
        return Finding(
            "QEMU",
            "warn",
            f"{name} is not on PATH",
            "The VMs of nixpkgs bring their own QEMU; images, and KVM's trial here, need one.",
            mend,
        )
    said = said_by([str(found), "--version"])
    version = re.search(r"version (\d+)\.(\d+)(?:\.\d+)*", said)
    if version is None:
        seen = f"{found} does not say its version: {first_line(said)}"
        return Finding("QEMU", "fail", seen, "It does not run.", mend)
    seen = f"{version[0].removeprefix('version ')} ({found})"
    if (int(version[1]), int(version[2])) < OLDEST_QEMU:
        oldest = ".".join(map(str, OLDEST_QEMU))
        meaning = f"Freezing and cloning VMs is tried with {oldest} and newer."
        return Finding("QEMU", "warn", seen, meaning, mend)
    if not (found.parent / "qemu-img").exists() and shutil.which("qemu-img") is None:
        meaning = "Disks of VMs are made with it: clones, images and kept disks can't be."
        return Finding("QEMU", "fail", f"{seen}, but no qemu-img", meaning, mend)
    return Finding("QEMU", "ok", seen)


def firmware(found: Path | None) -> Finding:
    """Look for the firmware that images with EFI boot from."""
    try:
        chips = find_firmware(found or Path("/usr/bin/qemu"), "")
    except MissingProgramError:
        return Finding(
            "EFI firmware",
            "warn",
            "none was found beside QEMU or on this computer",
            "Images of the formats vmdk, qcow2-efi and raw-efi can't be booted.",
            (
                ("NixOS", "pkgs.qemu brings it"),
                ("Debian", "sudo apt-get install ovmf"),
            ),
        )
    return Finding("EFI firmware", "ok", str(chips.code))


def program(name: str, arguments: Sequence[str], meaning: str, package: str) -> Finding:
    """Look for a program on PATH."""
    found = shutil.which(name)
    if found is not None:
        return Finding(name, "ok", f"{first_line(said_by([found, *arguments]))} ({found})")
    mend = (
        ("NixOS", f"environment.systemPackages = [ pkgs.{package.replace('-client', '')} ];"),
        ("Debian", f"sudo apt-get install {package}"),
    )
    return Finding(name, "warn", "not on PATH", meaning, mend)


def memory_for_vms() -> Finding:
    """Look how many VMs of 1 GiB could run at once."""
    free, whole = memory.available(), memory.total()
    one = memory.needs(1024, clone=False)
    seen = f"{free} MiB of {whole} MiB can be used"
    if free >= 2 * one:
        return Finding("memory", "ok", f"{seen}: {free // one} VMs of 1 GiB at once")
    meaning = (
        "Not even one VM of 1 GiB can run: what would not fit is refused."
        if free < one
        else "One VM of 1 GiB can run; tests with several wait for each other or are refused."
    )
    mend = (("", "end what takes memory, or give the machines less: --nixvm-memory=512"),)
    return Finding("memory", "fail" if free < one else "warn", seen, meaning, mend)


def disk(subject: str, directory: Path, least: int, good: int, mend: str) -> Finding:
    """Look at the room in the file system that has, or would have, `directory` (bytes)."""
    there = directory
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        usage = shutil.disk_usage(there)
    except OSError as error:
        return Finding(subject, "fail", f"{there} can't be looked at: {error.strerror}")
    inside = os.statvfs(there)
    seen = f"{usage.free / _GIB:.1f} GiB free in {directory}"
    if inside.f_files and inside.f_favail < 10_000:
        meaning = "Builds make many small files, and will fail."
        return Finding(subject, "fail", f"{inside.f_favail} inodes free in {there}", meaning,
                       (("", mend),))  # fmt: skip
    if usage.free >= good:
        return Finding(subject, "ok", seen)
    meaning = "Builds or VMs will end with a full disk."
    state: State = "fail" if usage.free < least else "warn"
    return Finding(subject, state, seen, meaning if state == "fail" else "It may get tight.",
                   (("", mend),))  # fmt: skip


def cache_directory(cache: Path) -> Finding:
    """Look whether the cache can be written, and at the room there."""
    there = cache
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        # Never what is above it: with a HOME that is not there, that is /.
        chown = f"sudo chown -R $USER {there}, or " if there == cache else ""
        mend = (("", f"{chown}name another: nixvm --cache DIR, pytest --nixvm-cache=DIR"),)
        meaning = "Nothing can be built or remembered."
        return Finding("cache", "fail", f"{there} can't be written", meaning, mend)
    return disk("cache", cache, _GIB, 5 * _GIB, "nixvm cache clear, or another --nixvm-cache=DIR")


def temporary_directory() -> Finding:
    """Look whether sockets below the temporary directory have names that are short enough."""
    where = tempfile.gettempdir()
    length = len(os.fsencode(where))
    if length + _BELOW <= _SOCKET_PATH:
        return Finding("temporary files", "ok", where)
    return Finding(
        "temporary files",
        "warn",
        f"{where} has {length} characters",
        f"A socket's path may have {_SOCKET_PATH} bytes; those of a VM may not fit.",
        (("", "export TMPDIR=/tmp"),),
    )


def limits() -> Finding:
    """Look at the limits of this process that a VM may run into."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    least = 8 * _GIB
    bad = []
    if files != resource.RLIM_INFINITY and files < 1024:
        bad.append(f"open files: {files} (ulimit -n)")
    if size != resource.RLIM_INFINITY and size < least:
        bad.append(f"size of a file: {size / _GIB:.1f} GiB (ulimit -f)")
    if space != resource.RLIM_INFINITY and space < least:
        bad.append(f"address space: {space / _GIB:.1f} GiB (ulimit -v)")
    if not bad:
        shown = "no limit" if files == resource.RLIM_INFINITY else str(files)
        return Finding("limits", "ok", f"open files: {shown}")
    mend = (
        ("NixOS", "raise them in security.pam.loginLimits"),
        ("Debian", "raise them in /etc/security/limits.conf"),
        ("", "or with ulimit, in this shell"),
    )
    return Finding("limits", "warn", "; ".join(bad), "QEMU may end in the middle of a test.", mend)


def leftovers(proc: Path = Path("/proc")) -> Finding:
    """Look for QEMU processes of ours whose supervisor is gone: there should never be one."""
    found = []
    for entry in proc.glob("[0-9]*"):
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            status = dict(
                line.split(":\t", 1) for line in (entry / "status").read_text().splitlines()
                if ":\t" in line
            )  # fmt: skip
        except OSError:
            continue
        is_qemu = b"qemu" in argv[0].rpartition(b"/")[2]
        ours = any(b"/nixvm-" in word for word in argv)
        mine = status.get("Uid", "").split("\t")[0] == str(os.getuid())
        # An orphan's parent is init, or whoever stands for it: a user's systemd, say.
        if is_qemu and ours and mine and not _supervises(proc / status.get("PPid", "0").strip()):
            found.append(entry.name)
    if not found:
        return Finding("leftovers", "ok", "no VM of an earlier session runs")
    pids = " ".join(sorted(found, key=int))
    return Finding(
        "leftovers",
        "warn",
        f"VMs without a session: pid {pids}",
        "They take memory. This is a bug of pytest-nixvm's: please report it.",
        (("", f"kill {pids}"),),
    )


def _supervises(entry: Path) -> bool:
    try:
        return b"_supervise.py" in (entry / "cmdline").read_bytes()
    except OSError:
        return False


def computer(cache: Path, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Look at everything but nix and the flake."""
    if platform.system() != "Linux":
        seen = f"{platform.system()} on {platform.machine()}"
        meaning = "VMs run on Linux only."
        return [Finding("system", "fail", seen, meaning, (("", "use a Linux computer or VM"),))]
    name = f"qemu-system-{platform.machine()}"
    path = shutil.which(name, path=environment.get("PATH"))
    found = None if path is None else Path(path)
    return [
        Finding("system", "ok", f"Linux {platform.release()} on {platform.machine()}"),
        qemu(found, name),
        kvm(found, cache),
        firmware(found),
        program("git", ["--version"], "Flakes in a git repository can't be read.", "git"),
        program("ssh", ["-V"], "nixvm ssh and nixvm deploy need it.", "openssh-client"),
        memory_for_vms(),
        cache_directory(cache),
        temporary_directory(),
        limits(),
        leftovers(),
    ]


def said_by(argv: Sequence[str]) -> str:
    """Return what a program prints, or why it does not; it has 30 seconds."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=_TIMEOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT} s"
    except OSError as error:
        return f"can't be started: {error.strerror}"
    return done.stdout


def first_line(text: str) -> str:
    """Return the first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "nothing")


def _debian_qemu() -> str:
    return {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}.get(
        platform.machine(), "qemu-system"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
