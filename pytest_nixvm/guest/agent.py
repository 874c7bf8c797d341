"""The QEMU guest agent: readiness, bootstrap, time, and commands while there is nothing better.

Protocol: https://www.qemu.org/docs/master/interop/qemu-ga-ref.html. The agent runs as root and
needs neither network nor log-in, so that it works when those are what is broken.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pytest_nixvm.errors import AgentError, MachineError, MachineGoneError
from pytest_nixvm.guest.agent_client import AgentClient
from pytest_nixvm.guest.agent_exec import GuestProcess, Started
from pytest_nixvm.guest.result import Command, CommandResult, display
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.wait import Deadline

T = TypeVar("T")

ASK_AGAIN = 3.0
"""Seconds after which an unanswered `guest-sync` is sent again, the first time."""

_CHUNK = 1024 * 1024
_SETUP = (
    "if [ -r /etc/set-environment ]; then . /etc/set-environment; "
    "elif [ -r /etc/profile ]; then . /etc/profile; fi >/dev/null 2>&1"
)


@dataclass(frozen=True)
class AgentInfo:
    """What the agent is: its version and the commands that it would obey."""

    version: str
    commands: frozenset[str]


class Agent:
    """The guest agent of one VM. May be used from several threads at once.

    agent = Agent(io, socket)
    agent.wait_ready(timeout=60)            # before the guest has booted, too
    agent.exec(["systemctl", "is-system-running"]).stdout
    agent.exec("echo $PATH | wc -c")        # a string is run by the guest's shell
    agent.read_file("/etc/os-release")
    agent.execute("guest-get-vcpus")        # anything else, raw

    All times are in seconds. Every method raises `AgentError` when the agent answers with an error
    or not in time, and `MachineGoneError` when QEMU has ended, also while a call is under way.
    """

    def __init__(self, io: IoThread, socket: Path) -> None:
        self._io = io
        self._socket = socket
        self._client: AgentClient | None = None
        self._opening = asyncio.Lock()
        self._waits: set[asyncio.Task[None]] = set()
        self._shell: list[str] | None = None
        self._fault: MachineError | None = None

    def connect(self, timeout: float = 10) -> None:
        """Connect to QEMU's socket. Says nothing about the guest: QEMU accepts before it runs."""
        self._run(self._connected(), timeout, "the connection to the guest agent's socket")

    def close(self) -> None:
        """Hang up; calls that are under way end with `MachineGoneError`. May be called twice."""

        def hang_up() -> None:
            for task in self._waits:
                task.cancel()
            if self._client is not None:
                self._client.close()

        self._io.call(hang_up)

    def interrupt(self, error: MachineError) -> None:
        """End every call that is under way, and every later one until `revive`, with `error`."""

        def cut() -> None:
            self._fault = error
            for task in self._waits:
                task.cancel()
            if self._client is not None:
                self._client.fail(error)

        self._io.call(cut)

    def revive(self) -> None:
        """Take calls again after `interrupt`: the guest was started anew."""
        self._fault = None

    # --- readiness ---------------------------------------------------------------------------

    def wait_ready(self, timeout: float) -> None:
        """Wait until the agent answers. May be called before the guest has booted.

        `cancel` ends the wait from another thread. Raises `AgentError`, `MachineGoneError`.
        """

        async def wait() -> None:
            task = asyncio.ensure_future(self.ready())
            self._waits.add(task)
            try:
                await asyncio.wait({task})
                if self._fault is not None:
                    raise self._fault.again()
                if task.cancelled():
                    raise AgentError("The wait for the guest agent was given up.")
                task.result()
            finally:
                task.cancel()
                self._waits.discard(task)

        self._run(wait(), timeout, "the guest agent to answer")

    def cancel(self) -> None:
        """End every `wait_ready` that is under way with an `AgentError`. From any thread."""
        self._io.call(lambda: [task.cancel() for task in self._waits])

    async def ready(self) -> None:
        """Return when the agent answers: `wait_ready` for code on the I/O thread, without a limit.

        A `guest-sync` that is sent early is answered as soon as the agent is up. It is repeated
        only because a reboot, or a restart of the agent, can swallow one; answers to earlier ones
        are dropped.
        """
        pause = ASK_AGAIN
        while True:
            client = await self._connected()
            number = secrets.randbelow(2**31)
            try:
                await client.clear_parser()
                answer = await client.call("guest-sync", {"id": number}, timeout=pause)
            except AgentError as error:
                if error.error_class != "Timeout":
                    raise
                pause = min(pause * 1.5, 15.0)
                continue
            if answer == number:
                return

    # --- the agent's own verbs -----------------------------------------------------------------

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 10
    ) -> Any:
        """Send one agent command and return its answer, whatever its type."""
        return self._run(self._call(command, arguments, timeout), timeout + 1, command)

    def ping(self, timeout: float = 10) -> None:
        """Return if the agent answers within `timeout` seconds."""
        self.execute("guest-ping", timeout=timeout)

    def info(self, timeout: float = 10) -> AgentInfo:
        """Ask for the version and the commands that are enabled."""
        answer = self.execute("guest-info", timeout=timeout)
        commands = answer.get("supported_commands", [])
        return AgentInfo(
            str(answer.get("version", "")),
            frozenset(str(each["name"]) for each in commands if each.get("enabled", True)),
        )

    def hostname(self, timeout: float = 10) -> str:
        """Return the guest's host name."""
        return str(self.execute("guest-get-host-name", timeout=timeout)["host-name"])

    def os_info(self, timeout: float = 10) -> dict[str, str]:
        """Return what the guest says of itself: `id`, `version-id`, `kernel-release` and so on."""
        return dict(self.execute("guest-get-osinfo", timeout=timeout))

    def users(self, timeout: float = 10) -> list[dict[str, Any]]:
        """Return who is logged in (`user`, `login-time`)."""
        return list(self.execute("guest-get-users", timeout=timeout))

    def network_interfaces(self, timeout: float = 10) -> list[dict[str, Any]]:
        """Return the interfaces (`name`, `hardware-address`, `ip-addresses`)."""
        return list(self.execute("guest-network-get-interfaces", timeout=timeout))

    def add_ssh_key(self, user: str, public_key: str, timeout: float = 10) -> None:
        """Add a line to `~user/.ssh/authorized_keys`, unless it is there already."""
        self.execute(
            "guest-ssh-add-authorized-keys",
            {"username": user, "keys": [public_key]},
            timeout=timeout,
        )

    def shutdown(
        self, mode: Literal["powerdown", "reboot", "halt"] = "powerdown", timeout: float = 10
    ) -> None:
        """Begin to shut the guest down. Returns before it is down.

        By systemctl, because `guest-shutdown` calls /sbin/shutdown, which needs D-Bus or is not
        there, and is answered only if it fails; `guest-shutdown` where there is no systemctl.
        Raises `AgentError` if systemctl refuses.
        """
        verb = "poweroff" if mode == "powerdown" else mode
        started = self.start(["systemctl", "--no-block", verb])
        deadline = Deadline(timeout)
        result = None
        while result is None and not deadline.expired:
            try:
                result = started.poll(timeout=1)
            except (AgentError, MachineGoneError):
                return  # it is under way: the agent has gone before it could tell
            time.sleep(0 if result is not None else 0.03)
        if result is not None and result.returncode == 127:

            async def send() -> None:
                client = await self._connected()
                await client.send_only("guest-shutdown", {"mode": mode})

            self._run(send(), timeout, "guest-shutdown")
        elif result is not None and not result.ok:
            raise AgentError(f"systemctl {verb} failed: {result.stderr.strip()}")

    # --- time ----------------------------------------------------------------------------------

    def time(self, timeout: float = 10) -> float:
        """Return the guest's clock, in seconds since the epoch."""
        return float(self.execute("guest-get-time", timeout=timeout)) / 1e9

    def set_time(self, seconds: float | None = None, timeout: float = 30) -> None:
        """Set the guest's clock to `seconds` since the epoch, or to the host's clock.

        The result is checked, because the agent's answer means little: without `hwclock` in the
        guest some agents set the clock and report an error, others (7.2) leave it wrong; then
        `date -s` is run instead. Raises `AgentError` if the clock is wrong all the same.
        """
        deadline = Deadline(timeout)
        start = time.monotonic()
        goal = time.time() if seconds is None else seconds

        def now() -> float:
            return goal + time.monotonic() - start

        def off() -> float:
            return self.time(max(1.0, deadline.remaining())) - now()

        reason = ""
        try:
            self.execute(
                "guest-set-time", {"time": int(now() * 1e9)}, timeout=max(1.0, deadline.remaining())
            )
        except AgentError as error:
            reason = error.description or str(error)
        if abs(off()) < 1:
            return
        result = self.exec(["date", "-s", f"@{now():.3f}"], timeout=max(1.0, deadline.remaining()))
        difference = off()
        if abs(difference) >= 1:
            raise AgentError(
                f"The guest's clock can't be set: it is {difference:+.1f} s off. "
                f"guest-set-time said: {reason or 'nothing'}; "
                f"date said: {result.stderr.strip() or result.returncode}.",
                error_class="GenericError",
                description=reason,
            )

    # --- files -----------------------------------------------------------------------------------

    def read_file(self, path: str, timeout: float = 60) -> bytes:
        """Return the whole content of a file, of any size."""
        return self._run(self._read_file(path, timeout), timeout, f"{path} to be read")

    def exists(self, path: str, timeout: float = 10) -> bool:
        """Whether `path` is a file (or directory) that can be opened. Starts no program."""

        async def probe() -> bool:
            try:
                handle = await self._call("guest-file-open", {"path": path, "mode": "r"}, timeout)
            except AgentError as error:
                if error.error_class == "Timeout":
                    raise
                return False
            await self._call("guest-file-close", {"handle": handle}, timeout)
            return True

        return self._run(probe(), 2 * timeout, f"{path} to be looked at")

    def write_file(
        self, path: str, data: bytes, mode: int | None = 0o644, timeout: float = 60
    ) -> None:
        """Write a file, replacing its content; its directory must exist.

        `mode` is set before anything is written (the agent itself makes new files writable for
        everybody); None leaves an existing file's mode alone.
        """
        self._run(self._write_file(path, data, mode, timeout), timeout, f"{path} to be written")

    # --- commands --------------------------------------------------------------------------

    def exec(
        self,
        command: Command,
        *,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = False,
    ) -> CommandResult:
        """Run a command as root and wait for its end and for the end of its output.

        A sequence is an argv that no shell sees, searched in NixOS's places and the usual ones; a
        string is run by bash with the system's environment (see `shell_argv`). `env` is added to
        `agent_exec.ENVIRONMENT`. What can't be started ends with 127 or 126 and the reason on
        stderr.

        Raises `CommandTimeoutError` after `timeout` seconds, when the command and what it started
        has been killed; `CommandError` when it wrote more than the agent keeps (16 MiB a stream),
        with what it kept; with `check`, `CommandFailedError` for an exit status other than 0.
        """
        data = stdin.encode() if isinstance(stdin, str) else stdin
        argv = self.shell_argv(command) if isinstance(command, str) else list(command)
        # The margin is for killing the command; the time itself is kept by GuestProcess.
        coroutine = self._exec(command, argv, data, env or {}, Deadline(timeout))
        result = self._run(coroutine, timeout + 30, f"`{display(command)}`")
        return result.check() if check else result

    def start(self, command: Command, *, env: Mapping[str, str] | None = None) -> Started:
        """Start a command and return at once; `poll` of what is returned tells how it ended."""
        argv = self.shell_argv(command) if isinstance(command, str) else list(command)
        process = GuestProcess(self._call, command)
        start = process.start(argv, env or {}, None, 10)
        self._run(start, 11, f"the start of `{display(command)}`")
        return Started(self._run, process)

    def shell_argv(self, command: str) -> list[str]:
        """Return the argv that runs a command string as a log-in would, without its noise.

        bash of the running system where there is one (NixOS has no other fixed place), else
        /bin/sh; with what /etc/set-environment (NixOS) or /etc/profile set. Looked up once.
        """
        if self._shell is None:
            bash = "/run/current-system/sw/bin/bash"
            places = [bash, "/bin/bash"]
            self._shell = [next((place for place in places if self.exists(place)), "/bin/sh"), "-c"]
        return [*self._shell, f"{_SETUP}\n{command}"]

    # --- on the I/O thread -----------------------------------------------------------------

    async def _connected(self) -> AgentClient:
        async with self._opening:
            if self._client is None:
                try:
                    self._client = await AgentClient.open(self._socket)
                except OSError as error:
                    raise MachineGoneError(
                        f"No connection to the guest agent's socket {self._socket}: {error}."
                    ) from error
            return self._client

    async def _call(
        self, command: str, arguments: Mapping[str, object] | None, timeout: float
    ) -> Any:
        if self._fault is not None:
            raise self._fault.again()
        client = await self._connected()
        return await client.call(command, arguments, timeout=timeout)

    async def alive(self, timeout: float) -> None:
        """`ping` for code on the I/O thread, not ended by `interrupt`."""
        client = await self._connected()
        await client.call("guest-ping", None, timeout=timeout)

    async def _exec(
        self,
        command: Command,
        argv: list[str],
        stdin: bytes | None,
        env: Mapping[str, str],
        deadline: Deadline,
    ) -> CommandResult:
        process = GuestProcess(self._call, command)
        await process.start(argv, env, stdin, max(1.0, deadline.remaining()))
        return await process.wait(deadline)

    async def _read_file(self, path: str, timeout: float) -> bytes:
        handle = await self._call("guest-file-open", {"path": path, "mode": "r"}, timeout)
        content = bytearray()
        try:
            while True:
                answer = await self._call(
                    "guest-file-read", {"handle": handle, "count": _CHUNK}, timeout
                )
                content += base64.b64decode(answer["buf-b64"])
                if answer["eof"] or not answer["count"]:
                    return bytes(content)
        except binascii.Error as error:
            raise AgentError(f"The guest agent sent {path} damaged: {error}.") from error
        finally:
            await self._call("guest-file-close", {"handle": handle}, 10)

    async def _write_file(self, path: str, data: bytes, mode: int | None, timeout: float) -> None:
        handle = await self._call("guest-file-open", {"path": path, "mode": "w"}, timeout)
        try:
            if mode is not None:
                argv = ["chmod", f"{mode:o}", "--", path]
                result = await self._exec(argv, argv, None, {}, Deadline(timeout))
                if not result.ok:
                    raise AgentError(f"The mode of {path} can't be set: {result.stderr.strip()}")
            while data:
                part = base64.b64encode(data[:_CHUNK]).decode()
                answer = await self._call(
                    "guest-file-write", {"handle": handle, "buf-b64": part}, timeout
                )
                data = data[int(answer["count"]) :]
            await self._call("guest-file-flush", {"handle": handle}, timeout)
        finally:
            await self._call("guest-file-close", {"handle": handle}, 10)

    def _run(self, coroutine: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        try:
            return self._io.run(coroutine, timeout)
        except TimeoutError:
            raise AgentError(
                f"Waited {timeout:g} s for {what}, in vain.", error_class="Timeout"
            ) from None
