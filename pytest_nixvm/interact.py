"""A person at the VM, from within a test: a shell, or the serial console, on pytest's terminal."""

from __future__ import annotations

import os
import queue
import select
import shlex
import shutil
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pytest_nixvm.errors import MachineError, NixvmError

if TYPE_CHECKING:
    from pytest_nixvm.verbs.guest import Guest

LEAVE = b"\x1d"
"""Control-], as telnet has it."""


def shell(machine: Guest) -> None:
    """Open a shell in the VM on this terminal; return when it is left.

    Over SSH, as the user that the machine lets in; on the serial console where SSH is not possible.
    Raises `MachineError` without a terminal.
    """
    _terminal(machine)
    try:
        line = machine.ssh.command_line if shutil.which("ssh") else ""
    except NixvmError as error:
        print(f"No SSH ({str(error).splitlines()[0]}): the serial console instead.")
        line = ""
    if not line:
        console(machine)
        return
    with machine.transcript.note("interact", "ssh"):
        print(f"{machine.name}: {line}")
        subprocess.run(shlex.split(line), check=False)


def console(machine: Guest) -> None:
    """Connect the VM's serial console with this terminal, until Control-] is pressed.

    Raises `MachineError` without a terminal.
    """
    terminal = _terminal(machine)
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def take(data: bytes) -> None:
        arrived.put(data)
        with suppress(BlockingIOError):  # it is full: whoever reads is told already
            os.write(writing, b"x")

    with machine.transcript.note("interact", "serial console"):
        print(f"{machine.name}: the serial console. Control-] leaves it.")
        print(machine.console.last_line(), end="", flush=True)
        undo = machine.console.tap(take)
        try:
            with _raw(terminal):
                _relay(machine, terminal, reading, arrived)
        finally:
            undo()
            os.close(reading)
            os.close(writing)
        print()


def _relay(machine: Guest, terminal: int, reading: int, arrived: queue.SimpleQueue[bytes]) -> None:
    while not machine.console.closed:
        ready, _, _ = select.select([terminal, reading], [], [], 1.0)
        if reading in ready:
            os.read(reading, 4096)
            while not arrived.empty():
                os.write(sys.__stdout__.fileno() if sys.__stdout__ else 1, arrived.get())
        if terminal in ready:
            typed = os.read(terminal, 4096)
            before, leave, _ = typed.partition(LEAVE)
            if before:
                machine.console.send(before)
            if leave or not typed:
                return


@contextmanager
def _raw(terminal: int) -> Iterator[None]:
    before = termios.tcgetattr(terminal)
    try:
        tty.setraw(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _terminal(machine: Guest) -> int:
    try:
        number = sys.stdin.fileno()
    except (OSError, ValueError):
        number = -1
    if number < 0 or not os.isatty(number):
        raise MachineError(
            f"{machine.name} can't be handed to a person here: there is no terminal. Run pytest "
            "in one, with -s, and without -n."
        )
    return number
