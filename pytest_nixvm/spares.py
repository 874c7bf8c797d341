"""Clones that are loaded while a test runs, so that the next test need not wait for its own.

A spare was woken until its channels answered: what it needs is in memory, what it runs is
translated. If nobody takes it soon it is paused, and woken once more. One is prepared at a time, so
that the test that runs keeps its processors.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_nixvm.errors import MachineError
from pytest_nixvm.workshop import Workshop

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.qemu.template import Template

MOST = 4
"""Spares at most: a test that wants more machines than these is a rare one."""


LINGER = 1.0
"""Seconds that a spare is left running: short tests find their machine awake, with the right time.

An idle guest takes some hundredths of a processor.
"""


@dataclass
class Want:
    """A spare to be: what makes it, and who is going to log in by SSH."""

    template: Template
    make: Callable[[], Machine]
    users: Sequence[str | None] = ()
    machine: Machine | None = None
    rests_at: float | None = None  # when it is to be paused, by the monotonic clock
    done: threading.Event = field(default_factory=threading.Event)


class Spares:
    """The spares of one process. For any thread."""

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._wants: deque[Want] = deque()  # not begun yet
        self._spares: list[Want] = []  # begun, and those that are ready
        self._unwanted: list[Want] = []  # begun, and to be ended
        self._thread: threading.Thread | None = None
        self._closed = False
        # One processor is the test's.
        self.enabled = (os.cpu_count() or 1) > 1

    def expect(self, wants: Sequence[Want]) -> None:
        """Prepare these, and let go of those that nobody wants any more. Returns at once."""
        with self._lock:
            if self._closed or not self.enabled:
                return
            # While any process waits for memory, nobody keeps a VM that can be done without.
            missing = [] if self._workshop.is_contended() else list(wants)[:MOST]
            for spare in list(self._spares):
                match = next((want for want in missing if _serves(spare, want)), None)
                if match is None:
                    self._spares.remove(spare)
                    self._unwanted.append(spare)
                else:
                    missing.remove(match)
            self._wants = deque(missing)
            if missing and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="nixvm-spare", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def take(self, template: Template) -> Machine | None:
        """Return a spare of this template, paused, or None. One that is nearly there is waited for.

        The caller wakes it.
        """
        with self._lock:
            spare = next((each for each in self._spares if each.template is template), None)
            if spare is None:
                # It was not begun: to do so now would take as long as to make one at once.
                self._wants = deque(want for want in self._wants if want.template is not template)
                return None
            self._spares.remove(spare)
        spare.done.wait()
        machine = spare.machine
        if machine is None:
            return None
        if not machine.is_loaded():  # its QEMU was killed meanwhile
            self._workshop.clear(machine)
            return None
        return machine

    def drop(self) -> bool:
        """End a spare: its memory is needed. False if there is none."""
        with self._lock:
            self._wants.clear()
            mine = self._unwanted or self._spares
            spare = mine.pop() if mine else None
        if spare is None:
            return False
        self._end(spare)
        return True

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            self._wants.clear()
            spares = [*self._spares, *self._unwanted]
            self._spares, self._unwanted = [], []
            self._changed.notify_all()
        for spare in spares:
            self._end(spare)
        if self._thread is not None:
            self._thread.join(60)

    def _end(self, spare: Want) -> None:
        spare.done.wait()
        if spare.machine is not None:
            self._workshop.clear(spare.machine)

    # --- in the background ---------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(
                    lambda: self._wants or self._unwanted or self._closed, self._rest()
                )
                if self._closed:
                    return
                unwanted, self._unwanted = self._unwanted, []
                want = self._wants.popleft() if self._wants else None
                if want is not None:
                    self._spares.append(want)
            for spare in unwanted:
                self._end(spare)
            if want is None:
                continue
            try:
                want.machine = self._prepare(want)
            finally:
                if want.machine is None:
                    with self._lock:
                        for each in (self._spares, self._unwanted):
                            if want in each:
                                each.remove(want)
                want.done.set()

    def _rest(self) -> float | None:
        """Pause the spares that have been awake for long enough; return when to look again."""
        awake = [spare for spare in self._spares if spare.rests_at is not None]
        for spare in awake:
            if spare.machine is not None and (spare.rests_at or 0) <= time.monotonic():
                spare.rests_at = None
                with suppress(MachineError):  # whoever takes it sees what has become of it
                    spare.machine.rest()
        times = [spare.rests_at for spare in awake if spare.rests_at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _prepare(self, want: Want) -> Machine | None:
        machine = None
        try:
            machine = want.make()
            if not self._workshop.reserve(machine, wait=False):
                self._workshop.clear(machine)
                return None
            machine.load()
            self._workshop.started(machine)
            machine.warm(want.users)
            want.rests_at = time.monotonic() + LINGER
        except Exception:
            # Whoever wants it makes one himself, and is told what is wrong with that.
            if machine is not None:
                self._workshop.clear(machine)
            return None
        return machine


def _serves(spare: Want, want: Want) -> bool:
    return spare.template is want.template and set(want.users) <= set(spare.users)
