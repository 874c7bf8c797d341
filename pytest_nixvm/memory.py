"""What fits into this computer's memory, over all processes of ours: VMs wait, rather than swap.

    budget = Budget(cache / "memory")
    reservation = budget.reserve(needs(1024, clone=True), "dev-vm", timeout=300)
    qemu = launch(spec)
    reservation.started(qemu.pid)
    …
    reservation.release()

A reservation is what a VM is expected to take. As soon as its QEMU runs, what that really uses is
missing in `available()`, and only the rest of the reservation is still to come.

All processes of one user look into one ledger (memory_ledger.py).

Sources: proc(5), the kernel's admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from pytest_nixvm.errors import MachineError
from pytest_nixvm.memory_ledger import Entry, Ledger, read_fields, read_lines, start_time, used_by
from pytest_nixvm.wait import Deadline

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_MIB = 1024 * 1024

# Those who wait look whenever the ledger has changed, and now and then without that, for other
# programs give memory back as well, and a death changes no file.
_INTERVAL = 0.05
_LOOK = 0.25
# Memory that was given up shows a moment later: the kernel counts for each CPU and adds up later.
_SETTLE = 0.5
# The lock is held for milliseconds.
_LOCK_TIMEOUT = 30.0
_LISTED = 12

# --- this computer ----------------------------------------------------------------------------


def available(*, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Return the MiB that can be taken without swapping: the computer's, or our cgroups' if less.

    `proc` and `cgroups` are where the kernel shows both.
    """
    fields = read_fields(proc / "meminfo")
    free = fields.get("MemAvailable", fields.get("MemFree", 0)) * 1024
    left = min([free, *(limit - used for limit, used in _limits(proc, cgroups))])
    return max(0, left) // _MIB


def total(*, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Return the MiB that this computer has, or the least of our cgroups' limits."""
    whole = read_fields(proc / "meminfo").get("MemTotal", 0) * 1024
    return min([whole, *(limit for limit, _ in _limits(proc, cgroups))]) // _MIB


def needs(memory: int, *, clone: bool) -> int:
    """Return the MiB that a VM with `memory` MiB of guest memory takes at most, in practice.

    A booted VM takes what its guest has touched, and QEMU's own 100 MiB at most. Few tests touch
    more than the system itself and a quarter of the memory. A clone has the pages of its template,
    all clones together once, until it writes to them: it was measured to take 50 MiB idle, and 115
    after its guest had written 30 MB. No VM is held to this; one that takes more is seen to.
    """
    if clone:
        return 64 + min(memory, 128 + memory // 8)
    return 100 + min(memory, 512 + memory // 4)


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit of each cgroup that we are in and what is used of it, in bytes."""
    for line in read_lines(proc / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            for mount in (cgroups, cgroups / "unified"):
                for each in _upwards(mount, path):
                    # Beyond `high` the kernel slows us down and swaps, though it kills nobody.
                    for name in ("memory.max", "memory.high"):
                        yield from _limit(each, name, "memory.current", "")
        elif "memory" in controllers.split(","):
            for each in _upwards(cgroups / "memory", path):
                limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
                yield from _limit(each, limit, used, "total_")


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """Yield a cgroup's directory and its parents'; in a container they may not be visible."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        parts = []
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _limit(group: Path, limit: str, used: str, prefix: str) -> Iterator[tuple[int, int]]:
    try:
        most = int((group / limit).read_text())
        now = int((group / used).read_text())
    except (OSError, ValueError):  # no such cgroup; "max" is no number and no limit
        return
    fields = read_fields(group / "memory.stat")
    cache = fields.get(f"{prefix}inactive_file", 0) + fields.get(f"{prefix}active_file", 0)
    yield most, now - cache


@dataclass(frozen=True)
class _Vm:
    """What a reservation comes to, in MiB: taken already, still to come."""

    entry: Entry
    used: int
    to_come: int
    kept: bool

    @property
    def holds(self) -> int:
        return self.used + self.to_come

    def line(self) -> str:
        if self.kept:
            who = f"left running; to end it: kill {self.entry.qemu}"
        else:
            who = f"of process {self.entry.owner}"
        return f"    {self.entry.what}: {self.holds} MiB, {who}"


@dataclass(frozen=True)
class _View:
    """All that counts, at one moment. `free` is what a new VM may take."""

    vms: list[_Vm]
    available: int
    floor: int

    @property
    def to_come(self) -> int:
        return sum(vm.to_come for vm in self.vms)

    @property
    def held(self) -> int:
        return sum(vm.holds for vm in self.vms)

    @property
    def free(self) -> int:
        return self.available - self.to_come - self.floor

    @property
    def free_alone(self) -> int:
        """What is free at most when every VM of ours has ended."""
        return self.available + self.held - self.floor

    def __str__(self) -> str:
        match len(self.vms):
            case 0:
                return "no VM of pytest-nixvm is running"
            case 1:
                return f"1 VM of pytest-nixvm holds {self.held}"
            case count:
                return f"{count} VMs of pytest-nixvm hold {self.held}"


# --- what callers use -------------------------------------------------------------------------


class Reservation:
    """Memory that is a VM's until `release`. Its methods may be called from any thread."""

    def __init__(self, ledger: Ledger, path: Path, entry: Entry) -> None:
        self.mebibytes = entry.mebibytes
        self._ledger = ledger
        self._path = path
        self._entry = entry
        self._lock = threading.Lock()
        self._released = False

    def started(self, pid: int) -> None:
        """From now on what the process `pid` uses counts, and the rest is still to come.

        The reservation then lasts as long as that process does, should it outlive this one.
        """
        with self._lock:
            if not self._released:
                self._entry.qemu = pid
                self._entry.qemu_started = start_time(pid)
                self._ledger.write(self._path, self._entry)

    def release(self) -> None:
        """Give it back; to be called when QEMU has ended. Does nothing the second time."""
        with self._lock:
            self._released = True
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def _nothing() -> bool:
    return False


def _silent(_text: str) -> None:
    pass


class Budget:
    """The memory of this computer. May be used from several threads at once.

    `ledger` is the directory that all processes of the user share, `floor` the MiB that are always
    left to other programs: 5 % of all memory, from 256 to 2048, if it is not given. Raises
    `SettingsError` if the directory can't be written.
    """

    def __init__(
        self,
        ledger: Path,
        *,
        floor: int | None = None,
        available: Callable[[], int] = available,
        total: Callable[[], int] = total,
    ) -> None:
        self.total = total()
        self.floor = min(max(self.total // 20, 256), 2048) if floor is None else floor
        self._available = available
        self._ledger = Ledger(ledger)

    def reserve(
        self,
        mebibytes: int,
        what: str,
        *,
        timeout: float,
        make_room: Callable[[], bool] = _nothing,
        waiting: Callable[[str], None] = _silent,
    ) -> Reservation:
        """Wait until `mebibytes` fit beside what is reserved and the floor, and reserve them.

        Who came first is served first. While it does not fit, `make_room` is called; it ends a
        VM that can be done without and returns True, or False if there is none. `waiting` is called
        once with a line of text when that did not help.

        Somebody who has one VM and waits for another does not give back the first: two that do
        so can wait for each other until the timeout. VMs that are needed together should be
        reserved as one.

        Raises:
            MachineError: it did not fit within `timeout` seconds, or it would not even fit if all
                VMs of ours ended, which is told at once.
            SettingsError: the ledger can't be written.
        """
        deadline = Deadline(timeout)
        entry = Entry(what, mebibytes)
        with self._locked():
            view = self._view()
            if view.free >= mebibytes and self._is_first(None):
                return self._grant(entry)
            ticket = self._ledger.next_in_queue()
            self._ledger.write(ticket, entry)
        try:
            return self._wait(entry, ticket, view, deadline, make_room, waiting)
        finally:
            with contextlib.suppress(OSError):
                ticket.unlink(missing_ok=True)

    def try_reserve(self, mebibytes: int, what: str) -> Reservation | None:
        """Reserve for a VM that can be done without, or return None. It never waits.

        Twice the floor has to be left, and nobody may be waiting. Raises `SettingsError` if the
        ledger can't be written.
        """
        try:
            with self._ledger.locked(0.2):
                if self._view().free - self.floor >= mebibytes and self._is_first(None):
                    return self._grant(Entry(what, mebibytes))
        except Timeout:
            pass
        return None

    def contended(self) -> bool:
        """Whether any process waits for memory: VMs that can be done without should be ended."""
        return not self._is_first(None)

    def _wait(
        self,
        entry: Entry,
        ticket: Path,
        view: _View | None,
        deadline: Deadline,
        make_room: Callable[[], bool],
        waiting: Callable[[str], None],
    ) -> Reservation:
        """Wait in the queue. `view` is the last look, None if it is not our turn."""
        version, look = 0, Deadline(_LOOK)
        hopeless: Deadline | None = None
        told = False
        while True:
            made = make_room()
            changed = made or version != self._ledger.version()
            if changed or look.expired or hopeless or deadline.expired:
                version, look = self._ledger.version(), Deadline(_LOOK)
                view = None
                if self._is_first(ticket):
                    with self._locked():
                        view = self._view()
                        if view.free >= entry.mebibytes:
                            return self._grant(entry)
            if made:
                continue
            if view is None or view.free_alone >= entry.mebibytes:
                hopeless = None
                if deadline.expired:
                    start = f"Waited {deadline.seconds:g} s for memory, in vain"
                    raise MachineError(self._refusal(entry, ticket, start))
                if not told:
                    told = True
                    waiting(self._waiting(entry, ticket))
            elif hopeless is None:
                hopeless = Deadline(_SETTLE)
            elif hopeless.expired:
                start = "There is not enough memory"
                raise MachineError(self._refusal(entry, ticket, start))
            time.sleep(_INTERVAL if hopeless else deadline.remaining(_INTERVAL))
            self._ledger.still_waits(ticket, entry)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._ledger.locked(_LOCK_TIMEOUT):
                yield
        except Timeout:
            raise MachineError(
                f"Another process has held the lock in {self._ledger.directory} for "
                f"{_LOCK_TIMEOUT:g} s. Is a pytest stopped, by Control-Z or in a debugger?"
            ) from None

    def _is_first(self, ticket: Path | None) -> bool:
        return next(self._ledger.ahead(ticket), None) is None

    def _grant(self, entry: Entry) -> Reservation:
        path = self._ledger.directory / f"{secrets.token_hex(8)}.reserved"
        self._ledger.write(path, entry)
        return Reservation(self._ledger, path, entry)

    def _view(self) -> _View:
        vms = []
        for entry in self._ledger.reservations():
            if not entry.qemu:
                vms.append(_Vm(entry, 0, entry.mebibytes, kept=False))
            elif entry.qemu_lives:
                used = used_by(entry.qemu)
                if used is None:  # its memory is just being given back
                    used = entry.mebibytes
                to_come = max(0, entry.mebibytes - used)
                vms.append(_Vm(entry, used, to_come, kept=not entry.owner_lives))
        # Last: what a VM takes or gives back meanwhile is then not counted as free too early.
        return _View(vms, self._available(), self.floor)

    # --- texts --------------------------------------------------------------------------------

    def _waiting(self, entry: Entry, ticket: Path) -> str:
        view = self._view()
        before = len(list(self._ledger.ahead(ticket)))
        text = f"waiting for memory: {self._numbers(entry, view)}; {view}"
        return f"{text}; {before} waited before it" if before else text

    def _numbers(self, entry: Entry, view: _View) -> str:
        free = f"{max(0, view.free)} of {self.total} MiB are free"
        return f"{entry.what} needs {entry.mebibytes} MiB, {free}"

    def _refusal(self, entry: Entry, ticket: Path, start: str) -> str:
        view = self._view()
        before = len(list(self._ledger.ahead(ticket)))
        text = str(view)
        lines = [
            f"{start}: {self._numbers(entry, view)} ({view.available} are available, "
            f"{view.to_come} of them promised to VMs, {self.floor} left to other programs).",
            f"{text} MiB:" if view.vms else f"{text[0].upper()}{text[1:]}.",
        ]
        vms = sorted(view.vms, key=lambda vm: -vm.holds)
        lines += [vm.line() for vm in vms[:_LISTED]]
        if len(vms) > _LISTED:
            lines.append(f"    and {len(vms) - _LISTED} more")
        if before:
            others = "1 other" if before == 1 else f"{before} others"
            lines.append(f"{entry.what} waits behind {others}.")
        lines.append(
            "What helps: less memory for the VM (--nixvm-memory=MIB), fewer workers at once "
            "(pytest-xdist's -n), closing other programs."
        )
        return "\n".join(lines)
