"""The host's ends of one shell's ports: bytes both ways at once, until the marks have come.

What the marks mean is `shell_script`'s; here they are found, and what is around them is handed on
as it comes, so that a command may write (and read) more than fits into memory. All of it is done in
the thread of whoever waits for the command: a thread that hands over to another one takes longer
than the guest does for the whole command.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from pytest_nixvm.errors import MachineError, MachineGoneError
from pytest_nixvm.qemu.ports import Pair
from pytest_nixvm.wait import Deadline

Sink = Callable[[bytes], object]
"""Takes a part of an output."""

_RECEIVE = 256 * 1024
_CHUNK = 2 * 1024 * 1024
_TEXT = 64 * 1024  # what bash itself passes on faster than `head`, which has to be started


class ShellGoneError(Exception):
    """The guest has closed the ports: the shell, or its relays, have ended."""


class Output:
    """One output of the shell: finds the marks of `nonce`, hands the rest to `sink`.

    `on_mark` is called with a mark's words; what it returns says whether this was the last one.
    What comes behind the last one goes to the output `then`, or is dropped.
    """

    def __init__(
        self,
        nonce: str,
        sink: Sink,
        on_mark: Callable[[list[str]], bool],
        then: Output | None = None,
    ) -> None:
        self._start = b"\0" + nonce.encode() + b" "
        self._sink = sink
        self._on_mark = on_mark
        self._then = then
        self._ended = False
        self._rest = b""

    @property
    def done(self) -> bool:
        """Whether the last mark has come."""
        return self._ended and (self._then is None or self._then.done)

    def feed(self, data: bytes) -> None:
        """Take what has arrived."""
        data, self._rest = self._rest + data if self._rest else data, b""
        while not self._ended:
            at = data.find(self._start)
            end = data.find(b"\n", at) if at >= 0 else -1
            if end < 0:
                if at < 0:
                    at = self._beginning(data)
                if at:
                    self._sink(data[:at])
                self._rest = data[at:]
                return
            if at:
                self._sink(data[:at])
            words = data[at + len(self._start) : end].decode("ascii", "replace").split()
            data = data[end + 1 :]
            self._ended = self._on_mark(words)
        if data and self._then is not None:
            self._then.feed(data)

    def flush(self) -> None:
        """Hand on what looked like the beginning of a mark: nothing more will come."""
        if self._rest:
            self._sink(self._rest)
            self._rest = b""
        if self._then is not None:
            self._then.flush()

    def _beginning(self, data: bytes) -> int:
        """Return where a mark may begin whose end has not arrived yet."""
        at = data.rfind(b"\0", max(0, len(data) - len(self._start)))
        return at if at >= 0 and self._start.startswith(data[at:]) else len(data)


@dataclass
class Collected:
    """What a command writes: kept, or handed on to a file."""

    file: BinaryIO | None
    patient: bool = False  # whether a file that takes no more is no matter any more
    parts: list[bytes] = field(default_factory=list)

    def write(self, data: bytes) -> None:
        """Take a part."""
        if self.file is None:
            self.parts.append(data)
        elif self.patient:
            with suppress(Exception):
                self.file.write(data)
        else:
            self.file.write(data)

    @property
    def bytes(self) -> bytes:
        """What was kept."""
        return b"".join(self.parts)

    @property
    def text(self) -> str:
        """What was kept, as text."""
        return self.bytes.decode("utf-8", "replace")


class Input:
    """What the shell is sent: a text, then perhaps a command's input in chunks.

    `body` is bytes, or a binary file that is read as the guest takes it. `stop` ends the input
    with the chunk that is under way.
    """

    def __init__(self, head: bytes, body: bytes | BinaryIO | None = None) -> None:
        self._parts = [head]
        self._body = body
        self._at = 0

    def push(self, data: bytes) -> None:
        """Send something more."""
        self._parts.append(data)

    def stop(self) -> None:
        """Take no more of the body."""
        if self._body is not None:
            self._body = None
            self._parts.append(b"0\n")

    def take(self) -> memoryview:
        """Return the next bytes to send, none if there are none (now)."""
        if not self._parts and self._body is not None:
            chunk = self._read()
            if not chunk:
                self.stop()
            else:
                kind = b" text" if len(chunk) <= _TEXT and b"\0" not in chunk else b""
                self._parts += [b"%d%s\n" % (len(chunk), kind), chunk]
        return memoryview(self._parts.pop(0) if self._parts else b"")

    def _read(self) -> bytes:
        if isinstance(self._body, bytes):
            chunk = self._body[self._at : self._at + _CHUNK]
            self._at += len(chunk)
            return chunk
        if self._body is None:
            return b""
        # read1: what a pipe has now, instead of all that it will have.
        read: Callable[[int], bytes | None] = getattr(self._body, "read1", self._body.read)
        chunk = read(_CHUNK) or b""
        if isinstance(chunk, str):
            raise TypeError("stdin has to be a binary file")
        return chunk


class Stream:
    """The sockets of one pair of ports. One exchange at a time; `wake` and `fail` from any thread.

    They are connected before the guest opens the ports and stay so: with nobody on the host, what
    the guest writes blocks, and what it reads is an end of file.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._sockets: list[socket.socket] = []
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._fault: MachineError | None = None
        self._lock = threading.Lock()

    @property
    def connected(self) -> bool:
        """Whether the host is there."""
        return bool(self._sockets)

    def connect(self, timeout: float = 10) -> None:
        """Connect to QEMU's sockets, if they are not. Raises `MachineGoneError`."""
        if self._sockets:
            return
        made: list[socket.socket] = []
        try:
            for port in self._pair.both:
                made.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                made[-1].settimeout(timeout)
                made[-1].connect(str(port.socket))
                made[-1].setblocking(False)
        except OSError as error:
            for each in made:
                each.close()
            raise MachineGoneError(
                f"No connection to the socket {port.socket} of a shell's port: {error}."
            ) from error
        self._sockets = made

    def close(self) -> None:
        """Hang up. The shell in the guest, if there is one, ends by that."""
        sockets, self._sockets = self._sockets, []
        for each in sockets:
            each.close()

    def dispose(self) -> None:
        """`close`, for good."""
        self.close()
        with self._lock:
            self._woken.close()
            self._waker.close()

    def wake(self) -> None:
        """Make an exchange that is under way look around. From any thread."""
        with self._lock, suppress(OSError):
            self._waker.send(b"x")

    def fail(self, error: MachineError | None) -> None:
        """Make every exchange end with `error`, until it is None again. From any thread."""
        self._fault = error
        self.wake()

    def send(self, data: bytes) -> None:
        """Send a few bytes between two exchanges. Raises `MachineGoneError`."""
        main = self._sockets[0]
        try:
            main.settimeout(10)
            main.sendall(data)
            main.setblocking(False)
        except OSError as error:
            raise gone() from error

    def exchange(
        self,
        source: Input,
        outputs: tuple[Output, Output],
        deadline: Deadline,
        watch: Callable[[], None],
        every: float,
    ) -> None:
        """Send `source` and read both outputs at the same time, until both are done.

        `watch` is called after each `every` seconds of silence, and after `wake`; it raises if
        waiting makes no sense any more. Raises `TimeoutError` at the deadline, `MachineGoneError`
        when QEMU closes a socket, and what `fail` was given.
        """
        main = self._sockets[0]
        sending = memoryview(b"")
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for each, output in zip(self._sockets, outputs, strict=True):
                selector.register(each, selectors.EVENT_READ, output)
            events = selectors.EVENT_READ
            while True:
                sending = self._send(main, sending, source)
                if all(output.done for output in outputs):
                    return
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if sending else 0)
                if wanted != events:
                    selector.modify(main, wanted, outputs[0])
                    events = wanted
                ready = selector.select(deadline.remaining(every))
                if self._fault is not None:
                    raise self._fault.again()
                woken = not ready
                for key, mask in ready:
                    if key.fileobj is self._woken:
                        self._woken.recv(4096)
                        woken = True
                    elif mask & selectors.EVENT_READ:
                        self._receive(key.fileobj, key.data)  # type: ignore[arg-type]
                if all(output.done for output in outputs):
                    return
                if deadline.expired:
                    raise TimeoutError
                if woken:
                    self._look(watch, outputs)

    def _look(self, watch: Callable[[], None], outputs: tuple[Output, Output]) -> None:
        try:
            watch()
        except ShellGoneError:
            # It may have done all that it should before it ended.
            for each, output in zip(self._sockets, outputs, strict=True):
                while self._receive(each, output):
                    pass
            if not all(output.done for output in outputs):
                raise

    def _send(self, main: socket.socket, sending: memoryview, source: Input) -> memoryview:
        """Send as much as there is room for, and return what is left of the part under way."""
        while True:
            if not sending:
                sending = source.take()
            if not sending:
                return sending
            try:
                sending = sending[main.send(sending) :]
            except BlockingIOError:
                return sending
            except OSError as error:
                raise gone() from error
            if len(sending):
                return sending

    def _receive(self, each: socket.socket, output: Output) -> bool:
        try:
            data = each.recv(_RECEIVE)
        except BlockingIOError:
            return False
        except OSError as error:
            raise gone() from error
        if not data:
            raise gone()
        output.feed(data)
        return True


def gone() -> MachineGoneError:
    """Return the error of a socket that QEMU has closed."""
    return MachineGoneError("A shell's port is closed: QEMU has ended.")
