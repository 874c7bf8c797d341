"""A VM that is left running: how to get in, and how to end it."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.errors import NixvmError

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

QMP_SOCKET = "qmp-kept"
"""The name of a monitor's socket that waits for whoever comes after us."""


@dataclass(frozen=True)
class Kept:
    """One VM that outlives the session; the values are lines for a person's shell."""

    name: str
    ssh: str
    serial: str
    qmp: str
    end: str

    def lines(self) -> list[str]:
        """Return what is shown."""
        return [
            f"{self.name} is left running.",
            f"    SSH:            {self.ssh}",
            f"    serial console: {self.serial}",
            f"    QMP:            {self.qmp}",
            f"    end it:         {self.end}",
        ]


def arguments(sockets: Path) -> tuple[str, ...]:
    """Return what QEMU needs so that its monitor can be reached when we have gone."""
    path = str(sockets / QMP_SOCKET).replace(",", ",,")
    return ("-qmp", f"unix:{path},server=on,wait=off")


def describe(machine: Machine) -> Kept:
    """Return the ways into a running VM, while it can still be asked.

    Raises `MachineGoneError` if it does not run.
    """
    qemu = machine.qemu
    try:
        ssh = machine.ssh.command_line
    except NixvmError as error:
        ssh = f"not possible: {str(error).splitlines()[0]}"
    return Kept(
        machine.build.name,
        ssh,
        _terminal(qemu.console_socket),
        _talk(machine.spec.sockets / QMP_SOCKET),
        f"kill {qemu.pid}",
    )


def _terminal(socket: Path) -> str:
    path = shlex.quote(str(socket))
    if shutil.which("socat"):
        return f"socat -,rawer,escape=0x1d UNIX-CONNECT:{path}    (Control-] leaves)"
    return f"nc -U {path}    (socat, which is not installed, makes a better terminal)"


def _talk(socket: Path) -> str:
    path = shlex.quote(str(socket))
    return f"socat -,crlf UNIX-CONNECT:{path}" if shutil.which("socat") else f"nc -U {path}"
