"""A person's terminal on a VM: keys, the way out, and what becomes of the terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import termios
import threading

import pytest
from _guest import io_thread, short_directory, until

from pytest_nixvm.errors import SettingsError
from pytest_nixvm.guest.console import Console
from pytest_nixvm.interact import ConsoleLine, bridge, interact, raw


class Person:
    """Somebody at a terminal, whose other side `bridge` has."""

    def __init__(self) -> None:
        self.keys, self.terminal = pty.openpty()
        self.seen = b""

    def sees(self, what: bytes) -> bool:
        os.set_blocking(self.keys, False)
        with contextlib.suppress(BlockingIOError):
            self.seen += os.read(self.keys, 4096)
        return what in self.seen

    def close(self) -> None:
        os.close(self.keys)
        os.close(self.terminal)


@pytest.fixture
def person():
    person = Person()
    yield person
    person.close()


@pytest.fixture
def guest():
    """The guest's end of a serial console, and our console."""
    with io_thread() as io, short_directory() as place, socket.socket(socket.AF_UNIX) as server:
        path = place / "console"
        server.bind(str(path))
        server.listen()
        console = Console(io, path, place / "log")
        console.connect()
        end, _ = server.accept()
        end.settimeout(5)
        yield end, console
        console.close()
        end.close()


def at_work(person: Person, console: Console) -> threading.Thread:
    line = ConsoleLine(console)

    def work() -> None:
        with raw(person.terminal):
            bridge(line, person.terminal, person.terminal)
        line.close()

    thread = threading.Thread(target=work, daemon=True)
    before = termios.tcgetattr(person.terminal)
    thread.start()
    until(lambda: termios.tcgetattr(person.terminal) != before, "the terminal to be raw")
    return thread


def test_keys_go_to_the_guest_and_its_output_comes_back(person, guest):
    end, console = guest
    before = termios.tcgetattr(person.terminal)
    thread = at_work(person, console)

    os.write(person.keys, b"ls\x03\r")
    received = b""
    while len(received) < 4:
        received += end.recv(100)
    end.sendall(b"\x1b[1mbin etc\x1b[0m\r\n")

    assert received == b"ls\x03\r"  # Control-C is the guest's
    until(lambda: person.sees(b"\x1b[1mbin etc\x1b[0m\r\n"), "the guest's output, as it was sent")
    os.write(person.keys, b"x\x1d")
    thread.join(5)
    assert not thread.is_alive()
    assert end.recv(100) == b"x"  # what was typed before Control-] has gone out
    assert termios.tcgetattr(person.terminal) == before
    assert "bin etc" in console.text()  # the tests' own console has it, too


def test_the_guests_end_ends_it(person, guest):
    end, console = guest
    before = termios.tcgetattr(person.terminal)
    thread = at_work(person, console)

    end.sendall(b"last words")
    end.close()
    thread.join(5)

    assert not thread.is_alive()
    assert person.sees(b"last words")
    assert termios.tcgetattr(person.terminal) == before


def test_without_a_terminal_it_says_what_is_needed(monkeypatch):
    monkeypatch.setattr(os, "isatty", lambda _: False)

    with pytest.raises(SettingsError, match=r"needs your terminal.*pytest -s"):
        interact(None)  # type: ignore[arg-type]
