"""A VM that a person uses: started with what was wished for, entered in the list, ended cleanly.

What tests have (clones, isolation, faults that end every call) is not wanted here: the guest may
be rebooted, broken and mended by whoever uses it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pytest_nixvm import running, wishes
from pytest_nixvm.catalogue import Catalogue
from pytest_nixvm.control import Control
from pytest_nixvm.disks import KeptDisk
from pytest_nixvm.errors import (
    GuestPanicError,
    MachineError,
    MachineGoneError,
    NixvmError,
    QemuError,
)
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.guest.console import Console
from pytest_nixvm.qemu.accelerator import find_qemu
from pytest_nixvm.settings import MachineRequest, Settings
from pytest_nixvm.workshop import LEAST_FREE, Workshop

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.qemu.monitor import Event
    from pytest_nixvm.qemu.running import Qemu

_REMIND = 60.0
"""Seconds of a power-down after which is said that it takes long."""

_RETRY = 5.0
"""Seconds after which is looked whether a full disk has room again."""

_LOOK = 10.0
"""Seconds after which is looked whether this computer has slept."""

_PATIENCE = 5.0
"""Seconds that the agent of a guest has to show that it has not panicked, twice."""

_CONSOLE = 10.0
"""Seconds that somebody waits for the console of a VM that is being started."""

_PANIC = "Kernel panic - not syncing"

_MOUNT = """
mkdir -p "$2" || exit
if mountpoint -q "$2"; then exit 0; fi
exec mount -t 9p -o "trans=virtio,version=9p2000.L,msize=262144,$3" "$1" "$2"
"""


@dataclass(frozen=True)
class Wishes:
    """What is wanted of the VM; None is as the machine has it."""

    window: bool | None = None
    fresh: bool = False
    memory: int | None = None  # MiB
    cores: int | None = None
    forwards: tuple[wishes.Forward, ...] = ()
    shares: tuple[wishes.Share, ...] = ()


class Use:
    """One VM from its start to its end, in the process that a person ends with Control-C.

        with KeptDisk(…) as disk, Use(build, disk, wanted, catalogue=catalogue, …) as use:
            use.start()
            use.wait()              # until the guest powers off; or `use.power_down()`

    `flake` is the URL of its flake; `say` tells a person something. The block's end ends the VM at
    once if it still runs, and so does the death of this process however it comes.
    """

    def __init__(
        self,
        build: VmBuild,
        disk: KeptDisk,
        wanted: Wishes,
        *,
        flake: str,
        settings: Settings,
        catalogue: Catalogue,
        say: Callable[[str], None],
    ) -> None:
        self.name = build.name
        self.window = False
        self._settings = settings
        self._build = build
        self._flake = flake
        self._wanted = wanted
        self._say = say
        self._workshop = Workshop(settings, catalogue.progress, lambda: catalogue.out)
        self._script = build.start_script.read_text(errors="replace")
        # `virtualisation.diskImage = null`: there is none, all is in memory.
        self.disk = None if "${NIX_DISK_IMAGE:-}" in self._script else disk
        self._stack = contextlib.ExitStack()
        self._machine: Machine | None = None
        self._qemu: Qemu | None = None
        self._ready = threading.Event()  # booted, and nothing more is to be done in it
        self._stirred = threading.Event()  # something has happened that `wait` looks at
        self._rebooted = False
        self._boots = 1
        self._suspect = False  # the console shows a panic, whosever it is
        self._panicked = False
        self._full = False  # the disk under its own: QEMU has paused it
        self._told_full = False
        self._slept = _slept()
        self._read = 0  # how far the console was looked through
        self._ended = False

    def __enter__(self) -> Use:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True
        self._ready.set()
        self._stack.close()

    @property
    def console_log(self) -> Path | None:
        """The file with all that its console has shown, None before QEMU runs."""
        log = None if self._machine is None else self._machine.spec.console_log
        return log if log is not None and log.exists() else None

    def check(self) -> None:
        """Look whether there can be a window if one was wished for. Raises `SettingsError`.

        `start` does so as well; this is for whoever has something to do before that.
        """
        _ = self._screen

    @cached_property
    def _screen(self) -> wishes.Screen:
        qemu = find_qemu(self._build.start_script)
        return wishes.screen(qemu, self._wanted.window, self._script)

    # --- from power-on to power-off --------------------------------------------------------------

    def start(self) -> None:
        """Start it and return when it is ready to be used.

        Raises `SettingsError` where what was wished for can't be had, else as `Machine.start`.
        """
        wanted, screen = self._wanted, self._screen
        self.window = screen.window
        if screen.note:
            self._say(screen.note)
        if self.disk is not None and wanted.fresh and self.disk.remove():
            self._say(f"The disk of earlier runs is removed: {self.disk.path}")
        machine = self._machine = self._make(screen)
        self._workshop.reserve(machine)
        self._enter_list(machine)
        if self.disk is not None:
            self.disk.begin()
        try:
            machine.start()
        finally:
            if self.disk is not None and machine.spec.console_log.exists():
                self.disk.is_made()  # QEMU has run: its start script had done all it does
        self._workshop.started(machine)
        qemu = self._qemu = machine.qemu
        qemu.monitor.on_event(self._read_event)
        self._read = machine.console.mark()
        machine.console.on_output(self._read_console)
        qemu.process.on_exit(lambda _: self._stirred.set())
        machine.leave_to_person()
        for forward in wanted.forwards:
            qemu.network.forward(forward.guest, forward.host)
        self._mount()
        self._ready.set()

    def wait(self) -> str:
        """Wait until it has ended by itself and return how.

        Raises `GuestPanicError` if its kernel panics, `QemuError` if QEMU ends with an error.
        """
        assert self._qemu is not None  # noqa: S101 - for the type checker
        while True:
            self._stirred.wait(_RETRY if self._full else _LOOK)
            self._stirred.clear()
            if self._qemu.process.returncode is not None:
                return self._how_it_ended(self._qemu)
            if _slept() - self._slept > 1:
                self._slept = _slept()
                self._set_clock()
            if self._full:
                self._go_on(self._qemu)
            if self._suspect and not self._panicked and not self._rebooted:
                # Anybody may print such a line; who has panicked runs no agent.
                self._suspect = False
                self._panicked = not self._answers()
            if self._rebooted:
                self._rebooted = self._suspect = self._panicked = False
                self._again()
            elif self._panicked:
                raise GuestPanicError(f"{self.name}'s kernel panicked.\n{self._console_tail()}")

    def power_down(self) -> None:
        """Have the guest power off and wait for its end, however long it takes."""
        machine, qemu = self._machine, self._qemu
        if machine is None or qemu is None or not qemu.alive:
            return
        # They have no use once the VM is off: the private half is gone with it.
        with contextlib.suppress(NixvmError):
            machine.forget_keys()
        try:
            machine.agent.shutdown("powerdown")
        except NixvmError:
            with contextlib.suppress(NixvmError):
                qemu.powerdown()  # the power button: whoever watches it in there does the rest
        try:
            qemu.process.wait(_REMIND)
        except TimeoutError:
            self._say(f"{self.name} still shuts down. Ctrl-C cuts its power.")
            while qemu.process.returncode is None:
                with contextlib.suppress(TimeoutError):
                    qemu.process.wait(_REMIND)

    # --- what others ask for, from any thread (control.Host) -------------------------------------

    def log_in(self, user: str | None) -> Sequence[str]:
        """Let somebody in, when it has booted, and return the ssh command for it."""
        while True:
            machine, boots = self._booted(), self._boots
            try:
                return shlex.split(machine.ssh_as(user).command_line)
            except NixvmError:
                if self._boots == boots or self._ended:
                    raise  # else it was asked while it shut down for a reboot

    def serial_console(self) -> Console:
        """Return the serial console, during the boot as well."""
        until = time.monotonic() + _CONSOLE
        while self._machine is not None and not self._ended:
            with contextlib.suppress(MachineGoneError):
                return self._machine.console
            # It is in the list a moment before QEMU runs.
            if time.monotonic() > until:
                raise MachineError(f"{self.name} is being started: try again in a moment.")
            time.sleep(0.05)
        raise MachineError(f"{self.name} is not running.")

    def _booted(self) -> Machine:
        self._ready.wait()
        if self._ended or self._machine is None:
            raise MachineError(f"{self.name} has ended.")
        return self._machine

    # --- how it is made --------------------------------------------------------------------------

    def _make(self, screen: wishes.Screen) -> Machine:
        wanted = self._wanted
        self._stack.callback(self._workshop.close)
        request = MachineRequest(
            isolation="session",  # the VM that `nix run` starts, shares and all
            memory=wanted.memory,
            cores=wanted.cores,
            network="nat",  # unless the configuration says otherwise
        )
        machine = self._workshop.make(self._build, request)
        self._stack.callback(self._workshop.clear, machine)
        machine.spec = replace(
            machine.spec,
            arguments=(
                *machine.spec.arguments,
                *screen.arguments,
                *wishes.share_arguments(wanted.shares),
            ),
            environment=() if self.disk is None else tuple(self.disk.environment().items()),
        )
        return machine

    def _enter_list(self, machine: Machine) -> None:
        """Let `nixvm ssh`, `nixvm console` and `nixvm list` find it."""
        entry = running.Running(
            name=self.name,
            flake=self._flake,
            pid=os.getpid(),
            began=running.began(os.getpid()),
            control=machine.spec.sockets / "control",
            disk=None if self.disk is None else self.disk.path,
            console_log=machine.spec.console_log,
            forwards=tuple((each.host, each.guest) for each in self._wanted.forwards),
        )
        try:
            control = Control(entry.control, self)
        except OSError as error:
            raise QemuError(f"{entry.control} can't be made: {error.strerror}.") from None
        self._stack.callback(control.close)
        # Should we be killed, the supervisor removes it with all the rest.
        self._workshop.supervisor.add_directory(running.path_of(entry.name, entry.pid))
        path = running.write(entry)
        self._stack.callback(path.unlink, missing_ok=True)

    # --- in the guest ----------------------------------------------------------------------------

    def _mount(self) -> None:
        for number, share in enumerate(self._wanted.shares):
            mode = "ro" if share.readonly else "rw"
            said = self._in_guest(_MOUNT, wishes.tag(number), share.target, mode)
            if said:
                raise MachineError(
                    f"{share.source} can't be mounted at {share.target} in {self.name}: {said}"
                )

    def _in_guest(self, script: str, *arguments: str) -> str:
        """Run a script as root; return what it says of its failure, "" for none."""
        assert self._machine is not None  # noqa: S101 - for the type checker
        result = self._machine.agent.exec(
            ["/bin/sh", "-c", script, "nixvm-run", *arguments], timeout=60
        )
        return "" if result.ok else result.stderr.strip() or f"exit status {result.returncode}"

    def _again(self) -> None:
        """Find into the guest again after a reboot, and do anew what does not outlast one."""
        assert self._machine is not None  # noqa: S101 - for the type checker
        self._ready.clear()
        try:
            self._machine.reconnect(self._settings.boot_timeout)
            self._mount()
        except NixvmError as error:
            if not self._stirred.is_set():  # else it has ended, or panicked: that is told
                self._say(f"{self.name} has rebooted, and {error}")
        finally:
            self._ready.set()

    def _set_clock(self) -> None:
        """Set the guest's clock, which has stood still while this computer slept."""
        assert self._machine is not None  # noqa: S101 - for the type checker
        try:
            self._machine.agent.set_time()
        except NixvmError as error:
            self._say(f"This computer has slept, and {self.name}'s clock may be slow: {error}")

    def _read_event(self, event: Event) -> None:
        if event.name == "GUEST_PANICKED":
            self._panicked = True
        elif event.name == "RESET":
            self._rebooted = True
            self._boots += 1
            self._ready.clear()  # until `_again` has been there
        elif event.name == "BLOCK_IO_ERROR" and event.data.get("nospace"):
            self._full = True
        else:
            return
        self._stirred.set()

    def _read_console(self) -> None:
        assert self._machine is not None  # noqa: S101 - for the type checker
        try:
            console = self._machine.console
        except MachineError:
            return  # its last words, and it has been ended already
        # Once more from a little before what was read: a line may come in two parts.
        text = console.text(max(0, self._read - len(_PANIC)))
        self._read = console.mark()
        if _PANIC in text:
            self._suspect = True
            self._stirred.set()

    def _answers(self) -> bool:
        assert self._machine is not None  # noqa: S101 - for the type checker
        for _ in range(2):
            with contextlib.suppress(NixvmError):
                self._machine.agent.ping(timeout=_PATIENCE)
                return True
        return False

    def _go_on(self, qemu: Qemu) -> None:
        """Let a VM that was paused for want of room go on when there is some."""
        place = self.disk.path.parent if self.disk is not None else qemu.spec.scratch
        if shutil.disk_usage(place).free >= LEAST_FREE:
            self._full = self._told_full = False
            with contextlib.suppress(NixvmError):
                qemu.resume()
        elif not self._told_full:
            self._told_full = True
            self._say(f"The disk under {place} is full. {self.name} pauses until there is room.")

    def _how_it_ended(self, qemu: Qemu) -> str:
        cause = qemu.cause_of_death()
        if qemu.process.returncode != 0:
            raise QemuError(f"{self.name} has ended: {cause}.")
        return cause.partition(";")[0]

    def _console_tail(self) -> str:
        assert self._machine is not None  # noqa: S101 - for the type checker
        lines = re.sub(r"(?m)^", "    ", self._machine.console.tail(15))
        log = self._machine.spec.console_log
        return f"The console's last lines:\n{lines}\nThe whole console: {log}"


def _slept() -> float:
    """Return how many seconds this computer has slept since its start: clock_gettime(2)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
