"""One command over one SSH channel: three streams at once, an exit status, and a deadline."""

from __future__ import annotations

import logging
import re
import shlex
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import paramiko
from paramiko.common import MSG_CHANNEL_REQUEST

from pytest_nixvm.guest.result import Command
from pytest_nixvm.wait import Deadline

WINDOW = 8 * 1024 * 1024
"""Bytes that the guest may send ahead of us."""

LOG_CHANNEL = "pytest_nixvm.paramiko"
"""Where paramiko logs. It reports as errors what is tried again, and all else is raised by us."""

logging.getLogger(LOG_CHANNEL).setLevel(logging.CRITICAL)

_CHUNK = 64 * 1024
_TICK = 0.25
"""Seconds after which a blocked stream looks at the clock; data wakes it at once."""


@dataclass
class Collected:
    """What a command left behind; `status` is None if the connection ended before it came."""

    stdout: bytes = b""
    stderr: bytes = b""
    status: int | None = None


def remote_line(command: Command, env: Mapping[str, str]) -> str:
    """Return the line for the user's log-in shell: environment first, then the command.

    Raises `ValueError` for what is not the name of a variable.
    """
    for name in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} can't be the name of an environment variable")
    pairs = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
    line = command if isinstance(command, str) else f"exec {shlex.join(command)}"
    return f"export {pairs}\n{line}" if pairs else line


class Streams:
    """The three streams of a channel on which a command was started.

    Each has a thread of its own: they share one window, so that reading one after the other would
    stop a command that writes much to the other (paramiko's own `exec_command` does). Stdout goes
    to `sink` if one is given.
    """

    def __init__(
        self,
        channel: paramiko.Channel,
        stdin: bytes | BinaryIO | None = None,
        sink: BinaryIO | None = None,
    ) -> None:
        channel.settimeout(_TICK)
        self._channel = channel
        self._done = threading.Event()
        self._out, self._err = sink if sink is not None else BytesIO(), BytesIO()
        self._failures: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True)
            for work in (
                lambda: _read(channel.recv_stderr, self._err, self._done),
                lambda: _read(channel.recv, self._out, self._done),
                lambda: _feed(channel, stdin, self._done),
            )
        ]
        for thread in self._threads:
            thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failures.append(error)
            # A command that nobody reads any more would wait for its reader until the deadline.
            self._channel.close()

    def wait(self, deadline: Deadline) -> bool:
        """Wait for the end of both outputs and the exit status; return whether they came."""
        readers = self._threads[:2]
        for reader in readers:
            reader.join(deadline.remaining())
        self._channel.status_event.wait(deadline.remaining())
        ended = self._channel.status_event.is_set()
        return ended and not any(reader.is_alive() for reader in readers)

    def finish(self) -> Collected:
        """Stop the threads and return what there is. Raises what broke in one of them."""
        self._done.set()
        for thread in self._threads:
            thread.join(2 * _TICK + 1)
        if self._failures:
            raise self._failures[0]
        got = Collected(stderr=self._err.getvalue())
        if isinstance(self._out, BytesIO):
            got.stdout = self._out.getvalue()
        # paramiko says -1 when the channel was closed without a status.
        if self._channel.status_event.is_set() and self._channel.exit_status >= 0:
            got.status = self._channel.exit_status
        return got


def _read(receive: Callable[[int], bytes], into: BinaryIO, done: threading.Event) -> None:
    while not done.is_set():
        try:
            data = receive(_CHUNK)
        except TimeoutError:
            continue
        if not data:
            return
        into.write(data)


def _feed(channel: paramiko.Channel, stdin: bytes | BinaryIO | None, done: threading.Event) -> None:
    source = stdin if stdin is not None and not isinstance(stdin, bytes) else BytesIO(stdin or b"")
    while not done.is_set() and (data := source.read(_CHUNK)):
        while data and not done.is_set():
            try:
                data = data[channel.send(data) :]
            except TimeoutError:
                continue
            except OSError:
                return  # the command has ended without reading everything, which is its right
    if not done.is_set():
        try:
            channel.shutdown_write()
        except (OSError, EOFError):
            return


def make_transport(*args: Any, **options: Any) -> paramiko.Transport:
    """Make a transport whose channels know of commands that were ended by a signal.

    paramiko ignores `exit-signal` (RFC 4254, 6.10) and reports -1, as it does for a connection that
    broke. Here the exit status becomes 128 + the signal's number, as in a shell.
    """
    made: Any = paramiko.Transport(*args, **options)
    made.set_log_channel(LOG_CHANNEL)
    made._channel_handler_table = {
        **made._channel_handler_table,
        MSG_CHANNEL_REQUEST: _on_request,
    }
    return made  # type: ignore[no-any-return]


def _on_request(channel: Any, message: paramiko.Message) -> None:
    if message.get_text() == "exit-signal":
        message.get_boolean()
        number = getattr(signal, f"SIG{message.get_text()}", 0)
        channel.exit_status = 128 + int(number)
        channel.status_event.set()
        return
    message.rewind()
    message.get_int()  # the channel's number, which the transport has read already
    paramiko_channel: Any = paramiko.Channel
    paramiko_channel._handle_request(channel, message)
