"""The guest agent's wire: JSON lines on a unix socket, requests and answers matched by `id`.

Protocol: https://www.qemu.org/docs/master/interop/qemu-ga-ref.html. It looks like QMP, but an own
client is smaller and safer than qemu.qmp here: the agent reports a line that it could not
parse with an error that has no `id` (a reboot can cut a line in half, and the 0xFF that clears the
agent's parser causes one as well), and qemu.qmp ends the session on such an error.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import AgentError, MachineError, MachineGoneError

LONGEST_LINE = 128 * 1024 * 1024
"""Bytes. The longest honest answer: twice 16 MiB of `guest-exec` output in base64, 43 MiB."""


class AgentClient(asyncio.Protocol):
    """One connection to the agent's socket. Lives on the event loop; not for other threads.

    client = await AgentClient.open(Path("/run/…/agent"))
    version = (await client.call("guest-info", {}, timeout=5))["version"]
    client.close()
    """

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._parts: list[bytes] = []
        self._size = 0
        self._can_write = asyncio.Event()
        self._can_write.set()

    @classmethod
    async def open(cls, socket: Path) -> AgentClient:
        """Connect to the socket. Raises `OSError`; QEMU accepts before the guest has booted."""
        loop = asyncio.get_running_loop()
        _, client = await loop.create_unix_connection(cls, str(socket))
        return client

    async def call(
        self, command: str, arguments: Mapping[str, object] | None, *, timeout: float
    ) -> Any:
        """Send one command and return what the agent answers.

        An answer that comes after `timeout` seconds belongs to nobody and is dropped.
        Raises `AgentError` (the agent's own error, or no answer) and `MachineGoneError`.
        """
        number = f"nixvm-{next(self._numbers)}"
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(timeout):
                await self._send(command, arguments, number)
                message = await answer
        except TimeoutError:
            raise AgentError(
                f"The guest agent did not answer {command} within {timeout:g} s.",
                error_class="Timeout",
            ) from None
        finally:
            del self._waiting[number]
        error = message.get("error")
        if error is not None:
            description = str(error.get("desc", ""))
            raise AgentError(
                f"The guest agent refused {command}: {description}",
                error_class=str(error.get("class", "")),
                description=description,
            )
        return message.get("return")

    async def send_only(self, command: str, arguments: Mapping[str, object]) -> None:
        """Send a command that is not answered when it succeeds (`guest-shutdown`)."""
        await self._send(command, arguments, f"nixvm-{next(self._numbers)}")

    async def clear_parser(self) -> None:
        """Make the agent forget half a command that an earlier connection or boot has left.

        0xFF never occurs in JSON; the agent answers it with an error without `id`: dropped.
        """
        await self._write(b"\xff")

    async def _send(
        self, command: str, arguments: Mapping[str, object] | None, number: str
    ) -> None:
        request: dict[str, object] = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = dict(arguments)
        await self._write(json.dumps(request).encode() + b"\n")

    async def _write(self, data: bytes) -> None:
        if self.closed or self._transport is None:
            raise gone()
        await self._can_write.wait()
        self._transport.write(data)

    def close(self) -> None:
        """Hang up. Calls that are under way end with `MachineGoneError`."""
        if self._transport is not None:
            self._transport.abort()
        self._end()

    def fail(self, error: MachineError) -> None:
        """End the calls that are under way with `error`."""
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error.again())

    def _end(self) -> None:
        self.closed = True
        self._can_write.set()
        self.fail(gone())

    # --- asyncio.Protocol --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio)."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Fail what is under way: QEMU has closed the socket (asyncio)."""
        self._end()

    def pause_writing(self) -> None:
        """Hold back: the guest does not read at the moment (asyncio)."""
        self._can_write.clear()

    def resume_writing(self) -> None:
        """Go on (asyncio)."""
        self._can_write.set()

    def data_received(self, data: bytes) -> None:
        """Split into lines and hand each to whoever waits for it (asyncio)."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._on_line(b"".join([*self._parts, line]))
            self._parts.clear()
            self._size = 0
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
            if self._size > LONGEST_LINE:
                self._parts.clear()
                self._size = 0

    def _on_line(self, line: bytes) -> None:
        # What precedes the first brace is 0xFF, or the end of a line that a reboot has cut.
        start = line.find(b"{")
        message: object = None
        with suppress(ValueError):
            message = json.loads(line[start:]) if start >= 0 else None
        if not isinstance(message, dict):
            return
        answer = self._waiting.get(str(message.get("id")))
        if answer is not None and not answer.done():
            answer.set_result(message)


def gone() -> MachineGoneError:
    """Return the error of a connection that QEMU has closed."""
    return MachineGoneError("The connection to the guest agent is closed: QEMU has ended.")
