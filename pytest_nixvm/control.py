"""What a `nixvm run` answers to `nixvm ssh` and `nixvm console`: a socket of its own.

QEMU serves one client on each of its sockets, and that is `nixvm run`. Others ask it: a line of
JSON, `{"op": "ssh", "user": null}` or `{"op": "console"}`, is answered by a line, `{"ok": true, …}`
or `{"error": "…"}`. Behind the answer to "console" come and go the serial console's bytes.

The socket is in a directory that only this user may enter.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pytest_nixvm.errors import MachineError, MachineGoneError, NixvmError
from pytest_nixvm.guest.console import Console

_LONGEST_LINE = 64 * 1024
_WAITING = 4096
"""Chunks that may wait for a client that does not read; then it is hung up on."""


class Host(Protocol):
    """The part of a running VM that is asked for. Any thread calls it."""

    def log_in(self, user: str | None) -> Sequence[str]:
        """Let somebody in and return the ssh command for it. Raises `NixvmError`."""

    def serial_console(self) -> Console:
        """Return the serial console. Raises `NixvmError`."""


class Control:
    """Answers on a socket until it is closed. Raises `OSError` if the socket can't be made."""

    def __init__(self, path: Path, host: Host) -> None:
        self._host = host
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._closed = False
        threading.Thread(target=self._accept, name="nixvm-control", daemon=True).start()

    def close(self) -> None:
        """Take no more clients. Those that are served end with the VM."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(client,), name="nixvm-client", daemon=True
            ).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):  # the client has gone
            try:
                request = json.loads(_read_line(client))
                if request["op"] == "ssh":
                    argv = [*self._host.log_in(request.get("user"))]
                    _write_line(client, {"ok": True, "argv": argv})
                elif request["op"] == "console":
                    console = self._host.serial_console()
                    _write_line(client, {"ok": True})
                    _relay(client, console)
                else:
                    _write_line(client, {"error": f"unknown operation {request['op']!r}"})
            except NixvmError as error:
                _write_line(client, {"error": str(error)})
            except (ValueError, KeyError, TypeError) as error:
                _write_line(client, {"error": f"no request: {error!r}"})


def _relay(client: socket.socket, console: Console) -> None:
    """Carry bytes both ways until either end hangs up."""
    shown: queue.Queue[bytes] = queue.Queue(_WAITING)

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def take(data: bytes) -> None:
        # On the thread that reads from QEMU: it must not wait for anybody.
        try:
            shown.put_nowait(data)
        except queue.Full:
            hang_up()

    def write() -> None:
        with contextlib.suppress(OSError):
            while data := shown.get():
                client.sendall(data)
        hang_up()

    if prompt := console.last_line().encode():
        shown.put_nowait(prompt)
    undo = console.tap(lambda data: take(data) if data or console.closed else None)
    writer = threading.Thread(target=write, name="nixvm-console", daemon=True)
    writer.start()
    try:
        while not console.closed and (typed := client.recv(4096)):
            console.send(typed)
    except MachineError:
        pass  # it has ended: the writer tells
    finally:
        undo()
        with contextlib.suppress(queue.Full):
            shown.put_nowait(b"")
        writer.join(5)


# --- the other end ------------------------------------------------------------------------------


def ask(
    name: str, path: Path, request: Mapping[str, object]
) -> tuple[socket.socket, dict[str, Any]]:
    """Ask a running VM; return the connection, and the answer. Waits as long as it takes.

    Raises `MachineError` with what it says, `MachineGoneError` if it ends meanwhile.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
        _write_line(connection, request)
        answer = json.loads(_read_line(connection))
    except (OSError, ValueError):
        connection.close()
        raise MachineGoneError(f"{name} has ended.") from None
    except BaseException:
        connection.close()
        raise
    if "error" in answer:
        connection.close()
        raise MachineError(str(answer["error"]))
    return connection, answer


def _read_line(connection: socket.socket) -> bytes:
    # A byte at a time: what comes behind the line is not ours.
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > _LONGEST_LINE:
            raise ValueError("no line")
        line += byte
    return line


def _write_line(connection: socket.socket, message: Mapping[str, object]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")
