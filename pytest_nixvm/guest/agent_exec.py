"""Commands through the guest agent, and the end of those that take too long."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from pytest_nixvm.errors import AgentError, CommandError, CommandTimeoutError
from pytest_nixvm.guest import reap
from pytest_nixvm.guest.result import Command, CommandResult, display
from pytest_nixvm.wait import Deadline

Call = Callable[[str, Mapping[str, object], float], Awaitable[Any]]
"""Sends one agent command: its name, arguments, and seconds."""

ENVIRONMENT = {"PATH": reap.PATH, "HOME": "/root", "USER": "root", "LOGNAME": "root"}
"""What a command finds in its environment; the agent's own PATH on NixOS has next to nothing."""

OUTPUT_LIMIT = 16 * 1024 * 1024
"""Bytes of each stream that the agent keeps (GUEST_EXEC_MAX_OUTPUT in QEMU's qga/commands.c)."""

INPUT_LIMIT = 16 * 1024 * 1024
"""Bytes of standard input: the agent's parser takes 64 MiB a line, and copies it several times."""

_PATIENCE = 15.0
"""Seconds that killing may take before we say that it did not work."""


class GuestProcess:
    """One command that the agent has started. Lives on the I/O thread.

    `result` is None until it has ended and its output streams are closed; the agent reports the
    end not before that, so that a child in the background that keeps them open counts as well.
    """

    def __init__(self, call: Call, command: Command) -> None:
        self.pid = 0
        self.result: CommandResult | None = None
        self._call = call
        self._command = command
        self._mark = reap.new_mark()
        self._began = time.monotonic()
        self._truncated = False

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], stdin: bytes | None, timeout: float
    ) -> None:
        """Start it. What can't be started has ended already, with 127 or 126 as in a shell."""
        if not argv:
            raise ValueError("an empty argv can't be run")
        environment = {**ENVIRONMENT, **env, reap.MARK: self._mark}
        if "/" not in argv[0]:
            # The agent would search its own PATH, not the command's.
            argv = ["/bin/sh", "-c", 'exec "$@"', "sh", *argv]
        request: dict[str, object] = {
            "path": argv[0],
            "arg": list(argv[1:]),
            "env": [f"{name}={value}" for name, value in environment.items()],
            "capture-output": True,
        }
        if stdin is not None:
            if len(stdin) > INPUT_LIMIT:
                raise ValueError(
                    f"{len(stdin)} bytes of stdin: the guest agent takes {INPUT_LIMIT} at most"
                )
            request["input-data"] = base64.b64encode(stdin).decode()
        try:
            self.pid = int((await self._call("guest-exec", request, timeout))["pid"])
        except AgentError as error:
            # The text is GLib's, in the agent's language, which is a service's: C.
            if "Failed to execute child process" not in error.description:
                raise
            code = 126 if "Permission denied" in error.description else 127
            self.result = self._ended(code, b"", error.description.encode() + b"\n")

    async def poll(self, timeout: float) -> CommandResult | None:
        """Ask once for the result."""
        if self.result is None:
            status = await self._call("guest-exec-status", {"pid": self.pid}, timeout)
            if status["exited"]:
                code = status.get("exitcode")
                self._truncated = bool(status.get("out-truncated") or status.get("err-truncated"))
                self.result = self._ended(
                    int(code) if code is not None else 128 + int(status.get("signal", 0)),
                    base64.b64decode(status.get("out-data", "")),
                    base64.b64decode(status.get("err-data", "")),
                )
        return self.result

    async def wait(self, deadline: Deadline) -> CommandResult:
        """Wait for the result, and kill the command when the time is over.

        Raises `CommandTimeoutError`, and `CommandError` if output was lost.
        """
        pause = 0.005
        while await self.poll(max(5.0, deadline.remaining())) is None:
            if deadline.expired:
                await self._time_out(deadline.seconds)
            await asyncio.sleep(deadline.remaining(pause))
            pause = min(pause * 1.3, 0.1)
        return self.complete()

    def complete(self) -> CommandResult:
        """Return the result. Raises `CommandError` if the agent has dropped some of the output."""
        if self.result is None:
            raise RuntimeError("the command has not ended")
        if self._truncated:
            raise CommandError(
                f"`{display(self._command)}` (exit status {self.result.returncode}) wrote more "
                f"than the guest agent keeps ({OUTPUT_LIMIT // 2**20} MiB a stream): the rest is "
                "lost. Write to a file, or use SSH.",
                command=self._command,
                returncode=self.result.returncode,
                stdout=self.result.stdout,
                stderr=self.result.stderr,
            )
        return self.result

    async def kill(self) -> bool:
        """Kill the command and all it has started; return whether it has ended."""
        deadline = Deadline(_PATIENCE)
        killer = GuestProcess(self._call, "nixvm-reap")
        await killer.start(reap.argv(self._mark), {}, None, 10)
        while not deadline.expired:
            if await killer.poll(10) is not None and await self.poll(10) is not None:
                break
            await asyncio.sleep(0.02)
        return self.result is not None

    async def _time_out(self, seconds: float) -> None:
        killed = await self.kill()
        text = f"`{display(self._command)}` did not end within {seconds:g} s. "
        text += "It was killed with all that it had started." if killed else "It can't be killed."
        result = self.result
        raise CommandTimeoutError(
            text,
            command=self._command,
            stdout=result.stdout if result is not None else "",
            stderr=result.stderr if result is not None else "",
        )

    def _ended(self, returncode: int, stdout: bytes, stderr: bytes) -> CommandResult:
        duration = time.monotonic() - self._began
        return CommandResult(self._command, returncode, stdout, stderr, duration, channel="agent")


class Started:
    """A command that runs in the guest while the test goes on."""

    def __init__(
        self, run: Callable[[Coroutine[Any, Any, Any], float, str], Any], process: GuestProcess
    ) -> None:
        self._run = run
        self._process = process

    @property
    def pid(self) -> int:
        """The process id in the guest; 0 if it could not be started."""
        return self._process.pid

    def poll(self, timeout: float = 10) -> CommandResult | None:
        """Return the result, or None while it runs."""
        if self._run(self._process.poll(timeout), timeout + 1, "guest-exec-status") is None:
            return None
        return self._process.complete()

    def wait(self, timeout: float) -> CommandResult:
        """Wait for the end. After `timeout` seconds it is killed as by `Agent.exec`."""
        result = self._run(self._process.wait(Deadline(timeout)), timeout + 30, "a command's end")
        assert isinstance(result, CommandResult)  # noqa: S101 - for the type checker
        return result

    def kill(self) -> None:
        """Kill the command and all it has started."""
        self._run(self._process.kill(), 60, "a command to be killed")
