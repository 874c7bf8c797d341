"""The watch over a VM that has booted: what no call would survive ends all of them at once.

A kernel panic, emergency mode, memory that ran out, a guest that has stopped answering and QEMU's
end are told to every channel, so that nobody waits out a timeout for an answer that can't come.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from pytest_nixvm.errors import (
    ChannelError,
    EmergencyModeError,
    GuestFaultError,
    GuestHungError,
    GuestPanicError,
    GuestRebootError,
    MachineError,
    MachineGoneError,
    OutOfMemoryError,
)
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.console import Console
from pytest_nixvm.guest.watch import Trouble, Watch
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.monitor import Event
from pytest_nixvm.qemu.running import Qemu

HEARTBEAT = 5.0
"""Seconds between two questions to the agent while a call is under way."""

HUNG_AFTER = 30.0
"""Seconds without an answer after which the guest is taken for hung."""

GRACE = 0.3
"""Seconds given to the console after the first sign: the details come behind it."""

LAG = 0.2
"""Seconds between the end of a socket of QEMU's and the news of its own end."""

TAIL = 20
"""Lines of the console in an error."""

# Linux' mm/oom_kill.c, __oom_kill_process: at level "err", which NixOS shows on the console.
_OOM = re.compile(
    r"(?P<group>Memory cgroup out of memory|Out of memory): "
    r"Killed process (?P<pid>\d+) \((?P<name>[^)]*)\)"
)
_PANIC = re.compile(r"Kernel panic - not syncing: ([^\r\n]*)")


@dataclass(frozen=True)
class OomKill:
    """A process that the guest's kernel killed."""

    name: str
    pid: int


class Health:
    """Watches one VM from its boot to its end.

    `tell` is called once, from any thread, with the error of the first fault. `fault` is that
    error, None while all is well.
    """

    def __init__(
        self,
        io: IoThread,
        qemu: Qemu,
        console: Console,
        agent: Agent,
        tell: Callable[[MachineError], None],
    ) -> None:
        self.fault: MachineError | None = None
        self.rebooted = False  # by something other than `Machine.reboot`
        self.rebooted_at = 0  # the console's offset at that time
        self.paused = False
        # A second opinion on whether the guest lives, asked before it is called hung.
        self.second_opinion: Callable[[], bool] = lambda: False
        self._io = io
        self._qemu = qemu
        self._console = console
        self._agent = agent
        self._tell = tell
        self._watch: Watch | None = None
        self._lock = threading.Lock()
        self._calls = 0
        self._read = 0
        self._undo: list[Callable[[], None]] = []
        self._heart: Future[None] | None = None
        self._verifying: asyncio.Future[None] | None = None
        self._agent_open = True
        self._stirred = threading.Event()

    def open(self) -> None:
        """Begin to watch; what the console has shown until now is the boot's."""
        self._read = self._console.mark()
        self.rebooted = False
        self._watch = Watch(self._qemu, self._console, self._read)
        self._watch.wake = self._trouble
        self._undo.append(self._console.on_output(self._read_console))
        self._undo.append(self._qemu.monitor.on_event(self._read_event))
        self._heart = asyncio.run_coroutine_threadsafe(self._beat(), self._io.loop)
        self._watch.open()

    def close(self) -> None:
        """Watch no more: the VM is ended, or booted anew, on purpose. May be called twice."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        for undo in self._undo:
            undo()
        self._undo.clear()
        if self._heart is not None:
            self._heart.cancel()
            self._heart = None

    def call(self) -> Call:
        """Watch over a call: only while there is one is the guest asked whether it lives.

        A context manager. It raises the fault there was before, and that of the call's time instead
        of what it led to.
        """
        return Call(self)

    def wait_for_end(self, timeout: float) -> None:
        """Wait until QEMU has ended. Raises a fault in the guest, `TimeoutError`."""
        self._qemu.process.on_exit(lambda _: self._stirred.set())
        self._stirred.wait(timeout)
        if self.fault is None or not self._qemu.alive:
            self._qemu.process.wait(0 if self._qemu.alive else 5)
        else:
            raise self.fault.again()

    def killed_for_memory(self, mark: int) -> OomKill | None:
        """Return what the kernel killed for want of memory since the console's offset `mark`.

        The kernel's line may come a moment after the end of what it killed: that is waited for.
        """
        try:
            found = self._console.wait_for(_OOM, GRACE, mark)
        except MachineError:
            return None
        return OomKill(found["name"], int(found["pid"]))

    def begin(self) -> None:
        """Note that a call begins. Raises the fault, if there is one."""
        if self.fault is not None:
            raise self.fault.again()
        with self._lock:
            self._calls += 1

    def end(self, error: BaseException | None) -> MachineError | None:
        """Note that a call has ended; return what is to be raised instead of its error, if any."""
        with self._lock:
            self._calls -= 1
        if isinstance(error, ChannelError | MachineGoneError):
            # QEMU's sockets close a moment before its end is known.
            with suppress(TimeoutError):
                self._qemu.process.wait(LAG)
        if not isinstance(error, MachineError):
            return None
        if self.fault is not None:
            return self.fault.again()
        if isinstance(error, ChannelError | MachineGoneError) and not self._qemu.alive:
            return self._gone()
        return None

    # --- what is noticed ------------------------------------------------------------------------

    def _trouble(self) -> None:
        with suppress(RuntimeError):  # the loop has ended: so has the session
            self._io.call(lambda: self._io.loop.call_later(GRACE, self._look))

    def _look(self) -> None:
        watch = self._watch
        if watch is None or watch.trouble is None or self.fault is not None:
            return
        trouble = watch.trouble
        panicked = bool(self._qemu.monitor.events("GUEST_PANICKED"))
        if trouble.kind in (GuestPanicError, EmergencyModeError) and not panicked:
            # Anybody may print such a line; who has really given up runs no agent.
            self._verifying = asyncio.ensure_future(self._verify(trouble))
            return
        if trouble.kind is GuestPanicError and (said := _PANIC.findall(self._recent())):
            trouble = Trouble(f"the kernel panicked: {said[-1].strip()}", GuestPanicError)
        self._report(trouble)

    async def _verify(self, trouble: Trouble) -> None:
        for pause in (0.0, 2.0):
            await asyncio.sleep(pause)
            try:
                await self._agent.alive(3.0)
            except MachineError:
                self._report(trouble)
                return
        if self._watch is not None:
            self._watch.dismiss()

    def _read_console(self) -> None:
        text = self._console.text(max(0, self._read - 256))
        fresh = self._read - max(0, self._read - 256)
        self._read = self._console.mark()
        for found in _OOM.finditer(text):
            if found.end() <= fresh:
                continue  # seen the last time
            if found["group"] == "Out of memory":  # not that of a group with a limit of its own
                killed = f"{found['name']} (pid {found['pid']})"
                what = f"it ran out of memory, and its kernel killed {killed}"
                self._report(Trouble(what, OutOfMemoryError))

    def _read_event(self, event: Event) -> None:
        if event.name == "RESET":
            if self.rebooted:
                return
            self.rebooted, self.rebooted_at = True, self._console.mark()
            self._tell(
                GuestRebootError(
                    f"{self._qemu.spec.name} was reset while this ran: the guest rebooted."
                )
            )
        elif event.name in ("STOP", "RESUME"):
            self.paused = event.name == "STOP"
        elif event.name == "VSERPORT_CHANGE" and event.data.get("id") == "nixvm-agent-port":
            self._agent_open = bool(event.data.get("open"))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            if not self._calls or self.paused or not self._agent_open or self.fault:
                continue
            shown = self._console.mark()
            try:
                await self._agent.alive(HUNG_AFTER)
            except MachineGoneError:
                return
            except MachineError:
                if self.paused or not self._calls or self._console.mark() != shown:
                    continue
                if await asyncio.to_thread(self.second_opinion):
                    continue
                what = f"it has not answered for {HUNG_AFTER:g} s: the guest hangs"
                self._report(Trouble(what, GuestHungError))

    # --- what is said ---------------------------------------------------------------------------

    def _report(self, trouble: Trouble) -> None:
        with self._lock:
            if self.fault is not None or self._watch is None:
                return
            kind = trouble.kind
            if not issubclass(kind, GuestFaultError | MachineGoneError):
                kind = GuestFaultError
            name = self._qemu.spec.name
            said = self._console.tail(TAIL)
            text = f"{name}: {trouble.reason}."
            if said.strip() and kind is not MachineGoneError:
                lines = "\n".join("    " + line for line in said.splitlines())
                text += f"\nThe console's last lines:\n{lines}"
                text += f"\nThe whole console: {self._console.log}"
            self.fault = kind(text)
        self._stirred.set()
        self._tell(self.fault)

    def _gone(self) -> MachineGoneError:
        name, cause = self._qemu.spec.name, self._qemu.cause_of_death()
        return MachineGoneError(f"{name} ended while this ran: {cause}.")

    def _recent(self) -> str:
        return self._console.text(max(0, self._console.mark() - 16384))


class Call:
    """A call that is watched over; no generator, so that tracebacks stay short."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def __enter__(self) -> None:
        self._health.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        instead = self._health.end(error)
        if instead is not None:
            raise instead from None
