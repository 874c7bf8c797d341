"""What long steps tell whoever watches: a name, a detail, how many of how many, the outcome.

The rooms below the plugin report through this protocol and know nothing of terminals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Step(Protocol):
    """One thing that takes time: an evaluation, a build, a boot."""

    def update(self, detail: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is going on now; `done` of `total` where that is known."""

    def finish(self, detail: str = "") -> None:
        """End the step well."""

    def fail(self, detail: str = "") -> None:
        """End the step badly."""


class Progress(Protocol):
    """Where steps are shown."""

    def step(self, title: str) -> Step:
        """Begin a step; the caller ends it with `finish` or `fail`."""

    def close(self) -> None:
        """Show nothing any more, whatever still runs."""


class _SilentStep:
    def update(self, detail: str, done: int | None = None, total: int | None = None) -> None: ...

    def finish(self, detail: str = "") -> None: ...

    def fail(self, detail: str = "") -> None: ...


class Silent:
    """Shows nothing: the default outside pytest."""

    def step(self, title: str) -> Step:  # noqa: ARG002 - the protocol's signature
        """Return a step that nobody sees."""
        return _SilentStep()

    def close(self) -> None:
        """Do nothing."""


class Deferred:
    """Is made by `make` when the first step begins: most runs have nothing to show."""

    def __init__(self, make: Callable[[], Progress]) -> None:
        self._make = make
        self._made: Progress | None = None
        self._lock = threading.Lock()

    def step(self, title: str) -> Step:
        """Begin a step."""
        with self._lock:
            self._made = self._made or self._make()
        return self._made.step(title)

    def close(self) -> None:
        """Show nothing any more."""
        if self._made is not None:
            self._made.close()
