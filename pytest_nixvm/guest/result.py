"""What a command in the guest left behind."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_nixvm.errors import CommandFailedError

Command = str | Sequence[str]
"""A string is run by the guest's shell; a sequence is an argv that no shell ever sees."""


@dataclass(frozen=True)
class CommandResult:
    """A finished command: its output as text (bytes on request), exit status and duration.

    `returncode` is the exit status; a command that was ended by a signal has 128 + the signal's
    number, as in a shell. `duration` is in seconds, measured on the host, the channel's cost
    included.
    """

    command: Command
    returncode: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    duration: float
    channel: str = ""

    @property
    def stdout(self) -> str:
        """Standard output, decoded as UTF-8; what is not UTF-8 is replaced."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error, decoded as UTF-8; what is not UTF-8 is replaced."""
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def ok(self) -> bool:
        """Whether the exit status is 0."""
        return self.returncode == 0

    def check(self) -> CommandResult:
        """Return this result if the exit status is 0, else raise `CommandFailedError`."""
        if self.returncode != 0:
            raise CommandFailedError(
                f"`{display(self.command)}` ended with exit status {self.returncode}.",
                command=self.command,
                returncode=self.returncode,
                stdout=self.stdout,
                stderr=self.stderr,
            )
        return self


def display(command: Command) -> str:
    """Return the command as a person would type it."""
    return command if isinstance(command, str) else shlex.join(command)
