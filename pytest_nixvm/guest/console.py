"""The serial console's output, drained from power-on so that the guest never blocks on it."""

from __future__ import annotations

import asyncio
import codecs
import re
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pytest_nixvm.errors import MachineError, MachineGoneError, SerialError, tail
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.wait import Deadline, timed_out

KEPT = 32 * 1024 * 1024
"""Characters kept in memory; what is older is in the log only."""

LONGEST_MATCH = 16 * 1024
"""Characters that one match of a pattern may span."""

_BLOCK = 64 * 1024
_ESCAPES = re.compile(
    r"\r\x1b\[\d+C"  # to a column of the same line (fish, after its prompt)
    r"|\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC: window titles, systemd's context marks
    r"|\x1b[PX^_][^\x1b]*\x1b\\"  # DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-OQ-WYZ\\`-~]"  # everything of two or three characters
    r"|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]"
)
_UNFINISHED = re.compile(r"(?:\r*\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)?|\r+)\Z")


class Cleaner:
    """Turns a terminal's bytes into plain text: UTF-8, no escape sequences, lines ending in LF.

    What a chunk leaves unfinished (half a character, half a sequence) waits for the next one.
    """

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""

    def feed(self, data: bytes) -> str:
        """Return the text that `data` completes."""
        text = self._rest + self._decode(data)
        unfinished = _UNFINISHED.search(text)
        # A stray ESC must not hold back the console for ever.
        if unfinished is not None and len(text) - unfinished.start() < 1024:
            self._rest = text[unfinished.start() :]
            text = text[: unfinished.start()]
        else:
            self._rest = ""
        return re.sub(r"\r+\n|\r", "\n", _ESCAPES.sub("", text))


class Console(asyncio.Protocol):
    """Everything that the serial console has shown since power-on. For any thread.

    console = Console(io, socket, log)
    console.connect(timeout=5)              # before the guest's first output
    since = console.mark()
    console.wait_for(r"login: $", timeout=60)
    console.text(since)                     # plain text: no escape sequences, LF

    QEMU serves one client on this socket, and writes all output to `log` whether or not anybody
    reads. Offsets count characters of plain text since power-on.
    """

    def __init__(self, io: IoThread, socket: Path, log: Path) -> None:
        self.log = log
        self._io = io
        self._socket = socket
        self._transport: asyncio.Transport | None = None
        self._clean = Cleaner()
        self._blocks: deque[str] = deque()
        self._start = 0
        self._end = 0
        self._closed = False
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._taps: list[Callable[[bytes], None]] = []
        self._notice_due = False
        self._fault: MachineError | None = None

    # --- connection -----------------------------------------------------------------------------

    def connect(self, timeout: float = 10) -> None:
        """Connect to QEMU's socket, waiting until it is there. Raises `MachineGoneError`."""

        async def connect() -> None:
            while True:
                with suppress(FileNotFoundError, ConnectionRefusedError):
                    # What a late comer has missed is in the log.
                    with suppress(OSError):
                        self._take(self.log.read_bytes())
                    await self._io.loop.create_unix_connection(lambda: self, str(self._socket))
                    return
                self._forget()
                await asyncio.sleep(0.01)

        try:
            self._io.run(connect(), timeout)
        except (TimeoutError, OSError) as error:
            raise MachineGoneError(
                f"No connection to the serial console's socket {self._socket} "
                f"within {timeout:g} s: {str(error) or 'it is not there'}."
            ) from error

    def close(self) -> None:
        """Hang up; what was read stays. May be called twice."""

        def hang_up() -> None:
            if self._transport is not None:
                self._transport.abort()
            self.connection_lost(None)

        self._io.call(hang_up)

    def interrupt(self, error: MachineError) -> None:
        """End every `wait_for` that is under way, and every later one that finds nothing."""
        with self._changed:
            self._fault = error
            self._changed.notify_all()
        self._io.call(lambda: [tap(b"") for tap in tuple(self._taps)])

    @property
    def fault(self) -> MachineError | None:
        """What `interrupt` was given."""
        return self._fault

    def revive(self) -> None:
        """Wait again after `interrupt`: the guest was started anew."""
        self._fault = None

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, by `close` or because QEMU has."""
        return self._closed

    def send(self, data: bytes) -> None:
        """Type `data`. Raises `MachineGoneError` when the connection has ended."""
        transport = self._transport
        if self._closed or transport is None:
            raise MachineGoneError("The serial console is closed: nobody would read what is sent.")
        self._io.call(lambda: transport.write(data))

    # --- what was shown -------------------------------------------------------------------------

    def mark(self) -> int:
        """Return the offset of what will be shown next."""
        with self._changed:
            return self._end

    def text(self, since: int = 0) -> str:
        """Return what was shown since the offset `since`, as far as it is kept."""
        with self._changed:
            return self._text(since)

    def tail(self, lines: int = 25) -> str:
        """Return the last lines."""
        with self._changed:
            return tail(self._text(self._end - 400 * lines), lines)

    def last_line(self) -> str:
        """Return the line on which the cursor is: a prompt, or nothing."""
        with self._changed:
            return self._text(self._end - 1024).rpartition("\n")[2]

    # --- waiting --------------------------------------------------------------------------------

    def wait_for(
        self, pattern: str | re.Pattern[str], timeout: float, since: int = 0
    ) -> re.Match[str]:
        r"""Wait until `pattern` is found in what was shown since `since` (0: power-on).

        `^` and `$` match at lines. A match spans at most `LONGEST_MATCH` characters. Raises
        `WaitTimeoutError` with the console's tail, `MachineGoneError` if the console closes first.
        """
        search = _Search(pattern, since)
        deadline = Deadline(timeout)
        with self._changed:
            while True:
                found = search.step(self._text, self._end)
                if found is not None:
                    return found
                if self._fault is not None:
                    raise self._fault.again()
                if self._closed:
                    break
                if deadline.expired:
                    saw = "Its last lines:\n" + tail(self._text(self._end - 8192), 25)
                    raise timed_out(f"{search} on the serial console", timeout, saw)
                self._changed.wait(deadline.remaining())
        raise MachineGoneError(f"The serial console closed before it showed {search}.")

    def wait_beyond(self, offset: int, timeout: float) -> bool:
        """Wait until something was shown after `offset`; return whether it was."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._end > offset or self._closed or self._fault is not None, timeout
            )
            if self._end <= offset and self._fault is not None:
                raise self._fault.again()
            return self._end > offset

    async def shown(self, pattern: str | re.Pattern[str], since: int = 0) -> re.Match[str]:
        """`wait_for` for code on the I/O thread, without a limit. Raises `MachineGoneError`."""
        search = _Search(pattern, since)
        news = asyncio.Event()
        undo = self.on_output(news.set)
        try:
            while True:
                news.clear()
                with self._changed:
                    found = search.step(self._text, self._end)
                if found is not None:
                    return found
                if self._closed:
                    raise MachineGoneError(f"The serial console closed before it showed {search}.")
                await news.wait()
        finally:
            undo()

    def on_output(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` on the I/O thread soon after each output, and at the end.

        What comes within 10 ms is one call. Returns a function that ends it.
        """
        self._listeners.append(callback)
        return lambda: _discard(self._listeners, callback)

    def tap(self, callback: Callable[[bytes], None]) -> Callable[[], None]:
        """Call `callback` on the I/O thread with the raw bytes; with none at the end or a fault."""
        self._taps.append(callback)
        return lambda: _discard(self._taps, callback)

    # --- on the I/O thread ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio)."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take output and wake whoever waits (asyncio)."""
        for tap in tuple(self._taps):
            tap(data)
        self._take(data)
        self._notice()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Wake whoever waits: nothing more will come (asyncio)."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        for tap in tuple(self._taps):
            tap(b"")
        self._notice()

    def _take(self, data: bytes) -> None:
        text = self._clean.feed(data)
        with self._changed:
            if self._blocks and len(self._blocks[-1]) < _BLOCK:
                self._blocks[-1] += text
            else:
                self._blocks.append(text)
            self._end += len(text)
            while self._end - self._start - len(self._blocks[0]) > KEPT:
                self._start += len(self._blocks.popleft())
            self._changed.notify_all()

    def _forget(self) -> None:
        with self._changed:
            self._blocks.clear()
            self._start = self._end = 0
            self._clean = Cleaner()

    def _text(self, since: int) -> str:
        """Return the text from an offset on. The caller holds the lock."""
        parts: deque[str] = deque()
        offset = self._end
        for block in reversed(self._blocks):
            if offset <= since:
                break
            parts.appendleft(block)
            offset -= len(block)
        return "".join(parts)[max(0, since - offset) :]

    def _notice(self) -> None:
        # A pattern is searched for in all of a boot's output by some listeners: not at each byte.
        if not self._notice_due:
            self._notice_due = True
            self._io.loop.call_later(0.01, self._tell)

    def _tell(self) -> None:
        self._notice_due = False
        for listener in tuple(self._listeners):
            listener()


class _Search:
    """A search that looks at new text only, and at the end of the old for what straddles."""

    def __init__(self, pattern: str | re.Pattern[str], since: int) -> None:
        try:
            self._pattern = (
                re.compile(pattern, re.MULTILINE) if isinstance(pattern, str) else pattern
            )
        except re.error as error:
            raise SerialError(f"{pattern!r} is no regular expression: {error}.") from error
        self._since = since
        self._from = since

    def __str__(self) -> str:
        return repr(self._pattern.pattern)

    def step(self, text: Callable[[int], str], end: int) -> re.Match[str] | None:
        # One character of context, so that `^` does not match wherever the search goes on.
        context = 1 if self._from > self._since else 0
        found = self._pattern.search(text(self._from - context), context)
        self._from = max(self._from, end - LONGEST_MATCH)
        return found


def _discard(callbacks: list[Callable[..., None]], callback: Callable[..., None]) -> None:
    if callback in callbacks:
        callbacks.remove(callback)
