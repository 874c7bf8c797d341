"""Real programs for the tests of the channels: a guest agent, an sshd, a terminal on a socket."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import select
import shutil
import socket
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_nixvm.guest.keys import KeyPair
from pytest_nixvm.guest.sshd import SshAccess
from pytest_nixvm.qemu.loop import IoThread


def until(condition: Callable[[], object], what: str, timeout: float = 5) -> None:
    """Wait for something that has no event, for tests of what others do."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.005)


def program(name: str) -> str:
    """Return a program's path, or skip the test."""
    found = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="nixvm-") as name:
        yield Path(name)


@contextlib.contextmanager
def io_thread() -> Iterator[IoThread]:
    io = IoThread()
    try:
        yield io
    finally:
        io.close()


def listens(path: Path) -> bool:
    """Whether somebody listens on a unix socket: it has a path before it does (proc(5))."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(line[-1] == str(path) and line[3] == "00010000" for line in lines)


@contextlib.contextmanager
def real_agent(directory: Path) -> Iterator[Path]:
    """QEMU's own guest agent on a socket, for commands that do no harm to this machine."""
    path = directory / "agent"
    argv = [program("qemu-ga"), "-m", "unix-listen", "-p", str(path), "-t", str(directory)]
    process = subprocess.Popen([*argv, "-f", str(directory / "pid")], env={"PATH": "/nowhere"})
    try:
        until(lambda: listens(path), "the agent's socket")
        yield path
    finally:
        process.kill()  # it loses a SIGTERM that comes while it starts
        process.wait(5)


class FakeAgent:
    """A guest agent that says what a test wants: `answers` maps a command to what is returned.

    An answer is a value, an Exception's text for an error, or None for no answer at all; a callable
    gets the request. `requests` has what came in.
    """

    def __init__(self, socket: Path, **answers: Any) -> None:
        self.path = socket
        self.answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
        self.requests: list[dict[str, Any]] = []
        self.writers: list[asyncio.StreamWriter] = []
        self._io = IoThread()
        self._server = self._io.run(asyncio.start_unix_server(self._serve, str(socket)), 5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await self._answer(reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line.startswith(b"\xff"):
                writer.write(b'{"error": {"class": "GenericError", "desc": "stray \'\xff\'"}}\n')
            request = json.loads(line.lstrip(b"\xff"))
            self.requests.append(request)
            answer = self.answers.get(request["execute"])
            if callable(answer):
                answer = answer(request)
            if isinstance(answer, Exception):
                message: dict[str, Any] = {
                    "error": {"class": "GenericError", "desc": str(answer)},
                    "id": request["id"],
                }
            elif answer is None:
                continue
            else:
                message = {"return": answer, "id": request["id"]}
            writer.write(json.dumps(message).encode() + b"\n")

    def say(self, data: bytes) -> None:
        """Send raw bytes to whoever is connected."""
        for writer in self.writers:
            self._io.call(lambda writer=writer: writer.write(data))  # type: ignore[misc]

    def hang_up(self) -> None:
        for writer in self.writers:
            self._io.call(writer.close)

    def close(self) -> None:
        self._io.close()


class Sshd:
    """A real sshd on loopback with a configuration of its own, for the user who runs the tests."""

    def __init__(self, directory: Path, *lines: str, users: Sequence[str] = ()) -> None:
        self.directory = directory
        self.keys = KeyPair.generate(directory)
        self.user = subprocess.check_output(["id", "-un"], text=True).strip()
        host = KeyPair.generate(directory, "host_key")
        (directory / "host_key.pub").write_text(host.public_line + "\n")
        (directory / "authorized").write_text(self.keys.public_line + "\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.config = directory / "sshd_config"
        sftp = Path("/usr/lib/openssh/sftp-server")
        self.config.write_text(
            "\n".join(
                [
                    *lines,
                    "Port " + str(self.port),
                    "ListenAddress 127.0.0.1",
                    f"HostKey {directory}/host_key",
                    f"AuthorizedKeysFile {directory}/authorized",
                    f"PidFile {directory}/pid",
                    "StrictModes no",
                    "UsePAM no",
                    f"SetEnv HOME={directory}",  # nobody's .bashrc, which bash reads under sshd
                    f"Subsystem sftp {sftp if sftp.exists() else 'internal-sftp'}",
                ]
            )
            + "\n"
        )
        self.host_keys = (" ".join(host.public_line.split()[:2]),)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it, whatever the config
        log = self.directory / "log"
        log.write_text("")
        argv = [program("sshd"), "-D", "-f", str(self.config), "-E", str(log)]
        self.process = subprocess.Popen(argv, start_new_session=True)
        until(lambda: "Server listening" in log.read_text(), "sshd to listen")

    def children(self) -> list[int]:
        """The processes that serve connections."""
        if self.process is None:
            return []
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def stop(self) -> None:
        """Kill it with all connections."""
        for pid in self.children() if self.process and self.process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(os.getpgid(pid), 9)
        if self.process is not None:
            self.process.kill()
            self.process.wait(5)
            self.process = None

    def access(self, **changes: Any) -> SshAccess:
        values: dict[str, Any] = {
            "user": self.user,
            "port": self.port,
            "host_keys": self.host_keys,
            "keys_file": str(self.directory / "authorized"),
            "in_home": False,
        }
        return SshAccess(**{**values, **changes})


class Terminal:
    """A program on a terminal, behind a socket that serves one client: QEMU's console."""

    def __init__(self, directory: Path, argv: Sequence[str], env: dict[str, str]) -> None:
        self.socket = directory / "console"
        self.log = directory / "console.log"
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.socket))
        self._server.listen(1)
        self._master, slave = pty.openpty()
        self._extra: list[bytes] = []
        self._wake_r, self._wake_w = os.pipe()
        self._stopped = False

        self._argv = argv
        self._env = {"PATH": os.environ["PATH"], "TERM": "vt220", "HOME": str(directory), **env}
        self._slave = slave
        self.process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def _start(self) -> None:
        """Start the program, as QEMU starts the guest: when somebody listens already."""

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            self._argv,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env=self._env,
            cwd=self.socket.parent,
            preexec_fn=own_terminal,
        )
        os.close(self._slave)

    def inject(self, data: bytes) -> None:
        """Show something that the program did not print: a message of the kernel."""
        self._extra.append(data)
        os.write(self._wake_w, b"x")

    def _pump(self) -> None:
        client: socket.socket | None = None
        with self.log.open("wb", buffering=0) as log:
            while not self._stopped:
                sources: list[Any] = [self._master, self._wake_r, client or self._server]
                ready, _, _ = select.select(sources, [], [])
                shown = b""
                if self._wake_r in ready:
                    os.read(self._wake_r, 100)
                    while self._extra:
                        shown += self._extra.pop(0)
                if self._server in ready:
                    client, _ = self._server.accept()
                    self._start()
                if client is not None and client in ready:
                    typed = client.recv(4096)
                    if not typed:
                        break
                    os.write(self._master, typed)
                if self._master in ready:
                    try:
                        shown += os.read(self._master, 4096)
                    except OSError:
                        break  # the program has ended
                if shown and client is not None:
                    client.sendall(shown)
                log.write(shown)
        if client is not None:
            client.close()

    def close(self) -> None:
        self._stopped = True
        os.write(self._wake_w, b"x")
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait(5)
        self._thread.join(5)
        self._server.close()
        for descriptor in (self._master, self._wake_r, self._wake_w):
            os.close(descriptor)
