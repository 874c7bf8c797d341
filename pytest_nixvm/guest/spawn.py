"""The serial console as a pexpect object."""

from __future__ import annotations

import codecs
import queue
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pexpect
from pexpect.spawnbase import SpawnBase

from pytest_nixvm.guest.console import Console
from pytest_nixvm.wait import Deadline

if TYPE_CHECKING:
    _Base = SpawnBase[str]
else:
    _Base = SpawnBase


class Spawn(_Base):
    """A pexpect object on the serial console: `expect`, `send`, `sendline`, `sendcontrol`.

    It reads text as the terminal would get it, escape sequences included, and begins with the line
    the cursor was on when it was made. `pexpect.EOF` means that QEMU has ended.
    """

    def __init__(self, console: Console, timeout: float = 30) -> None:
        super().__init__(timeout=timeout, encoding="utf-8", codec_errors="replace")
        self.name = "<serial console>"
        self.child_fd = -1
        self.closed = False
        self.delaybeforesend = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._console = console
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._rest = b""
        self._queue.put(console.last_line().encode())
        self._undo = console.tap(self._queue.put)
        if console.closed:
            self._queue.put(b"")

    def read_nonblocking(self, size: int = 1, timeout: float | None = -1) -> str:
        """Return at most `size` characters; `pexpect.TIMEOUT` after `timeout` seconds."""
        if timeout == -1:
            timeout = self.timeout
        deadline = None if timeout is None else Deadline(timeout)
        while True:
            if not self._rest:
                try:
                    left = None if deadline is None else deadline.remaining()
                    self._rest = (
                        self._queue.get(timeout=left) if left != 0 else self._queue.get(False)
                    )
                except queue.Empty:
                    raise pexpect.TIMEOUT("Timeout exceeded.") from None
                if not self._rest and self._console.fault is not None:
                    self._queue.put(b"")
                    raise self._console.fault.again()
                if not self._rest and self._console.closed:
                    self._queue.put(b"")  # the end stays the end
                    self.flag_eof = True
                    raise pexpect.EOF("End of file: the serial console is closed.")
            data, self._rest = self._rest[:size], self._rest[size:]
            text = self._decode(data)
            if text:
                self._record(text, self.logfile_read)
                return text

    def send(self, s: str | bytes) -> int:
        """Type `s`; return the number of bytes. Raises `MachineGoneError` when nobody listens."""
        text = s.decode("utf-8", "replace") if isinstance(s, bytes) else s
        self._record(text, self.logfile_send)
        data = s if isinstance(s, bytes) else s.encode()
        self._console.send(data)
        return len(data)

    def sendline(self, s: str | bytes = "") -> int:
        """Type `s` and press Return."""
        return self.send(s + (b"\r" if isinstance(s, bytes) else "\r"))  # type: ignore[operator]

    def write(self, s: str | bytes) -> None:
        """Type `s`."""
        self.send(s)

    def writelines(self, sequence: Iterable[str | bytes]) -> None:
        """Type each of `sequence`."""
        for each in sequence:
            self.send(each)

    def sendcontrol(self, char: str) -> int:
        r"""Press Control and a letter (or one of `@[\]^_?`)."""
        return self.send(b"\x7f" if char == "?" else bytes([ord(char.upper()) & 0x1F]))

    def sendeof(self) -> int:
        """Press Control-D."""
        return self.sendcontrol("d")

    def sendintr(self) -> int:
        """Press Control-C."""
        return self.sendcontrol("c")

    def isalive(self) -> bool:
        """Whether QEMU still has the console open."""
        return not self._console.closed

    def close(self, force: bool = True) -> None:  # noqa: ARG002 - pexpect's signature
        """Stop listening; the console itself stays open."""
        self._undo()
        self.closed = True

    def _record(self, text: str, also: Any) -> None:
        for file in (self.logfile, also):
            if file is not None:
                file.write(text)
                file.flush()
