"""What the tests of qemu/ share: start scripts, guests of a few bytes, and proof of death."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

QEMU = shutil.which("qemu-system-x86_64")

needs_qemu = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")


# --- guests: boot sectors of a few instructions (16-bit code at 0000:7c00) ---

HALT = bytes.fromhex("f4 ebfd")  # hlt; jmp to it
POWER_OFF = bytes.fromhex("ba0406 b80020 ef")  # PIIX4's PM1a_CNT: SLP_EN
PANIC = bytes.fromhex("ba0505 b001 ee")  # the pvpanic port: PVPANIC_PANICKED
RESET = bytes.fromhex("b0fe e664")  # the keyboard controller's reset line


def say(text: str) -> bytes:
    """Code that writes to the first serial port."""
    return bytes.fromhex("baf803") + b"".join(b"\xb0" + bytes([c]) + b"\xee" for c in text.encode())


def boot_disk(code: bytes) -> bytes:
    # The BIOS wants the disk to have a cylinder.
    return ((code + HALT).ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")


# --- start scripts, as NixOS writes them (see nixos/modules/virtualisation/qemu-vm.nix) ---

NETWORK = '-net nic,netdev=user.0,model=virtio -netdev user,id=user.0,"$QEMU_NET_OPTS"'


def start_script(
    directory: Path,
    *,
    code: bytes = b"",
    before: str = "",
    options: str = "-vga std",
    network: str = NETWORK,
    run: str = "exec",
) -> Path:
    """Write a start script for a guest whose boot sector holds `code`."""
    directory.mkdir(parents=True, exist_ok=True)
    disk = directory / "disk.img"
    disk.write_bytes(boot_disk(code))
    script = directory / "run-tiny-vm"
    script.write_text(f"""#!/bin/bash
set -e
NIX_DISK_IMAGE=$(readlink -f "${{NIX_DISK_IMAGE:-./tiny.img}}")
if ! test -e "$NIX_DISK_IMAGE"; then cp {disk} "$NIX_DISK_IMAGE"; fi
if [ -z "$TMPDIR" ] || [ -z "$USE_TMPDIR" ]; then TMPDIR=$(mktemp -d nix-vm.XXXXXXXXXX --tmpdir); fi
mkdir -p "$TMPDIR/xchg"
{before}
cd "$TMPDIR"
{run} {QEMU} -machine accel=kvm:tcg -cpu max \\
    -name tiny -m 64 -smp 1 -device virtio-rng-pci \\
    {network} \\
    -virtfs local,path="$TMPDIR"/xchg,security_model=none,mount_tag=xchg \\
    -drive cache=writeback,file="$NIX_DISK_IMAGE",format=raw,id=drive1,if=none,werror=report \\
    -device virtio-blk-pci,bootindex=1,drive=drive1,serial=root \\
    {options} \\
    $QEMU_OPTS \\
    "$@"
""")
    return executable(script)


def executable(script: Path) -> Path:
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


# --- a QEMU to ask ---


class Refused(Exception):
    """What QEMU said instead of doing it."""


class Asked:
    """A QEMU with its monitor on its standard streams."""

    def __init__(self, argv: tuple[str, ...], log: Path) -> None:
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.log = log
        self.statuses: list[str] = []  # of migrations, as they were told
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> object:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"execute": command, "arguments": arguments}))
        self.process.stdin.flush()
        while True:
            said = self._read()
            if "error" in said:
                raise Refused(said["error"]["desc"])
            if "return" in said:
                return said["return"]

    def migrate(self, command: str, uri: str, *capabilities: str) -> None:
        """Begin, and wait until it is done: a QEMU that quits in its midst may abort."""
        names = [{"capability": each, "state": True} for each in ("events", *capabilities)]
        self.execute("migrate-set-capabilities", capabilities=names)
        self.execute(command, uri=uri)
        while "completed" not in self.statuses:
            assert "failed" not in self.statuses
            self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        said: dict[str, Any] = json.loads(line)
        if said.get("event") == "MIGRATION":
            self.statuses.append(said["data"]["status"])
        return said


# --- processes ---


def wait_gone(pid: int, timeout: float = 10.0) -> bool:
    """Wait for a process that is not our child to end; return whether it did."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)


def running(pid: int) -> bool:
    return not wait_gone(pid, 0)


def marked(text: str) -> list[int]:
    """Return the processes that have `text` in their environment or command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                seen = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                if text.encode() in seen:
                    found.append(int(entry.name))
    return found


class Pipe:
    """A named pipe through which a script says that it has got somewhere."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        # Open for writing as well: no EOF between two writers.
        self.descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def read(self, timeout: float = 10.0) -> str:
        """Return the next line."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self.descriptor], [], [], timeout)[0]:
                raise TimeoutError(f"nobody wrote to {self.path}")
            line += os.read(self.descriptor, 1)
        return line.decode().strip()
