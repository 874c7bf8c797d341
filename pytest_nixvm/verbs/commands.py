"""Commands: execute, succeed, fail, and those that are repeated until they do."""

from __future__ import annotations

import shlex
import time
from contextlib import suppress
from dataclasses import replace

from pytest_nixvm.errors import CommandFailedError, CommandTimeoutError, tail
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, STRICT, Guest
from pytest_nixvm.wait import Deadline, timed_out

_SHORTEST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0
"""Seconds between two tries of a command: as long as the last try took, within these."""

# In the background of a shell that ends at once, with no output that anybody would wait for.
_DETACHED = "timeout {seconds:g} bash -c {text} </dev/null >/dev/null 2>&1 &"


class Commands(Guest):
    """Commands in the NixOS test driver's way."""

    def execute(
        self,
        command: str,
        check_return: bool = True,
        check_output: bool = True,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> tuple[int, str]:
        """Run a shell command with `set -euo pipefail`; return its exit status and stdout.

        The NixOS test driver's verb. Without `check_output` the command is only started, and
        `(-2, "")` returned; what it writes is dropped, and it is ended after `timeout` seconds.
        Without `check_return` the status is -1. A `timeout` of None is `DEFAULT_TIMEOUT`.

        Raises `CommandTimeoutError` after `timeout` seconds, unless it was only started.
        """
        if not check_output:
            seconds = DEFAULT_TIMEOUT if timeout is None else timeout
            self.run(_DETACHED.format(seconds=seconds, text=shlex.quote(f"{STRICT}{command}")))
            return -2, ""
        result = self._driver_run(command, timeout)
        return (result.returncode if check_return else -1), result.stdout

    def succeed(self, *commands: str, timeout: float | None = None) -> str:
        """Run shell commands; return their stdout.

        Raises `CommandFailedError` at the first one that fails.
        """
        return "".join(self._driver_run(command, timeout).check().stdout for command in commands)

    def fail(self, *commands: str, timeout: float | None = None) -> str:
        """Run shell commands that must fail; return their stdout. Raises at one that succeeds."""
        output = ""
        for command in commands:
            result = self._driver_run(command, timeout)
            if result.ok:
                raise CommandFailedError(
                    f"`{command}` succeeded on {self.name}, and should have failed.",
                    command=command,
                    returncode=0,
                    stdout=result.stdout,
                    stderr=result.stderr,
                )
            output += result.stdout
        return output

    def _driver_run(self, command: str, timeout: float | None) -> CommandResult:
        seconds = DEFAULT_TIMEOUT if timeout is None else timeout
        try:
            result = self.run(f"{STRICT}{command}", timeout=seconds)
        except CommandTimeoutError as error:
            # The reader has not written that line.
            error.args = (str(error).replace(STRICT, "", 1),)
            error.command = command
            raise
        return replace(result, command=command)

    def wait_until_succeeds(self, command: str, timeout: float = DEFAULT_TIMEOUT) -> str:
        """Repeat a shell command until it succeeds; return its stdout.

        Raises `WaitTimeoutError` with the last try's status and output after `timeout` seconds.
        """
        return self._repeat(command, timeout, wanted=True)

    def wait_until_fails(self, command: str, timeout: float = DEFAULT_TIMEOUT) -> str:
        """Repeat a shell command until it fails; return its stdout."""
        return self._repeat(command, timeout, wanted=False)

    def _repeat(self, command: str, timeout: float, *, wanted: bool) -> str:
        deadline = Deadline(timeout)
        goal = f"`{command}` to {'succeed' if wanted else 'fail'}"
        tries = 0
        with self.transcript.note("wait", goal) as entry:
            while True:
                tries += 1
                seen = len(self.transcript.entries)
                try:
                    last = self._driver_run(command, max(1.0, deadline.remaining()))
                except CommandTimeoutError as error:
                    saw = f"Try {tries} was still running then.{_streams(error)}"
                    raise timed_out(f"{goal} on {self.name}", timeout, saw) from None
                if last.ok is wanted:
                    entry.outcome = f"exit status {last.returncode}, at try {tries}"
                    return last.stdout
                if deadline.expired:
                    saw = f"Try {tries}, the last, ended with exit status {last.returncode}."
                    saw += _streams(last)
                    raise timed_out(f"{goal} on {self.name}", timeout, saw)
                # What is quick is asked often, and what is slow does not keep the guest busy.
                pause = min(max(last.duration, _SHORTEST_PAUSE), _LONGEST_PAUSE)
                time.sleep(deadline.remaining(pause))
                # Of thousands of tries the last one tells enough.
                self._forget(entry.depth + 1, seen)

    def _forget(self, depth: int, since: int) -> None:
        """Drop from the transcript what this thread has run since then, at that depth."""
        for entry in self.transcript.entries[since:]:
            if entry.depth == depth and entry.kind == "command" and entry.outcome:
                with suppress(ValueError):  # another thread was faster
                    self.transcript.entries.remove(entry)
                return


def _streams(of: CommandResult | CommandTimeoutError) -> str:
    said = (("stdout", of.stdout), ("stderr", of.stderr))
    return "".join(f"\n{name}:\n{tail(text, 15)}" for name, text in said if text.strip())
