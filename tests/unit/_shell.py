"""A guest for the shell channel that is this machine: real bash, TCP instead of virtio ports."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _guest import program, until

from pytest_nixvm.errors import AgentError
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.guest.shell import Shell
from pytest_nixvm.guest.shell_script import Places
from pytest_nixvm.qemu.monitor import Event
from pytest_nixvm.qemu.ports import Pair


class Port:
    """What QEMU does for a port: the guest on one side, a socket for the host on the other.

    The guest's device is a TCP port of loopback, which bash opens by the name /dev/tcp/HOST/PORT.
    """

    def __init__(self, path: Path) -> None:
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen(1)
        self.device = socket.create_server(("127.0.0.1", 0))
        self.number = int(self.device.getsockname()[1])
        self.client: socket.socket | None = None
        self.guest: socket.socket | None = None
        self._left: list[socket.socket | None] = []
        self._stop, self._stopper = socket.socketpair()
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether the guest has the device open."""
        return self.guest is not None

    def _pump(self) -> None:
        # As QEMU: nothing is read from the host while there is nobody to take it.
        to_guest = to_host = b""
        while True:
            reading: list[Any] = [self._stop]
            writing: list[Any] = []
            if self.client is None:
                reading.append(self.server)
            elif to_host:
                writing.append(self.client)
            elif self.guest is not None and not to_guest:
                reading.append(self.client)
            if self.guest is None:
                # One at a time, and not before all of the one before has reached the host.
                reading += [] if to_host else [self.device]
            else:
                reading += [] if to_host else [self.guest]
                writing += [self.guest] if to_guest else []
            ready, writable, _ = select.select(reading, writing, [])
            if self._stop in ready:
                if self._stop.recv(1) == b"x":
                    return
                self._left.append(self.client)
                self.client, to_host = None, b""
                continue
            if self.server in ready:
                self.client, _ = self.server.accept()
                self.client.setblocking(False)
            if self.device in ready:
                self.guest, _ = self.device.accept()
                self.guest.setblocking(False)
            if self.client is not None and self.client in ready:
                to_guest = self.client.recv(65536)
                if not to_guest:
                    self._hang_up()
                    return
            if self.client is not None and self.client in writable:
                to_host = to_host[self.client.send(to_host) :]
            if self.guest is not None and (self.guest in ready or self.guest in writable):
                try:
                    if self.guest in ready:
                        to_host = self.guest.recv(65536)
                    elif self.guest in writable:
                        to_guest = to_guest[self.guest.send(to_guest) :]
                    is_closed = self.guest in ready and not to_host
                except OSError:
                    is_closed = True
                if is_closed:
                    self._hang_up()
                    to_guest = b""

    def _hang_up(self) -> None:
        guest, self.guest = self.guest, None
        if guest is not None:
            guest.close()

    def take_another(self) -> None:
        """Serve another client, as the port of a clone does: the guest notices nothing."""
        self._stopper.send(b"n")
        until(lambda: self.client is None, "the port to be free")

    def close(self) -> None:
        """End as QEMU does."""
        self._stopper.send(b"x")
        self._thread.join(5)
        ours = (self.server, self.device, self.client, self._stop, self._stopper)
        for each in (*ours, *self._left):
            if each is not None:
                each.close()
        self._hang_up()


class Guest:
    """The agent, monitor and ports that a `Shell` wants, for this machine."""

    def __init__(self, directory: Path, cgroups: Path) -> None:
        self.directory = directory
        self.agent_works = True
        self.bash = program("bash")
        self.started: list[subprocess.Popen[bytes]] = []
        self.ports: dict[int, tuple[Port, Port]] = {}
        self.callbacks: list[Any] = []
        self.most = 3
        (directory / "system").mkdir()
        self.first = self._add(0)
        self.places = Places(str(directory / "system"), "/dev/tcp/127.0.0.1", str(cgroups))
        self.shell = Shell(self, self, self, self.places)  # type: ignore[arg-type]

    def _add(self, number: int) -> Pair:
        pair = Pair.make(self.directory, number)
        made = []
        for port in pair.both:
            made.append(Port(port.socket))
            self.named(made[-1], port.name)
        self.ports[number] = (made[0], made[1])
        return pair

    def named(self, port: Port, name: str) -> None:
        """Give a port its name in the guest."""
        directory = self.directory / "system" / str(port.number)
        directory.mkdir(exist_ok=True)
        (directory / "name").write_text(name + "\n")

    def clone(self) -> Shell:
        """Freeze the machine and go on as its clone: with a shell channel that knows nothing."""
        remembered = self.shell.remembered()
        for port in self.ports[0]:
            port.take_another()
        self.shell.close()
        self.shell = Shell(self, self, self, self.places)  # type: ignore[arg-type]
        # As a template has it in its file.
        self.shell.adopt(json.loads(json.dumps(remembered)))
        return self.shell

    # the monitor
    def on_event(self, callback: Any) -> Any:
        self.callbacks.append(callback)
        return lambda: None

    def tell(self) -> None:
        """Send the event of a port that was closed, as QEMU does."""
        for callback in self.callbacks:
            for number in self.ports:
                name = f"nixvm-shell.{number}-port"
                callback(Event(1, "VSERPORT_CHANGE", {"id": name, "open": False}, 0.0))

    # the ports
    def plug(self) -> Pair | None:
        number = len(self.ports)
        return self._add(number) if number < self.most else None

    def unplug(self, pair: Pair) -> None:
        for port in self.ports.pop(pair.number):
            port.close()
            shutil.rmtree(self.directory / "system" / str(port.number))
        for port in pair.both:
            port.socket.unlink()

    def is_open(self, pair: Pair) -> bool:
        return all(port.is_open for port in self.ports.get(pair.number, ()))

    # the agent
    def shell_argv(self, command: str) -> list[str]:
        return [self.bash, "-c", command]

    def start(self, argv: list[str]) -> Guest._Started:
        if not self.agent_works:
            raise AgentError("The guest agent did not answer.")
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "HOME": str(self.directory), "LANG": "C.UTF-8"},
        )
        self.started.append(process)
        return Guest._Started(process)

    class _Started:
        def __init__(self, process: subprocess.Popen[bytes]) -> None:
            self.process = process

        def poll(self, timeout: float) -> CommandResult | None:
            if self.process.poll() is None:
                return None
            _, said = self.process.communicate(timeout=timeout)
            return CommandResult("", self.process.returncode, b"", said, 0.0)

    def end(self) -> None:
        """QEMU's end."""
        while self.ports:
            for port in self.ports.popitem()[1]:
                port.close()


def cgroup_root() -> Path | None:
    """A cgroup of our own, or None where the tests may not make one."""
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (root / "cgroup.controllers").exists() and os.access(root, os.W_OK):
            made = root / f"nixvm-test-{secrets.token_hex(4)}"
            made.mkdir()
            if (made / "cgroup.kill").exists():
                return made
            made.rmdir()
    return None


def remove_cgroup(root: Path) -> None:
    (root / "cgroup.kill").write_text("1")
    until(lambda: "populated 0" in (root / "cgroup.events").read_text(), "the cgroup to be empty")
    for directory in (*root.glob("*/*"), *root.glob("*"), root):
        if directory.is_dir():
            directory.rmdir()


@contextlib.contextmanager
def guest(directory: Path, kind: str) -> Iterator[Guest]:
    cgroups = cgroup_root() if kind == "cgroup" else None
    if kind == "cgroup" and cgroups is None:
        pytest.skip("no cgroup v2 that may be written to")
    made = Guest(directory, cgroups or Path("/nonexistent"))
    try:
        yield made
    finally:
        made.shell.close()
        made.end()
        if cgroups is not None:
            remove_cgroup(cgroups)
        for process in made.started:
            process.wait(5)
            if process.stderr is not None:
                process.stderr.close()


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def timed(call: Any) -> tuple[Any, float]:
    begin = time.monotonic()
    return call(), time.monotonic() - begin
