"""Freezing a machine ready, and waking a clone of one that was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nixvm.channels import Channels
from pytest_nixvm.errors import BootError, MachineError
from pytest_nixvm.guest import waking
from pytest_nixvm.guest.boot import BootReport
from pytest_nixvm.qemu.template import Template, freeze, load, power_on
from pytest_nixvm.verbs.power import Power
from pytest_nixvm.wait import Deadline

if TYPE_CHECKING:
    from pytest_nixvm.snapshots import Snapshot

WAKE_TIMEOUT = 60.0
"""Seconds for a clone to be loaded and to answer; a fraction of one is usual."""


class Cloning(Power):
    """A machine that is a clone, or becomes a template.

    `template` is what it starts from the first time it is powered on, None for a boot.
    """

    template: Template | None
    loaded: bool
    frozen: bool
    woken_in: float
    _rests: bool
    _snapshot: Callable[[Any, str], Snapshot]

    def start(self, allow_reboot: bool = True) -> None:
        """Power on and wait until the machine is ready; does nothing when it is up.

        The first time a clone wakes as its template was frozen; otherwise the machine boots, on
        the disk as it was left. A reboot from inside is always allowed. Raises `QemuError` if QEMU
        does not start, `BootError` if the machine does not get ready within the boot timeout.
        """
        with self._lock:
            if self.template is None or self.loaded:
                super().start(allow_reboot)
            else:
                began = time.monotonic()
                self.load()
                self.wake()
                self.woken_in = time.monotonic() - began

    @property
    def uptime(self) -> float:
        """Seconds that a clone's system was up when it was frozen; 0 for other machines."""
        return 0.0 if self.template is None else float(self.template.facts["uptime"])

    # --- a clone -------------------------------------------------------------------------------

    def load(self) -> None:
        """Start a clone's QEMU and load the state: it is there, paused. See `wake`."""
        template = self.template
        if template is None or self._on is not None:
            return
        deadline = Deadline(WAKE_TIMEOUT)
        with self._lock:
            try:
                qemu = power_on(
                    template,
                    self.spec,
                    supervisor=self._supervisor,
                    io=self._io,
                    timeout=deadline.remaining(),
                )
                self.qemu_version = qemu.monitor.version
                on = self._on = Channels(qemu, self._io, self._keys)
                on.adopt(template.facts["channels"], deadline.remaining(10))
                load(qemu, template, deadline.remaining())
            except BaseException:
                self.kill()
                raise
            self.loaded = self._rests = True

    def is_loaded(self) -> bool:
        """Whether there is a QEMU with the state, to be woken or awake."""
        return self._on is not None and self._on.qemu.alive

    def warm(self, users: Iterable[str | None] = ()) -> None:
        """Let a loaded clone run until its channels answer; it runs on, until `rest` or `wake`.

        What it runs then need not be translated or paged in later. `users` get an SSH connection.
        """
        on = self._on
        if on is None or self.template is None:
            return
        self._stir(on)
        for user in users:
            _ = on.ssh_as(user, self.template.memo).client

    def rest(self) -> None:
        """Pause a clone that was warmed and that nobody has taken yet."""
        on = self._on
        if on is not None:
            on.qemu.pause()
            self._rests = True

    def wake(self) -> None:
        """Hand a loaded clone over: it runs, with the host's time and random numbers of its own.

        Raises `BootError` if it does not answer.
        """
        on = self._on
        if on is None:
            return
        began = time.monotonic()
        try:
            self._stir(on)
        except MachineError as error:
            tail = on.console.tail(25)
            self.kill()
            raise BootError(
                f"The clone of {self.name} does not wake: {error}",
                stage="loaded",
                console_tail=tail,
                console_log=self.spec.console_log,
            ) from error
        log = self.spec.console_log
        self.settled[log] = log.stat().st_size if log.exists() else 0
        on.watch()
        self.woken_in = time.monotonic() - began

    def _stir(self, on: Channels) -> None:
        """Let it run if it rests, with the time as it is now."""
        if self.template is None or not self._rests:
            return
        on.qemu.resume()
        self._rests = False
        on.clock.set(WAKE_TIMEOUT)
        if self.template.facts["entropy"] == waking.IOCTL:
            waking.reseed(on.agent)

    # --- a template ----------------------------------------------------------------------------

    def freeze(self, directory: Path) -> Template:
        """Freeze the machine as it is into `directory`; it ends by that.

        Raises `CannotFreezeError`, and the machine runs on.
        """
        with self._lock, self.transcript.note("power", "freeze"):
            on = self._opened()
            on.health.close()
            try:
                facts = self._facts(on)
                template = freeze(on.qemu, directory, facts=facts, origin=self.template)
            except BaseException:
                if on.qemu.alive:
                    on.watch()
                    self.spec = replace(self.spec, ram=None)  # that file is of no use
                raise
            self._drop()
            self.frozen = True
            return template

    def _facts(self, on: Channels) -> dict[str, Any]:
        boot = self.boot
        facts = {
            "boot": None if boot is None else asdict(boot),
            "entropy": waking.entropy_source(on.agent),
            "uptime": float(on.agent.read_file("/proc/uptime").split()[0]),
            "channels": on.remembered(),
        }
        # A clone that is reset must find on its disk what the template has written.
        on.agent.exec(["sync"], timeout=WAKE_TIMEOUT)
        return facts

    @property
    def boot(self) -> BootReport | None:
        """How the machine's last boot went, its template's if it has not booted itself."""
        if self.boots:
            return self.boots[-1]
        told = self.template.facts["boot"] if self.template is not None else None
        return (
            None
            if told is None
            else BootReport(**told | {"failed_units": tuple(told["failed_units"])})
        )

    def snapshot(self, name: str) -> Snapshot:
        """Freeze the machine as it is now, so that clones of it can be had: `Snapshot.start`.

            prepared = vm.snapshot("with-data")
            with prepared.start() as clone: ...

        The machine itself goes on as the first clone: what was open to it (SSH, the serial
        console's handle, forwarded ports) is opened anew when it is next used. A snapshot lasts
        until the session ends. Raises `MachineError` with what keeps the machine from being frozen.
        """
        if self._on is None:
            raise MachineError(f"{self.name} is not running: there is nothing to freeze.")
        return self._snapshot(self, name)
