"""A person at a VM's serial console: keys, the way out, and what becomes of the terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import sys
import termios
import threading
from types import SimpleNamespace

import pytest
from _guest import io_thread, short_directory, until

from pytest_nixvm import interact
from pytest_nixvm.errors import MachineError
from pytest_nixvm.guest.console import Console
from pytest_nixvm.transcript import Transcript


@pytest.fixture
def keys(monkeypatch):
    """The person's end of the terminal that pytest has as its stdin."""
    keys, terminal = pty.openpty()
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield keys
    os.close(keys)


@pytest.fixture
def screen(monkeypatch, tmp_path):
    """The file that what the person sees is written to."""
    path = tmp_path / "screen"
    with path.open("w") as file:
        monkeypatch.setattr(sys, "__stdout__", file)
        yield path


@pytest.fixture
def guest():
    """The guest's end of a serial console, and the VM it is of."""
    with io_thread() as io, short_directory() as place, socket.socket(socket.AF_UNIX) as server:
        path = place / "console"
        server.bind(str(path))
        server.listen()
        console = Console(io, path, place / "log")
        console.connect()
        end, _ = server.accept()
        end.settimeout(5)
        yield end, SimpleNamespace(name="vm", console=console, transcript=Transcript())
        console.close()
        end.close()


def at_work(machine: SimpleNamespace) -> threading.Thread:
    before = termios.tcgetattr(sys.stdin)
    thread = threading.Thread(target=interact.console, args=[machine], daemon=True)
    thread.start()
    until(lambda: termios.tcgetattr(sys.stdin) != before, "the terminal to be raw")
    return thread


def test_keys_go_to_the_guest_as_they_are_and_its_output_comes_back(keys, guest, screen):
    end, machine = guest
    before = termios.tcgetattr(sys.stdin)
    thread = at_work(machine)

    os.write(keys, b"ls\x03\r")
    received = b""
    while len(received) < 4:
        received += end.recv(100)
    end.sendall(b"\x1b[1mbin etc\x1b[0m\r\n")

    assert received == b"ls\x03\r"  # Control-C is the guest's
    until(
        lambda: b"\x1b[1mbin etc\x1b[0m" in screen.read_bytes(),
        "the guest's output, as it was sent",
    )
    os.write(keys, b"x\x1d")
    thread.join(5)
    assert not thread.is_alive()
    assert end.recv(100) == b"x"  # what was typed before Control-] has gone out
    assert termios.tcgetattr(sys.stdin) == before
    assert "bin etc" in machine.console.text()  # the tests' own console has it, too


def test_the_guests_end_gives_the_terminal_back(keys, guest):
    end, machine = guest
    before = termios.tcgetattr(sys.stdin)
    thread = at_work(machine)

    end.close()
    thread.join(5)

    assert not thread.is_alive()
    assert termios.tcgetattr(sys.stdin) == before


def test_without_a_terminal_it_says_what_is_needed(guest, monkeypatch):
    _, machine = guest
    with contextlib.closing(open(os.devnull)) as nothing:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdin", nothing)

        with pytest.raises(MachineError, match=r"no terminal.*with -s"):
            interact.shell(machine)
