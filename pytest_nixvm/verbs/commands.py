"""Commands: execute, succeed, fail, and those that are repeated until they do."""

from __future__ import annotations

from dataclasses import replace

from pytest_nixvm.errors import CommandFailedError, tail
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, STRICT, Guest
from pytest_nixvm.wait import Deadline, poll


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

        The NixOS test driver's verb. Without `check_return` the status is -2 and without
        `check_output` the output is empty, as there. `timeout` None is a day.
        """
        result = self._driver_run(command, timeout)
        output = result.stdout if check_output else ""
        return (result.returncode if check_return else -2), output

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
        result = self.run(f"{STRICT}{command}", timeout=seconds)
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
        last: CommandResult | None = None

        def tried() -> bool:
            nonlocal last
            last = self._driver_run(command, max(1.0, deadline.remaining()))
            return last.ok is wanted

        def saw() -> str:
            if last is None:
                return ""
            text = f"The last try ended with exit status {last.returncode}."
            for name, stream in (("stdout", last.stdout), ("stderr", last.stderr)):
                text += f"\n{name}:\n{tail(stream, 15)}" if stream.strip() else ""
            return text

        goal = f"`{command}` to {'succeed' if wanted else 'fail'} on {self.name}"
        poll(tried, goal, timeout=timeout, saw=saw)
        return last.stdout if last is not None else ""
