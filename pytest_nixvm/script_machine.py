"""A machine as a script of the NixOS test driver sees it: it starts when it is first used."""

from __future__ import annotations

import difflib
import inspect
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import GuestRebootError, MachineError, MachineGoneError, QemuError
from pytest_nixvm.machine import Machine
from pytest_nixvm.script_conditions import Conditions
from pytest_nixvm.script_log import ScriptLog

__tracebackhide__ = True  # the script's own lines are what its author reads

_WHATEVER_POWER = frozenset({"is_up", "fault", "wait_for_shutdown", "shutdown", "crash", "kill"})
"""What is asked of a machine as it is: it isn't started for that."""

_WHILE_BOOTING = frozenset(
    {
        "console",
        "get_console_log",
        "get_screen_text",
        "get_screen_text_variants",
        "qemu",
        "qmp",
        "screenshot",
        "send_chars",
        "send_console",
        "send_key",
        "send_monitor_command",
        "wait_for_console_text",
        "wait_for_qmp_event",
        "wait_for_text",
    }
)
"""What needs QEMU and no more: a passphrase is typed while the machine boots."""

_WAITS = frozenset(
    {
        "wait_for_closed_port",
        "wait_for_file",
        "wait_for_open_port",
        "wait_for_open_unix_socket",
        "wait_for_unit",
        "wait_until_fails",
        "wait_until_succeeds",
    }
)
"""What a script says behind `execute("reboot")`, while the old system is on its way down."""

_GOING_DOWN = re.compile(
    r"Connection reset by peer|Connection terminated|Transport endpoint is not connected"
    r"|Failed to connect to (system scope )?bus"
)
"""What systemctl says of a systemd that is on its way down."""

GOING_DOWN = 90.0
"""Seconds for the rest of that way, systemd's own limit for a unit's stop."""

TICK = 1.0
"""Seconds between two looks of the NixOS test driver's."""

FIRST_LOOK = 0.15
"""Seconds of a wait that met what it waits for at its first look."""

_QUIET = frozenset({"is_up", "log", "nested"})

_SHOWN = 200
"""Characters of a verb's arguments that are printed."""


class ScriptMachine:
    """Passes everything on to a `Machine`, with what a script relies on besides.

    The machine is made and started by the first verb that needs it, and started again by the next
    one after a `shutdown` or `crash`. `start` does not wait for the boot: screen, keyboard and
    serial console can be used meanwhile, every other verb waits for its end and raises what it
    raised. The script's polling conditions are checked beside each verb.
    """

    name: str

    def __init__(
        self, name: str, make: Callable[[], Machine], log: ScriptLog, conditions: Conditions
    ) -> None:
        self.__dict__.update(
            name=name,
            _make=make,
            _log=log,
            _conditions=conditions,
            _vm=None,
            _lock=threading.RLock(),
            _boot=None,
        )

    def __repr__(self) -> str:
        return f"<machine {self.name} of a test script>"

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(Machine)})

    @property
    def vm(self) -> Machine:
        """The machine itself. Made, which builds it, when it is first asked for."""
        with self._lock:
            if self._vm is None:
                self.__dict__["_vm"] = self._make()
            vm: Machine = self._vm
            return vm

    # --- what is not the machine's own -----------------------------------------------------------

    def start(self, allow_reboot: bool = False) -> None:  # noqa: ARG002 - the driver's signature
        """Power the machine on, and do not wait for its boot. Does nothing when it is up."""
        with self._lock:
            if self._boot is None and not (self._vm is not None and self._vm.is_up()):
                self._log.log(f"{self.name}.start()")
                self.__dict__["_boot"] = _Boot(self)

    def release(self) -> None:
        """Cut the power."""
        self._call("crash", (), {})

    def log(self, msg: str) -> None:
        """Print a message with the machine's name."""
        self._log.log(f"{self.name}: {msg}")

    @contextmanager
    def nested(self, msg: str, attrs: Mapping[str, str] | None = None) -> Iterator[None]:  # noqa: ARG002 - the driver's signature
        """Print a message; what is printed in the block is one level deeper; then how long."""
        with self._log.nested(f"{self.name}: {msg}"):
            yield

    @property
    def out_dir(self) -> Path:
        """Where the machine's screenshots and copied files are."""
        return self.vm.output

    @property
    def booted(self) -> bool:
        """Whether it runs. What a script assigns to it is of no use here, and no error."""
        return self._vm is not None and self.vm.is_up()

    connected = booted

    @property
    def shared_dir(self) -> Path:
        """There is none. Raises `MachineError`, naming what there is."""
        raise MachineError(
            f"{self.name} has no directory shared with the host: use {self.name}.copy_from_host() "
            f"and {self.name}.copy_from_machine()."
        )

    state_dir = shared_dir

    # --- everything else -------------------------------------------------------------------------

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("booted", "connected"):
            setattr(self.vm, name, value)

    def __getattr__(self, name: str) -> Any:
        known = inspect.getattr_static(Machine, name, None)
        if name.startswith("_"):
            raise AttributeError(name)
        if inspect.isfunction(known):

            def verb(*args: Any, **kwargs: Any) -> Any:
                return self._call(name, args, kwargs)

            verb.__name__, verb.__doc__ = name, known.__doc__
            return verb
        if known is None and name not in vars(self.vm):
            near = difflib.get_close_matches(name, dir(Machine), 3)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise AttributeError(
                f"{self.name} has no {name!r}. {hint}docs/verbs.md lists what it has.", name=name
            )
        self._get_ready(name)
        return getattr(self.vm, name)

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in _QUIET:
            self._log.log(_shown(self.name, name, args, kwargs))
        if self._vm is None and self._boot is None and name in _WHATEVER_POWER:
            return False if name == "is_up" else None  # nothing to build it for

        def verb() -> Any:
            self._get_ready(name)
            known = getattr(self.vm, name)
            if name in _WAITS:
                return self._over_a_reboot(lambda: known(*args, **kwargs))
            return known(*args, **kwargs)

        boot = self._boot
        began = time.monotonic()
        try:
            result = self._conditions.beside(verb)
            took = time.monotonic() - began
            if name == "wait_for_file" and took > FIRST_LOOK:
                # A file is there before it is written. Scripts read it at once, and get away with
                # that because the driver looks once a second.
                time.sleep(-took % TICK)
        except MachineError as error:
            # Cut short by the end of a boot that failed: why that failed is what matters.
            if boot is not None and boot.error not in (None, error):
                self._joined()
            raise
        return result

    def _over_a_reboot(self, wait: Callable[[], Any]) -> Any:
        """Call `wait`; once more if it met a system on its way down, when that is up again."""
        mark = self.vm.qmp.mark()
        try:
            return wait()
        except GuestRebootError:
            pass
        except MachineError as error:
            if not _GOING_DOWN.search(str(error)):
                raise
            try:
                self.vm.qmp.wait_event("RESET", timeout=GOING_DOWN, since=mark)
            except QemuError:
                raise error from None
        return wait()

    def _get_ready(self, name: str) -> None:
        if name in _WHATEVER_POWER:
            if name in ("crash", "kill"):
                self.abandon()
            if name != "is_up" and self._boot is not None:
                self._boot.thread.join()
                self.__dict__["_boot"] = None
        elif name in _WHILE_BOOTING:
            if self._boot is None and self.vm.fault is None and not self._powered():
                self.start()
            while self._boot is not None and not self._powered():
                if not self._boot.thread.is_alive():
                    self._joined()
                time.sleep(0.02)
        else:
            if self._boot is None and self.vm.fault is None and not self.vm.is_up():
                self.start()
            self._joined()

    def _powered(self) -> bool:
        try:
            _ = self.vm.qemu
        except MachineGoneError:
            return False
        return True

    def _joined(self) -> None:
        """Wait for the boot under way, if any, and raise what it raised, once."""
        boot = self._boot
        if boot is None:
            return
        boot.thread.join()
        self.__dict__["_boot"] = None
        if boot.error is not None:
            raise boot.error

    def finish(self) -> None:
        """Wait for the end of a boot that nobody waited for. Raises what it raised."""
        self._joined()

    def abandon(self) -> None:
        """Cut a boot short that is under way: nobody waits for it any more."""
        while self._boot is not None and self._boot.thread.is_alive():
            if self._vm is not None and self._powered():
                self._vm.qemu.kill()
            self._boot.thread.join(0.1)


class _Boot:
    """A start in a thread of its own, and what it raised."""

    def __init__(self, owner: ScriptMachine) -> None:
        self.error: BaseException | None = None
        self._owner = owner
        name = f"nixvm boot of {owner.name}"
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._owner.vm.start()
        except BaseException as error:
            self.error = error


def _shown(machine: str, verb: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return a call as it may stand in the script, on one line."""
    given = [repr(arg) for arg in args] + [f"{name}={value!r}" for name, value in kwargs.items()]
    text = " ".join(", ".join(given).splitlines())
    if len(text) > _SHOWN:
        text = text[:_SHOWN] + " …"
    return f"{machine}.{verb}({text})"
