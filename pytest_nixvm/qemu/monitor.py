"""QMP: commands to a running QEMU, its answers and its events.

monitor = Monitor(io, sockets / "qmp", name="dev-vm")   # listens; QEMU is told to connect
monitor.connect(process, timeout=30)                    # up: QEMU answers commands
mark = monitor.mark()
monitor.execute("system_powerdown")
monitor.wait_event("SHUTDOWN", timeout=60, since=mark)

We listen and QEMU connects, so there is nothing to poll, and the peer's credentials tell QEMU's pid
even where the start script does not `exec` it. The protocol is spoken by `qemu.qmp`, which is
asynchronous and knows no timeouts: it runs on the I/O thread, and every call here is bounded.

Protocol: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
)

from pytest_nixvm.errors import MachineGoneError, QmpError
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.supervisor import Process

_logger = logging.getLogger(__name__)
# qemu.qmp logs an error for each connection that ends, which is how every VM ends. What matters
# comes as an exception.
_qmp_logger = logging.getLogger(f"{__name__}.qmp")
_qmp_logger.disabled = True

_HISTORY = 4000  # events; a busy VM sends some dozens

# How HMP commands say that they failed: in their text, there is no status. Their sources agree on
# little, see hmp-cmds.c, slirp.c, monitor/hmp.c of QEMU.
_HMP_ERROR = re.compile(
    r"""^(
        error\b | unknown\s(command|option) | unsupported\soption | invalid\b
        | could\snot\b | cannot\b | can't\b | failed\b | unable\b | unrecognized\b | missing\b
        | no\ssuch\b | there\sis\sno\b | .*\bnot\sfound\b | .*\bis\snot\savailable\b
        | parameter\s.*\b(is\smissing|expects)\b
        | .*\bexpected$ | .*:\s(extraneous\scharacters|unknown\soption|integer\sexpected)
    )""",
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class Event:
    """One QMP event."""

    sequence: int  # 1, 2, 3, … in the order of arrival
    name: str  # "SHUTDOWN"
    data: Mapping[str, Any]
    timestamp: float  # QEMU's clock, seconds since the epoch


class Monitor:
    """The QMP connection of one VM. All methods may be called from several threads."""

    def __init__(self, io: IoThread, path: Path, *, name: str = "the VM") -> None:
        self.name = name
        self.version: tuple[int, int, int] = (0, 0, 0)  # QEMU's, known once connected
        self.pid: int | None = None  # QEMU's, known once connected
        # Says why QEMU is gone, for MachineGoneError; may wait a moment for the exit status.
        self.describe_end: Callable[[], str] = str
        self._io = io
        self._client = QMPClient()
        self._client.logger = _qmp_logger
        # The default listener would keep every event for ever.
        self._client.events.event_filter = lambda _event: False
        # A filter that takes note and declines: called in order, in the I/O thread, and unlike an
        # accepted event nothing piles up in the library.
        self._client.register_listener(EventListener(event_filter=self._record))
        self._changed = threading.Condition()
        self._events: deque[Event] = deque(maxlen=_HISTORY)
        self._sequence = 0
        self._callbacks: list[Callable[[Event], None]] = []
        self._gone = False
        self._closed = False
        self._watcher: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            path.unlink(missing_ok=True)
            self._listener.bind(str(path))
            self._listener.listen(1)
        except OSError:
            self._listener.close()
            raise

    # --- connecting ---

    def connect(self, process: Process, timeout: float) -> None:
        """Wait until QEMU has connected and answers commands.

        Raises `MachineGoneError` as soon as `process` ends, `QmpError` after `timeout` seconds, and
        when what connects does not speak QMP.
        """
        try:
            self._io.run(self._connect(process), timeout)
        except TimeoutError:
            self.close()
            raise QmpError(
                f"{self.name}: QEMU's monitor did not answer within {timeout:g} s."
            ) from None
        except BaseException:
            self.close()
            raise

    async def _connect(self, process: Process) -> None:
        ended = asyncio.Event()

        def process_ended(_status: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                self._io.call(ended.set)

        process.on_exit(process_ended)
        waiting = asyncio.ensure_future(ended.wait())
        handshake = asyncio.ensure_future(self._handshake())
        try:
            await asyncio.wait({waiting, handshake}, return_when=asyncio.FIRST_COMPLETED)
            if handshake.done():
                handshake.result()
                return
            self._gone = True
            raise MachineGoneError(f"{self.name}: QEMU ended before its monitor answered.")
        finally:
            for task in (waiting, handshake):
                task.cancel()
            await asyncio.gather(waiting, handshake, return_exceptions=True)

    async def _handshake(self) -> None:
        loop = asyncio.get_running_loop()
        connection, _ = await loop.sock_accept(self._listener)
        self._close_listener()
        # struct ucred: pid, uid, gid (unix(7)).
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid = struct.unpack("3i", credentials)[0]
        try:
            await self._client.connect(connection)
        except ConnectError as error:
            connection.close()
            if isinstance(error.exc, (EOFError, ConnectionError)):
                raise await self._closed_early() from None
            raise QmpError(f"{self.name}: the monitor does not speak QMP: {error}") from error
        except AssertionError:
            # The library's own, where the connection ends in the moment in which it is made.
            with contextlib.suppress(Exception):
                await self._client.disconnect()
            connection.close()
            raise await self._closed_early() from None
        except BaseException:
            connection.close()
            raise
        self._watcher = asyncio.ensure_future(self._watch())
        greeting = self._client.greeting
        if greeting is not None:
            with contextlib.suppress(KeyError, TypeError, AttributeError):
                number: Any = greeting.QMP.version["qemu"]
                self.version = (number["major"], number["minor"], number["micro"])
        # Up is the first command that answers.
        try:
            await self._client.execute("query-status")
        except (QMPError, EOFError, OSError) as error:
            if self._client.runstate == Runstate.RUNNING:
                raise QmpError(f"{self.name}: QEMU's monitor: {error}") from error
            raise await self._closed_early() from None

    async def _closed_early(self) -> MachineGoneError:
        """Return the error for a QEMU that closes its monitor while it starts.

        It sends its greeting before it has built the machine, and may still fail. Its end will be
        reported in a moment, with the status: `_connect` waits for that as well.
        """
        await asyncio.sleep(2)
        return MachineGoneError(f"{self.name}: QEMU closed its monitor while it started.")

    async def _watch(self) -> None:
        """Wait for the connection's end, and take the library's own tasks to theirs.

        Only here is it disconnected: two at once fail its assertions, and one that is cancelled
        leaves futures behind of which asyncio complains.
        """
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            while self._client.runstate == Runstate.RUNNING and not stop.done():
                changed = asyncio.ensure_future(self._client.runstate_changed())
                await asyncio.wait({stop, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
        finally:
            stop.cancel()
            with self._changed:
                self._gone = True
                self._changed.notify_all()
            # Raises what ended the reader and writer tasks, EOFError above all.
            with contextlib.suppress(Exception):
                await self._client.disconnect()

    # --- commands ---

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = 10,
    ) -> Any:
        """Run a QMP command and return what it returns.

        Raises `QmpError` with QEMU's words, or when there is no answer within `timeout` seconds,
        and `MachineGoneError` as soon as QEMU ends.
        """
        if self._gone or self._closed:
            raise self._gone_error(command)
        try:
            return self._io.run(self._client.execute(command, arguments), timeout)
        except ExecuteError as error:
            raise QmpError(
                f"{self.name}: the QMP command {command!r} failed: {error} ({error.error_class})",
                error_class=error.error_class,
                description=str(error),
            ) from None
        except TimeoutError:
            raise QmpError(
                f"{self.name}: QEMU did not answer the QMP command {command!r} "
                f"within {timeout:g} s.",
                error_class="Timeout",
            ) from None
        except (ExecInterruptedError, EOFError, OSError):
            raise self._gone_error(command) from None
        except QMPError as error:
            if self._client.runstate != Runstate.RUNNING:
                raise self._gone_error(command) from None
            raise QmpError(f"{self.name}: the QMP command {command!r}: {error}") from error
        except RuntimeError as error:
            if self._io.loop.is_closed():
                raise self._gone_error(command) from error
            raise

    def hmp(self, line: str, *, timeout: float = 10) -> str:
        """Run a line of the human monitor and return its text.

        HMP has no error status, so text that reads like an error is raised as `QmpError`; the rest
        as in `execute`.
        """
        text = str(
            self.execute("human-monitor-command", {"command-line": line}, timeout=timeout)
        ).replace("\r\n", "\n")
        first = text.strip().partition("\n")[0]
        if _HMP_ERROR.match(first) or text.rstrip().endswith("for more information"):
            raise QmpError(
                f"{self.name}: the monitor command {line!r} failed: {text.strip()}",
                error_class="GenericError",
                description=text.strip(),
            )
        return text

    def _gone_error(self, what: str) -> MachineGoneError:
        if self._closed:
            return MachineGoneError(f"{self.name}: {what!r}: the VM was ended by the tests.")
        return MachineGoneError(
            f"{self.name}: {what!r}: the VM is not running. {self.describe_end()}".rstrip()
        )

    # --- events ---

    def _record(self, message: Message) -> bool:
        stamp = message.get("timestamp") or {}
        with self._changed:
            self._sequence += 1
            event = Event(
                self._sequence,
                str(message["event"]),
                message.get("data") or {},  # type: ignore[arg-type]
                stamp.get("seconds", time.time()) + stamp.get("microseconds", 0) / 1e6,  # type: ignore[attr-defined]
            )
            self._events.append(event)
            callbacks = list(self._callbacks)
            self._changed.notify_all()
        for callback in callbacks:
            try:
                callback(event)
            except Exception:
                _logger.exception("a callback for the QMP event %s failed", event.name)
        return False

    def mark(self) -> int:
        """Return the number of the newest event, for `since`."""
        with self._changed:
            return self._sequence

    def events(self, name: str | None = None, *, since: int = 0) -> list[Event]:
        """Return the events so far (the last few thousand), only those of `name` if given."""
        with self._changed:
            return [e for e in self._events if e.sequence > since and name in (None, e.name)]

    def wait_event(
        self, names: str | Iterable[str] | None, *, timeout: float, since: int | None = None
    ) -> Event:
        """Wait for the first event of these names after `since` (a `mark()`; None: from now on).

        `names` None is any event.
        Raises `QmpError` after `timeout` seconds, saying which events came instead, and
        `MachineGoneError` when QEMU ends without it.
        """
        wanted = {names} if isinstance(names, str) else set(names or ())
        text = " or ".join(sorted(wanted)) or "any"
        deadline = time.monotonic() + timeout
        with self._changed:
            start = self._sequence if since is None else since
            while True:
                for event in self._events:
                    if event.sequence > start and (names is None or event.name in wanted):
                        return event
                if self._gone or self._closed:
                    break
                left = deadline - time.monotonic()
                if left <= 0:
                    came = [e.name for e in self._events if e.sequence > start]
                    saw = f"came instead: {', '.join(came[-10:])}" if came else "no event came"
                    raise QmpError(
                        f"{self.name}: no {text} event within {timeout:g} s; {saw}.",
                        error_class="Timeout",
                    )
                self._changed.wait(left)
        raise self._gone_error(f"waiting for {text}")

    def on_event(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` for each event from now on; return what ends that.

        It is called in the I/O thread: it must be quick and must not run commands.
        """
        with self._changed:
            self._callbacks.append(callback)

        def remove() -> None:
            with self._changed, contextlib.suppress(ValueError):
                self._callbacks.remove(callback)

        return remove

    # --- the end ---

    @property
    def connected(self) -> bool:
        """Whether QEMU is there to answer."""
        return not self._gone and not self._closed and self._client.runstate == Runstate.RUNNING

    def close(self) -> None:
        """End the connection (not QEMU). May be called twice."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._close_listener()
        with contextlib.suppress(RuntimeError, TimeoutError):
            self._io.run(self._close(), timeout=5)

    async def _close(self) -> None:
        self._stop.set()
        if self._watcher is not None:
            await asyncio.wait({self._watcher})

    def _close_listener(self) -> None:
        self._listener.close()
        self._path.unlink(missing_ok=True)
