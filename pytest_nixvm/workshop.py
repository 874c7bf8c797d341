"""What a fleet's machines are made of: sockets, scratch disks, keys, the supervisor."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm import keep
from pytest_nixvm.errors import SettingsError
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.memory import Budget, Reservation, needs
from pytest_nixvm.output import Output, make_directory
from pytest_nixvm.progress import Progress
from pytest_nixvm.qemu.accelerator import Accelerator, choose, find_qemu
from pytest_nixvm.qemu.launch import LaunchSpec, private_directory
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.spec import configured_memory
from pytest_nixvm.qemu.supervisor import Supervisor
from pytest_nixvm.qemu.template import Template
from pytest_nixvm.settings import MachineRequest, Settings

if TYPE_CHECKING:
    from pytest_nixvm.guest.keys import KeyPair
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.snapshots import Snapshot

# SSH and pexpect are imported when the first VM starts: a run that only collects is quicker.

LEAST_FREE = 256 * 2**20
"""Bytes that must be free where overlays are written; a boot alone writes some tens of MiB."""

GUESSED_MEMORY = 1024
"""MiB of a guest whose start script does not say."""


class Workshop:
    """Makes machines, and clears away what they leave. For any thread.

    `make_room` ends a VM that can be done without, where memory is short, and says whether there
    was one. `snapshot` is what a machine's `snapshot` does.
    """

    def __init__(self, settings: Settings, progress: Progress, out: Callable[[], Output]) -> None:
        self.settings = settings
        self.make_room: Callable[[], bool] = lambda: False
        self.snapshot: Callable[[Machine, str], Snapshot]
        self.end: Callable[[Machine], None] = self.clear
        self._progress = progress
        self._out = out
        self._number = 0
        self._lock = threading.Lock()
        self._reserved: dict[Machine, Reservation] = {}

    # --- machines ------------------------------------------------------------------------------

    def make(
        self,
        build: VmBuild,
        request: MachineRequest,
        *,
        template: Template | None = None,
        ram: Path | None = None,
        label: str = "",
    ) -> Machine:
        """Return a machine that is off: a clone of `template`, or one that boots.

        `ram` is the file that its memory is to be, for it is to be frozen. Raises `UserError`.
        """
        from pytest_nixvm.machine import Machine

        with self._lock:
            number, self._number = self._number, self._number + 1
        output = self._out().directory(label or f"{build.name}-{number}")
        sockets, scratch = self.sockets / str(number), self.scratch / f"{build.name}-{number}"
        make_directory(scratch)
        sockets.mkdir(mode=0o700)
        return Machine(
            build,
            LaunchSpec(
                name=build.name,
                start_script=build.start_script,
                accelerator=self.accelerator(build),
                sockets=sockets,
                scratch=scratch,
                console_log=output / "console.log",
                qemu_log=output / "qemu.log",
                memory=request.memory,
                cores=request.cores,
                network=request.network,
                network_options=build.network_options,
                ram=ram,
                arguments=keep.arguments(sockets) if self.settings.keep != "never" else (),
            ),
            supervisor=self.supervisor,
            io=self.io,
            keys=lambda: self._keys,
            progress=self._progress,
            boot_timeout=self.settings.boot_timeout,
            output=output,
            template=template,
            snapshot=lambda machine, name: self.snapshot(machine, name),
            end=lambda machine: self.end(machine),
        )

    def reserve(self, machine: Machine, *, wait: bool = True) -> bool:
        """Set memory aside for a machine that is about to be started; False if there is none.

        With `wait` it is waited for, as long as for a boot, and `MachineError` raised in the end.
        """
        template = machine.template
        memory = machine.spec.memory or (
            template.memory
            if template is not None
            else configured_memory(machine.spec.start_script.read_text(errors="replace"))
        )
        wanted = needs(memory or GUESSED_MEMORY, clone=template is not None)
        found = (
            self._budget.reserve(
                wanted,
                machine.name,
                timeout=self.settings.boot_timeout,
                make_room=self.make_room,
                waiting=lambda text: self._progress.step(text).finish(),
            )
            if wait
            else self._budget.try_reserve(wanted, machine.name)
        )
        if found is None:
            return False
        with self._lock:
            self._reserved[machine] = found
        return True

    def is_contended(self) -> bool:
        """Whether any process waits for memory."""
        return self._budget.contended()

    def started(self, machine: Machine) -> None:
        """Note that the QEMU of a machine runs: what it uses counts from now on."""
        reservation = self._reserved.get(machine)
        if reservation is not None:
            reservation.started(machine.qemu.pid)

    def clear(self, machine: Machine) -> None:
        """End a machine, and remove what it has on disk. May be called twice."""
        machine.kill()
        with self._lock:
            reservation = self._reserved.pop(machine, None)
        if reservation is not None:
            reservation.release()
        for directory in (machine.spec.scratch, machine.spec.sockets):
            shutil.rmtree(directory, ignore_errors=True)

    def accelerator(self, build: VmBuild) -> Accelerator:
        """Return how this build's QEMU will run its guest, after a trial where one is needed."""
        return choose(find_qemu(build.start_script), self.settings.accel, self.settings.cache)

    def close(self) -> None:
        """End what machines share. They have ended, or are left running."""
        made = self.__dict__
        if "supervisor" in made:
            self.supervisor.close()
        if "io" in made:
            self.io.close()

    # --- made when the first one starts --------------------------------------------------------

    @cached_property
    def io(self) -> IoThread:
        """The thread of QMP and the agent."""
        return IoThread()

    @cached_property
    def supervisor(self) -> Supervisor:
        """What ends all of it, however this process ends."""
        return Supervisor()

    @cached_property
    def sockets(self) -> Path:
        """A private directory with a short path. Raises `SettingsError`."""
        return private_directory(self.supervisor)

    @cached_property
    def scratch(self) -> Path:
        """A directory on disk for overlays: not in /tmp, which may be memory.

        Raises `SettingsError`.
        """
        base = self.settings.cache / "scratch"
        make_directory(base)
        free = shutil.disk_usage(base).free
        if free < LEAST_FREE:
            raise SettingsError(
                f"The disk under {base} is full: {free // 2**20} MiB are free, and the VMs' disks "
                f"need at least {LEAST_FREE // 2**20}. Free some, or name another place with "
                "--nixvm-cache."
            )
        return self.supervisor.make_directory(base)

    @cached_property
    def _keys(self) -> KeyPair:
        from pytest_nixvm.guest.keys import KeyPair

        return KeyPair.generate(self.sockets)

    @cached_property
    def _budget(self) -> Budget:
        return Budget(self.settings.cache / "memory")
