"""The client of the supervisor process: start scripts are spawned and killed through it.

supervisor = Supervisor()
scratch = supervisor.make_directory(Path(tempfile.gettempdir()))    # gone when we are
process = supervisor.spawn([script], env=env, cwd=scratch, log=scratch / "qemu.log")
process.wait(timeout=60)
supervisor.close()
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import QemuError
from pytest_nixvm.qemu import _supervise

# The supervisor answers within milliseconds. These bound the case that it can't: stopped, or a
# machine that swaps.
_ANSWER_TIMEOUT = 30.0
_KILL_TIMEOUT = _supervise.KILL_TIMEOUT + 5.0
_END_TIMEOUT = _supervise.END_TIMEOUT + 3.0


def describe_status(returncode: int) -> str:
    """Say in words how a process ended: "exit status 1", "signal SIGKILL"."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        return f"signal {signal.Signals(-returncode).name}"
    except ValueError:
        return f"signal {-returncode}"


class Process:
    """A process that the supervisor started, with its helpers."""

    def __init__(self, supervisor: Supervisor, name: str) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self._supervisor = supervisor
        self._name = name
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._callbacks: list[Callable[[int], None]] = []
        self._confirmed_dead = False

    def __repr__(self) -> str:
        state = "running" if self.returncode is None else describe_status(self.returncode)
        return f"<Process {self.pid} {state}>"

    def wait(self, timeout: float) -> int:
        """Wait until it ends and return its exit status, negative for a signal.

        Raises `TimeoutError` after `timeout` seconds.
        """
        self._ended.wait(timeout)
        if self.returncode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout:g} s")
        return self.returncode

    def kill(self) -> None:
        """Kill it with all its helpers and return when they are dead.

        Does nothing when they already are. Raises `QemuError` if the kernel does not let one of
        them die (uninterruptible sleep), after some seconds.
        """
        if not self._confirmed_dead:
            self._supervisor._kill(self)
            self._confirmed_dead = True

    def keep(self) -> None:
        """Let it run on when this process ends, with every directory of the supervisor's.

        Its end then ends its helpers, removes the directories and ends the supervisor. A death of
        this process that it has not prepared for ends it all the same, before this is called.
        """
        self._supervisor._keep(self)

    def on_exit(self, callback: Callable[[int], None]) -> None:
        """Call `callback` with the exit status when the process has ended, or now if it has.

        It is called from a thread of its own; several are called in the order of their adding.
        """
        with self._lock:
            if self.returncode is None:
                self._callbacks.append(callback)
                return
        callback(self.returncode)

    def _exited(self, returncode: int) -> None:
        with self._lock:
            if self.returncode is not None:
                return
            self.returncode = returncode
            callbacks, self._callbacks = self._callbacks, []
        self._ended.set()
        if callbacks:
            # Not in the reader's thread: a callback may itself wait for the supervisor.
            threading.Thread(
                target=_call_each, args=(callbacks, returncode), name="nixvm-exit", daemon=True
            ).start()


def _call_each(callbacks: Sequence[Callable[[int], None]], returncode: int) -> None:
    for callback in callbacks:
        callback(returncode)


class _Answer:
    def __init__(self) -> None:
        self.event = threading.Event()
        self.message: dict[str, Any] | None = None


class Supervisor:
    """One supervisor process, which kills what it started when this process ends, however.

    `directories` (and those of `make_directory`, `add_directory`) are removed at the end, also if
    this process is killed. All methods may be called from several threads. A child that is forked
    from this process can't use it, and does not end it.
    """

    def __init__(self, directories: Sequence[Path] = ()) -> None:
        self._owner = os.getpid()
        self._token = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._answers: dict[int, _Answer] = {}
        self._processes: dict[str, Process] = {}
        self._directories: set[Path] = set()
        self._lost: str | None = None  # why it can't be used any more
        self._closing = False
        self._keeps = False
        self._closed = threading.Lock()

        ours, theirs = socket.socketpair()
        # A supervisor that no longer reads must not block us for ever.
        ours.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_ANSWER_TIMEOUT), 0)
        )
        self._socket = ours
        try:
            with theirs:
                # A session of its own, so that the terminal's Ctrl-C does not reach it; nothing
                # here depends on the thread that runs this.
                self._process = subprocess.Popen(
                    [
                        sys.executable, "-I", "-S", "-X", "utf8",
                        str(Path(_supervise.__file__).resolve()), str(self._owner),
                    ],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )  # fmt: skip
        except OSError as error:
            ours.close()
            raise QemuError(f"The VM supervisor process can't be started: {error}") from error
        self._reader = threading.Thread(target=self._read, name="nixvm-supervisor", daemon=True)
        self._reader.start()
        atexit.register(self.close)
        for directory in directories:
            self.add_directory(directory)

    @property
    def pid(self) -> int:
        """The supervisor's own process id."""
        return int(self._process.pid)

    # --- directories ---

    def add_directory(self, path: Path) -> None:
        """Have `path` removed at the end, with all that is in it. It need not exist yet."""
        path = path.absolute()
        with self._lock:
            self._directories.add(path)
        self._request({"op": "directories", "add": [_text(str(path))]})

    def make_directory(self, parent: Path, prefix: str = "nixvm-") -> Path:
        """Make a private directory (0700) below `parent` that is removed at the end.

        Unlike `tempfile.mkdtemp` followed by `add_directory` there is no moment at which it could
        be left behind. Raises `OSError` if it can't be made.
        """
        path = parent.absolute() / f"{prefix}{secrets.token_hex(4)}"
        self.add_directory(path)
        path.mkdir(mode=0o700)
        return path

    def remove_directory(self, path: Path) -> None:
        """Remove a directory now, and forget it."""
        path = path.absolute()
        _supervise.remove_tree(str(path))
        with self._lock:
            self._directories.discard(path)
        with contextlib.suppress(QemuError):
            self._request({"op": "directories", "remove": [_text(str(path))]})

    # --- processes ---

    def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path
    ) -> Process:
        """Start a program (absolute path) in a session of its own.

        Its stdin is /dev/null; stdout and stderr are appended to `log`. `env` is its whole
        environment, to which the supervisor's marker is added. Raises `QemuError` if it can't be
        executed.
        """
        name = f"{self._token}-{next(self._numbers)}"
        process = Process(self, name)
        with self._lock:
            self._processes[name] = process
        environment = {_text(key): _text(value) for key, value in env.items()}
        environment[_supervise.MARKER] = name
        request = {
            "op": "spawn",
            "vm": name,
            "argv": [_text(argument) for argument in argv],
            "env": environment,
            "cwd": _text(str(cwd)),
            "log": _text(str(log)),
        }
        try:
            process.pid = int(self._request(request)["pid"])
        except _RefusedError as error:
            self._forget(process)
            raise QemuError(f"{argv[0]} can't be started: {error}") from None
        except BaseException:
            # Interrupted: nobody will ever hold this process, so it must not run either.
            with contextlib.suppress(QemuError, OSError):
                self._send({"id": next(self._numbers), "op": "kill", "vm": name})
            self._forget(process)
            raise
        return process

    def _kill(self, process: Process) -> None:
        try:
            self._request({"op": "kill", "vm": process._name}, timeout=_KILL_TIMEOUT)
        except _RefusedError as error:
            raise QemuError(f"A VM's processes can't be killed: {error}") from None
        except QemuError:
            if self._lost is None:
                raise
            # The supervisor is gone, and its VMs with it: see `_gone`.
            process._ended.wait(_END_TIMEOUT)
            return
        # The exit was reported before the answer, in order.
        process._ended.wait(_KILL_TIMEOUT)

    def _keep(self, process: Process) -> None:
        self._request({"op": "keep", "vm": process._name})
        self._keeps = True

    def _forget(self, process: Process) -> None:
        with self._lock:
            self._processes.pop(process._name, None)

    # --- the conversation ---

    def _request(
        self, request: dict[str, Any], *, timeout: float = _ANSWER_TIMEOUT
    ) -> dict[str, Any]:
        if os.getpid() != self._owner:
            raise QemuError("The VM supervisor belongs to the process that started it.")
        number = next(self._numbers)
        answer = _Answer()
        with self._lock:
            if self._lost is not None:
                raise QemuError(self._lost)
            self._answers[number] = answer
        try:
            self._send({"id": number, **request})
            if not answer.event.wait(timeout):
                raise QemuError(
                    f"The VM supervisor (process {self.pid}) did not answer "
                    f"{request['op']!r} within {timeout:g} s."
                )
        finally:
            with self._lock:
                self._answers.pop(number, None)
        if answer.message is None:
            raise QemuError(self._lost or "The VM supervisor is gone.")
        if "error" in answer.message:
            raise _RefusedError(str(answer.message["error"]))
        return answer.message

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._send_lock:
                self._socket.sendall(data)
        except OSError as error:
            # Half a line may have gone out: nothing more can be said on this socket.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            raise QemuError(self._lost or f"The VM supervisor can't be reached: {error}") from error

    def _read(self) -> None:
        buffer = b""
        fatal = ""
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "id" in message:
                    with self._lock:
                        answer = self._answers.get(message["id"])
                    if answer is not None:
                        answer.message = message
                        answer.event.set()
                elif message["event"] == "exit":
                    with self._lock:
                        process = self._processes.pop(message["vm"], None)
                    if process is not None:
                        process._exited(message["returncode"])
                else:
                    fatal = message.get("text", "")
        self._gone(fatal)

    def _gone(self, fatal: str) -> None:
        with self._lock:
            closing = self._closing
            self._lost = (
                "The VM supervisor was closed."
                if closing
                else "The VM supervisor process was ended by something else; its VMs are gone."
            )
            if fatal:
                self._lost += f"\n{fatal}"
            answers = list(self._answers.values())
            processes = list(self._processes.values())
        if not closing:
            # PR_SET_PDEATHSIG takes the start scripts along, but not their helpers.
            deadline = time.monotonic() + _supervise.END_TIMEOUT
            while _supervise.sweep(self._token) and time.monotonic() < deadline:
                time.sleep(0.01)
        for process in processes:
            process._exited(-signal.SIGKILL)
        for answer in answers:
            answer.event.set()

    def close(self) -> None:
        """Kill everything, remove the directories, end the supervisor. May be called twice."""
        if os.getpid() != self._owner:
            return
        with self._closed:
            if self._closing:
                return
            with self._lock:
                self._closing = True
            atexit.unregister(self.close)
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            if self._keeps:
                self._process.returncode = 0  # it goes on without us: nobody will wait for it
                self._socket.close()
                return
            try:
                self._process.wait(_END_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(_END_TIMEOUT)
            self._reader.join(_END_TIMEOUT)
            self._socket.close()
            # Already done, unless the supervisor was killed.
            if self._process.returncode != 0:
                _supervise.sweep(self._token)
            for directory in self._directories:
                _supervise.remove_tree(str(directory))


class _RefusedError(QemuError):
    """The supervisor answered with an error."""


def _text(value: str) -> str:
    # Whatever this process's file system encoding is, the supervisor's is UTF-8.
    return os.fsencode(value).decode("utf-8", "surrogateescape")
