"""Bounded waiting: one clock for a job of several steps."""

from __future__ import annotations

import time
from collections.abc import Callable

from pytest_nixvm.errors import WaitTimeoutError


class Deadline:
    """A point in time that several steps share.

    deadline = Deadline(60)                 # seconds from now
    client.connect(timeout=deadline.remaining())
    deadline.check("sshd's banner")         # raises when the time is over
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self, at_most: float | None = None) -> float:
        """Return the seconds left, never negative, and not more than `at_most`."""
        left = max(0.0, self._end - time.monotonic())
        return left if at_most is None else min(left, at_most)

    @property
    def elapsed(self) -> float:
        """The seconds since it was made."""
        return self.seconds - (self._end - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._end

    def check(self, waited_for: str, saw: str = "") -> None:
        """Raise `WaitTimeoutError` naming `waited_for` (and what was seen) if the time is over."""
        if self.expired:
            raise timed_out(waited_for, self.seconds, saw)


def timed_out(waited_for: str, seconds: float, saw: str = "") -> WaitTimeoutError:
    """Build the error of a wait that ran out of time."""
    text = f"Waited {seconds:g} s for {waited_for}, in vain."
    return WaitTimeoutError(f"{text}\n{saw}" if saw else text)


def poll(
    condition: Callable[[], bool],
    waited_for: str,
    *,
    timeout: float,
    interval: float = 0.1,
    longest: float = 1.0,
    saw: Callable[[], str] = str,
) -> None:
    """Call `condition` until it is true, for what has no event to wait for.

    The pause grows from `interval` to `longest` seconds. After `timeout` seconds
    `WaitTimeoutError` is raised with `saw()`, evaluated once at the end, in its text.
    """
    deadline = Deadline(timeout)
    pause = interval
    while not condition():
        if deadline.expired:
            raise timed_out(waited_for, timeout, saw())
        time.sleep(deadline.remaining(pause))
        pause = min(pause * 1.5, longest)
