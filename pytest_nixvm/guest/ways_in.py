"""The ways into a machine, and which of them a switch has closed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from pytest_nixvm.errors import (
    ChannelError,
    CommandTimeoutError,
    GuestFaultError,
    MachineError,
    MachineGoneError,
)
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.result import Command, CommandResult

if TYPE_CHECKING:
    from pytest_nixvm.guest.ssh import Ssh


SSHD_COMES = 3.0
"""Seconds that an sshd which was just started gets before it is tried again."""

_COMMAND_TIMEOUT = 60.0


class Reachable(Protocol):
    """The part of a machine that is looked at."""

    @property
    def agent(self) -> Agent:
        """The guest agent."""

    @property
    def ssh(self) -> Ssh:
        """SSH as whoever the machine lets in. Raises `SshError`."""

    @property
    def commands_note(self) -> str:
        """Why commands take another way than the shell."""

    def run(self, command: Command, *, timeout: float = 900) -> CommandResult:
        """Run a command on whatever channel there is."""

    def reconnect(self, timeout: float = 60) -> None:
        """Open the channels anew. Raises `ChannelError`."""


class WaysIn:
    """The guest agent, the shell and SSH of one machine."""

    def __init__(self, vm: Reachable) -> None:
        self._vm = vm

    def working(self) -> dict[str, str]:
        """Return the ways that work, and as which user: "agent", "shell", "ssh"."""
        ways = {}
        try:
            self._vm.agent.ping()
            ways["agent"] = "root"
        except ChannelError:
            pass
        if self._vm.run(["true"], timeout=_COMMAND_TIMEOUT).channel == "shell":
            ways["shell"] = "root"
        user, _ = self._log_in()
        if user:
            ways["ssh"] = user
        return ways

    def lost(self, before: dict[str, str]) -> tuple[tuple[str, ...], list[str]]:
        """Open all anew; return what does not work any more, and what works in another way.

        `before` is what `working` has returned. Each is "WAY: why".
        """
        said: list[str] = []
        remarks: list[str] = []
        answers = True
        try:
            self._vm.reconnect()
        except ChannelError as error:
            answers = False
            if "agent" in before:
                said.append(f"agent: {error}")
        if "ssh" in before:
            user, why = self._log_in()
            if not user:
                said.append(f"ssh: {before['ssh']} could log in, now nobody can. {why}")
            elif user != before["ssh"]:
                remarks.append(f"SSH: {before['ssh']} could log in before, now it is {user}")
        if "shell" in before and answers:
            try:
                if self._vm.run(["true"], timeout=_COMMAND_TIMEOUT).channel != "shell":
                    said.append(f"shell: {self._vm.commands_note}")
            except (ChannelError, CommandTimeoutError) as error:
                said.append(f"shell: {error}")
        return tuple(said), remarks

    def _log_in(self) -> tuple[str, str]:
        """Log in anew, over SSH. Return the user, or "" and why not."""
        for attempt in (1, 2):
            try:
                ssh = self._vm.ssh
                ssh.close()
                _ = ssh.client
            except (GuestFaultError, MachineGoneError):
                raise
            except MachineError as error:
                # One that was just started may not listen yet. Refused is refused.
                if attempt == 2 or "no sshd answers" not in str(error):
                    return "", str(error)
                time.sleep(SSHD_COMES)
            else:
                return ssh.user, ""
        return "", ""
