"""Notices that a VM will not get any further, by none of our own polling.

Three sources: QEMU's end, QMP events (a panic that the guest reports through pvpanic) and the
serial console (what Linux, the initrd and systemd print when they give up).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from pytest_nixvm.errors import EmergencyModeError, GuestPanicError, MachineError, MachineGoneError
from pytest_nixvm.guest.console import Console
from pytest_nixvm.qemu.monitor import Event
from pytest_nixvm.qemu.running import Qemu

# What is printed by whoever gives up, with what it means. Sources: Linux' kernel/panic.c and
# init/do_mounts.c, NixOS' stage-1-init.sh, systemd's sulogin-shell.c, SeaBIOS' boot.c, GRUB.
FATAL: tuple[tuple[str, str, type[MachineError]], ...] = (
    (
        r"Kernel panic - not syncing: (?P<what>[^\r\n]*)",
        "the kernel panicked",
        GuestPanicError,
    ),
    (
        r"An error occurred in stage 1 of the boot process",
        "the initrd could not go on",
        EmergencyModeError,
    ),
    (
        r"VFS: Unable to mount root fs",
        "the kernel could not mount the root file system",
        GuestPanicError,
    ),
    (
        r"You are in (?P<what>emergency|rescue) mode|Cannot open access to console, the root "
        r"account is locked|Give root password for maintenance",
        "systemd fell into emergency mode",
        EmergencyModeError,
    ),
    (
        r"No bootable device|Boot failed: not a bootable disk",
        "the firmware found nothing to boot",
        MachineError,
    ),
    (r"(?m)^grub rescue>", "GRUB could not go on", MachineError),
)
_FATAL = tuple((re.compile(pattern, re.MULTILINE), text, kind) for pattern, text, kind in FATAL)


@dataclass(frozen=True)
class Trouble:
    """Why a VM does not get any further, in words, and the error that says so."""

    reason: str
    kind: type[MachineError]


@dataclass
class Watch:
    """Notices trouble until `close`; the first one stays.

    `wake` is called, from any thread, when `trouble` is set.
    """

    qemu: Qemu
    console: Console
    since: int = 0
    wake: Callable[[], None] = lambda: None
    trouble: Trouble | None = None
    _read: int = 0
    _happened: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def open(self) -> Watch:
        """Start to watch, beginning with what the console has shown since `since`."""
        self._undo.append(self.console.on_output(self._read_console))
        self._undo.append(self.qemu.monitor.on_event(self._read_event))
        self.qemu.process.on_exit(lambda _: self._gone())
        self._read_console()
        return self

    def close(self) -> None:
        """Stop watching."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.wake = lambda: None

    def report(self, reason: str, kind: type[MachineError]) -> None:
        """Take note of trouble."""
        with self._lock:
            if self.trouble is None:
                self.trouble = Trouble(reason, kind)
        self._happened.set()
        self.wake()

    def dismiss(self) -> None:
        """Forget the trouble: it was none. What the console has shown is not read again."""
        with self._lock:
            self.trouble = None
            self.since = self.console.mark()
        self._happened.clear()

    def pause(self, seconds: float) -> None:
        """Wait for trouble, at most `seconds`."""
        self._happened.wait(seconds)

    def _gone(self) -> None:
        self.report(self.qemu.cause_of_death(), MachineGoneError)

    def _read_console(self) -> None:
        # Once more from a little before what was read: a line may come in two parts.
        text = self.console.text(max(self.since, self._read - 512))
        self._read = self.console.mark()
        for pattern, meaning, kind in _FATAL:
            found = pattern.search(text)
            if found:
                what = found.groupdict().get("what")
                self.report(f"{meaning}: {what.strip()}" if what else meaning, kind)
                return

    def _read_event(self, event: Event) -> None:
        if event.name == "GUEST_PANICKED":
            self.report("the kernel panicked", GuestPanicError)
        elif event.name == "BLOCK_IO_ERROR" and event.data.get("nospace"):
            self.report("the disk under the VM's overlay is full", MachineError)
