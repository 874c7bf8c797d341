"""What is open to one VM from its power-on to its end: the channels, and the watch over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_nixvm.errors import AgentError, MachineError, NoShellError, QmpError, ShellError
from pytest_nixvm.guest import sshd
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.console import Console
from pytest_nixvm.guest.health import Health
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.guest.serial import Serial
from pytest_nixvm.guest.shell import Shell
from pytest_nixvm.guest.sshd import SshAccess, SshRefusal, install_key, remove_key
from pytest_nixvm.guest.waking import Clock
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.running import Qemu

if TYPE_CHECKING:
    from pytest_nixvm.guest.keys import KeyPair
    from pytest_nixvm.guest.ssh import Ssh

# runuser keeps root's environment, and with --login it would take no argv.
_AS_USER = (
    'USER=$1 LOGNAME=$1 HOME=$(getent passwd "$1" | cut -d: -f6); '
    'export USER LOGNAME HOME; shift; exec "$@"'
)

SECOND_OPINION = 5.0
"""Seconds that a shell has for an answer when the agent has given none."""


class Channels:
    """The channels of a running VM. `connect` first, then boot, then `watch`."""

    def __init__(self, qemu: Qemu, io: IoThread, keys: Callable[[], KeyPair]) -> None:
        self.qemu = qemu
        self.console = Console(io, qemu.console_socket, qemu.console_log)
        self.agent = Agent(io, qemu.agent_socket)
        self.shell = Shell(qemu.monitor, qemu.ports, self.agent)
        self.serial = Serial(self.console)
        self.health = Health(io, qemu, self.console, self.agent, self._interrupt)
        self.health.second_opinion = lambda: self.shell.answers(SECOND_OPINION)
        self.clock = Clock(self.agent, None)
        self.booted = False
        self._tried_shell = False
        self.no_shell = ""  # why commands go another way than through the shell
        self._keys = keys
        self._lock = threading.RLock()
        self._ssh: dict[str | None, Ssh] = {}
        self._let_in: list[SshAccess] = []  # where the session's key was put

    def connect(self, timeout: float) -> None:
        """Connect to QEMU's sockets, before the guest's first output."""
        self.console.connect(timeout)

    def remembered(self) -> dict[str, Any]:
        """Return what `adopt` needs in a clone of this machine, which is about to be frozen.

        The session's key is taken out of it again. Raises as the channels do.
        """
        with self._lock:
            self.forget_keys()
        self.hang_up()
        return {"shell": self.shell.remembered() if self.has_shell() else None}

    def adopt(self, remembered: Mapping[str, Any], timeout: float) -> None:
        """Connect to a machine that is about to be loaded as it was frozen."""
        self.connect(timeout)
        self.agent.connect(timeout)
        if remembered["shell"] is not None:
            self.shell.adopt(remembered["shell"])
            self._tried_shell = True
            run = partial(self.shell.run, timeout=timeout)
        else:
            run = None
        self.clock = Clock(self.agent, run)

    def watch(self) -> None:
        """Begin to watch over the calls: the guest has booted."""
        self.health.open()
        self.booted = True

    def close(self) -> None:
        """Close all of it. Never raises."""
        self.health.close()
        self.hang_up()
        self.shell.close()
        self.agent.close()
        self.console.close()

    def hang_up(self) -> None:
        """Close what does not survive a reboot."""
        with self._lock:
            for ssh in self._ssh.values():
                ssh.close()
            self._ssh.clear()

    def revive(self) -> None:
        """Take calls again: the guest is booting anew, on the same sockets."""
        self.hang_up()
        self._tried_shell = False
        self.agent.revive()
        self.shell.revive()
        self.console.revive()

    def _interrupt(self, error: MachineError) -> None:
        self.agent.interrupt(error)
        self.shell.interrupt(error)
        self.console.interrupt(error)
        for ssh in tuple(self._ssh.values()):
            ssh.interrupt(error)

    # --- SSH -----------------------------------------------------------------------------------

    def ssh_as(self, user: str | None, memo: dict[Any, Any] | None = None) -> Ssh:
        """SSH as `user`; None is whoever may log in, root first. One connection for each user.

        `memo` keeps who may log in, for machines that are known to be alike in that.
        """
        with self._lock:
            if user not in self._ssh:
                # Not sooner: most runs need no SSH, and its import takes a tenth of a second.
                from pytest_nixvm.guest.ssh import Ssh

                found = None if memo is None else memo.get(("ssh", user))
                if found is None:
                    found = sshd.access(self.agent, user=user)
                if isinstance(found, SshRefusal):
                    raise found.error(self.qemu.spec.name)
                if memo is not None:
                    memo["ssh", user] = found
                install_key(self.agent, found, self._keys().public_line)
                if found not in self._let_in:
                    self._let_in.append(found)
                self._ssh[user] = Ssh(
                    agent=self.agent,
                    access=found,
                    keys=self._keys(),
                    port=self.qemu.forward(found.port),
                    directory=self.qemu.spec.sockets,
                    watched=self.health.call,
                )
            return self._ssh[user]

    def forget_keys(self) -> None:
        """Take the session's key out of the guest again, wherever it was put.

        Where one can't be taken out, the others are all the same. Raises `MachineError` then.
        """
        trouble: MachineError | None = None
        for access in self._let_in:  # somebody may be let in meanwhile
            try:
                remove_key(self.agent, access, self._keys().public_line)
            except MachineError as error:
                trouble = trouble or error
        if trouble is not None:
            raise trouble

    # --- commands ------------------------------------------------------------------------------

    def run(
        self,
        command: Command,
        *,
        timeout: float,
        stdin: bytes | None,
        env: Mapping[str, str] | None,
        cwd: str | None,
        user: str | None,
    ) -> CommandResult:
        """Run a command on the best channel there is: the shell, else the agent, else SSH.

        Raises as `Machine.run`.
        """
        if self.has_shell():
            try:
                return self.shell.run(
                    command, timeout=timeout, stdin=stdin, env=env, cwd=cwd, user=user
                )
            except (AgentError, NoShellError) as error:  # the command has not begun
                self.no_shell = str(error)
        try:
            self.agent.ping(timeout=5)
            shell, over = self.agent.shell_argv, self.agent.exec
        except AgentError as error:
            self.no_shell += f"\n{error}"
            # One that is open already: a new one would have to ask the agent.
            opened = [ssh for ssh in self._ssh.values() if ssh.user == "root"]
            shell, over = _sh, (opened[0] if opened else self.ssh_as("root")).run
        argv = shell(command) if isinstance(command, str) else list(command)
        if cwd is not None:
            argv = ["env", f"--chdir={cwd}", *argv]
        if user is not None:
            argv = ["runuser", "-u", user, "--", "/bin/sh", "-c", _AS_USER, "sh", user, *argv]
        result = over(argv, stdin=stdin, env=env, timeout=timeout)
        return replace(result, command=command)

    def has_shell(self) -> bool:
        """Whether commands go through the shell; tried once for each boot."""
        with self._lock:
            if self._tried_shell:
                return not self.no_shell
            self._tried_shell, self.no_shell = True, ""
            try:
                self.shell.prepare()
            except (ShellError, AgentError, QmpError) as error:
                self.no_shell = str(error)
            return not self.no_shell


def _sh(command: str) -> list[str]:
    return ["/bin/sh", "-c", command]
