"""What long steps tell whoever watches: a name, a detail, how many of how many, the outcome.

The rooms below the plugin report through this protocol and know nothing of terminals.
"""

from __future__ import annotations

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
