"""`nixvm console`: this terminal is the serial console of a VM that `nixvm run` has started."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import tty
from collections.abc import Iterator

import click

from pytest_nixvm.cli.ssh import complete_running, flake_option, running_vm
from pytest_nixvm.control import ask
from pytest_nixvm.errors import SettingsError
from pytest_nixvm.interact import LEAVE

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.argument("name", metavar="NAME", shell_complete=complete_running)
@flake_option
def command(name: str, flake: str | None) -> None:
    """Use the serial console of a running VM, during its boot as well.

    Control-] leaves it, and the VM runs on.
    """
    entry = running_vm(name, flake)
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        raise SettingsError(
            "`nixvm console` is for a terminal, and this is none. `nixvm ssh NAME COMMAND` is for "
            f"scripts; what the console has shown is in {entry.console_log}."
        )
    connection, _ = ask(name, entry.control, {"op": "console"})
    click.echo(f"{name}: the serial console. Control-] leaves it; Enter may bring a prompt.")
    with connection, _raw(sys.stdin.fileno()):
        left = _relay(connection, sys.stdin.fileno(), sys.stdout.fileno())
    click.echo(f"\n{name}: {'left' if left else 'the console has ended'}.")


def _relay(connection: socket.socket, terminal: int, screen: int) -> bool:
    """Carry bytes both ways; return whether it was left, False if the VM has ended."""
    while True:
        ready, _, _ = select.select([connection.fileno(), terminal], [], [])
        if connection.fileno() in ready:
            with contextlib.suppress(ConnectionError):
                if data := connection.recv(4096):
                    _write(screen, data)
                    continue
            return False
        typed = os.read(terminal, 4096)
        before, leave, _ = typed.partition(LEAVE)
        if before:
            with contextlib.suppress(OSError):  # it has ended: the next round says so
                connection.sendall(before)
        if leave or not typed:
            return True


def _write(screen: int, data: bytes) -> None:
    while data:
        data = data[os.write(screen, data) :]


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    """Have a terminal give and take bytes as they are; it is as before behind the block."""
    before = termios.tcgetattr(terminal)
    handlers = {number: signal.getsignal(number) for number in _ENDING}

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        for number in _ENDING:  # a terminal that stays raw would be of no use to anybody
            signal.signal(number, leave)
        tty.setraw(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
