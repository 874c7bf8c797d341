"""SSH into the guest: what a person would do, with a key of this session and a pinned host key."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import paramiko

from pytest_nixvm.errors import (
    AgentError,
    CommandTimeoutError,
    MachineError,
    MachineGoneError,
    SshError,
    tail,
)
from pytest_nixvm.guest import files, reap
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.keys import KeyPair
from pytest_nixvm.guest.result import Command, CommandResult, display
from pytest_nixvm.guest.ssh_run import WINDOW, Collected, Streams, make_transport, remote_line
from pytest_nixvm.guest.sshd import SshAccess, explain
from pytest_nixvm.wait import Deadline

LOGIN_TIMEOUT = 20.0
"""Seconds for the connection, sshd's banner, the log-in and a channel, each."""

_LOOPBACK = "127.0.0.1"
_TROUBLE = (paramiko.SSHException, EOFError, OSError)


class Ssh:
    """One SSH connection to a VM, shared by all threads, opened when it is first needed.

    ssh.run(["systemctl", "is-active", "sshd"]).stdout
    ssh.run("cat > note", stdin="text", env={"LANG": "C"}, check=True)
    ssh.put("site.conf", "/tmp/site.conf")
    ssh.client                              # the connected paramiko.SSHClient
    print(ssh.command_line)                 # what a person can paste

    It makes one complete log-in and keeps it, because sshd since OpenSSH 9.8 locks out who connects
    and does not authenticate (PerSourcePenalties in sshd_config(5)); after a reboot it logs in
    again. Only the session's key is offered, and only the machine's own host keys are accepted. All
    times are in seconds.
    """

    def __init__(
        self,
        *,
        access: SshAccess,
        keys: KeyPair,
        port: int,
        directory: Path,
        agent: Agent | None = None,
        host: str = _LOOPBACK,
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.user = access.user
        self.host = host
        self.port = port
        self.access = access
        self._keys = keys
        self._directory = directory
        self._agent = agent
        self._client: paramiko.SSHClient | None = None
        self._lock = threading.Lock()
        self._fault: MachineError | None = None
        self._watched = watched  # around each call: raises what has become of the VM instead
        # One session is kept free for killing what takes too long.
        self._sessions = threading.BoundedSemaphore(max(1, min(access.max_sessions, 10) - 1))

    # --- connection ----------------------------------------------------------------------------

    @property
    def client(self) -> paramiko.SSHClient:
        """The connected paramiko client. Raises `SshError` when there is no connection."""
        with self._guarded(), self._lock:
            return self._connected()

    def close(self) -> None:
        """Hang up. The next use logs in again."""
        with self._lock:
            self._drop()

    def interrupt(self, error: MachineError) -> None:
        """End every call that is under way, and every later one, with `error`."""
        self._fault = error
        client = self._client
        if client is not None:
            client.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Raise what `interrupt` was given instead of what came of it."""
        if self._fault is not None:
            raise self._fault.again()
        with self._watched():
            try:
                yield
            except MachineError:
                if self._fault is not None:
                    raise self._fault.again() from None
                raise

    @property
    def command_line(self) -> str:
        """The command that opens the same log-in in a person's terminal."""
        known = self._directory / f"known_hosts-{self.port}"
        name = f"[{self.host}]:{self.port}"
        known.write_text("".join(f"{name} {line}\n" for line in self.access.host_keys))
        options = {
            "UserKnownHostsFile": known,
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "IdentitiesOnly": "yes",
        }
        argv = ["ssh", "-F", "/dev/null", "-i", str(self._keys.private), "-p", str(self.port)]
        for option, value in options.items():
            argv += ["-o", f"{option}={value}"]
        return shlex.join([*argv, f"{self.user}@{self.host}"])

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connected(self) -> paramiko.SSHClient:
        """Return the client, logging in if there is no connection. The caller holds the lock."""
        if self._client is not None:
            transport = self._client.get_transport()
            if transport is not None and transport.is_active():
                return self._client
            self._drop()
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        name = f"[{self.host}]:{self.port}"
        for line in self.access.host_keys:
            entry = paramiko.hostkeys.HostKeyEntry.from_line(f"{name} {line}")
            if entry is not None and entry.key is not None:
                client.get_host_keys().add(name, entry.key.get_name(), entry.key)
        try:
            client.connect(
                self.host,
                self.port,
                self.user,
                pkey=paramiko.Ed25519Key.from_private_key_file(str(self._keys.private)),
                # Longer than the rest: when this one ends first, paramiko's error is a riddle.
                timeout=LOGIN_TIMEOUT + 5,
                banner_timeout=LOGIN_TIMEOUT,
                auth_timeout=LOGIN_TIMEOUT,
                channel_timeout=LOGIN_TIMEOUT,
                allow_agent=False,
                look_for_keys=False,
                compress=False,
                transport_factory=make_transport,
            )
        except _TROUBLE as error:
            client.close()
            raise self._no_login(error) from error
        connection = client.get_transport()
        if connection is None:
            raise SshError(f"The SSH connection of {self.user} ended at once.")
        # A guest that was reset answers with a reset of the connection, instead of nothing.
        connection.set_keepalive(10)
        self._client = client
        return client

    def _no_login(self, error: Exception) -> SshError:
        guest_port = self.access.port
        text = f"No SSH log-in as {self.user} on port {self.port} (the guest's {guest_port}): "
        if isinstance(error, paramiko.BadHostKeyException):
            text += "the machine's host key is not the one that its agent reported."
        elif isinstance(error, paramiko.AuthenticationException):
            text += "sshd refused the session's key."
        elif "banner" in str(error).lower() or isinstance(error, (EOFError, ConnectionError)):
            # QEMU accepts the connection before the guest does: an open port proves nothing.
            text += f"the port is forwarded, but no sshd answers behind it ({error})."
        else:
            text += f"{error or type(error).__name__}."
        if self._agent is not None:
            with suppress(AgentError, MachineGoneError):
                text += "\n" + explain(self._agent, self.access)
        return SshError(text)

    @contextmanager
    def _session(self, deadline: Deadline) -> Iterator[paramiko.Channel]:
        """Lend a session channel; reconnect once if the connection turns out to be dead."""
        if not self._sessions.acquire(timeout=deadline.remaining()):
            raise SshError(
                f"All SSH sessions of {self.user} were in use for {deadline.seconds:g} s "
                f"(MaxSessions {self.access.max_sessions})."
            )
        try:
            channel = self._open(deadline)
            try:
                yield channel
            finally:
                channel.close()
        finally:
            self._sessions.release()

    def _open(self, deadline: Deadline) -> paramiko.Channel:
        patience = Deadline(min(5.0, deadline.seconds))
        broken = False
        while True:
            with self._lock:
                client = self._connected()
            transport = client.get_transport()
            try:
                if transport is None:
                    raise paramiko.SSHException("the connection is closed")
                seconds = max(1.0, deadline.remaining(LOGIN_TIMEOUT))
                return transport.open_session(window_size=WINDOW, timeout=seconds)
            except _TROUBLE as error:
                if transport is not None and transport.is_active() and not _timed_out(error):
                    # Refused, by a connection that lives: sshd counts a session that has ended
                    # until it next tidies up, which can be after it reads our next request.
                    # (Of two refusals at once paramiko hands out the reason to one thread only.)
                    if patience.expired:
                        raise SshError(
                            f"sshd opens no session for {self.user}: {error}."
                        ) from error
                    time.sleep(0.01)
                    continue
                with self._lock:
                    if self._client is client:
                        self._drop()
                if broken:
                    raise SshError(f"The SSH connection of {self.user} broke: {error}.") from error
                broken = True

    # --- commands ------------------------------------------------------------------------------

    def run(
        self,
        command: Command,
        *,
        timeout: float = 60,
        stdin: str | bytes | None = None,
        env: Mapping[str, str] | None = None,
        check: bool = False,
    ) -> CommandResult:
        """Run a command as the logged-in user and wait for its end and the end of its output.

        A string is run by the user's log-in shell; a sequence is an argv that is handed over as it
        is. `env` is added to the command's environment (through the shell, because sshd accepts few
        variables by itself).

        Raises `CommandTimeoutError` after `timeout` seconds, when the command and what it started
        has been killed; `SshError` when there is no connection or it breaks (its text has what had
        arrived); `CommandFailedError` with `check` and an exit status other than 0.
        """
        with self._guarded():
            result = self._run(command, timeout, stdin, env or {})
        return result.check() if check else result

    def _run(
        self,
        command: Command,
        timeout: float,
        stdin: str | bytes | BinaryIO | None,
        env: Mapping[str, str],
        stdout: BinaryIO | None = None,
    ) -> CommandResult:
        began = time.monotonic()
        deadline = Deadline(timeout)
        mark = reap.new_mark()
        line = remote_line(command, {**env, reap.MARK: mark})
        data = stdin.encode() if isinstance(stdin, str) else stdin
        with self._session(deadline) as channel:
            try:
                channel.settimeout(max(1.0, deadline.remaining(LOGIN_TIMEOUT)))
                channel.exec_command(line)
            except _TROUBLE as error:
                raise SshError(f"`{display(command)}` could not be started: {error}.") from error
            streams = Streams(channel, data, stdout)
            try:
                ended = streams.wait(deadline)
                if not ended:
                    status = channel.exit_status if channel.exit_status_ready() else None
                    killed = self._kill(mark)
                    streams.wait(Deadline(2 if killed else 0))  # for what was on its way
            finally:
                got = streams.finish()
            if not ended:
                raise self._timeout(command, replace(got, status=status), timeout, killed)
        if got.status is None:
            raise self._lost(command, got)
        duration = time.monotonic() - began
        return CommandResult(command, got.status, got.stdout, got.stderr, duration, channel="ssh")

    def _kill(self, mark: str) -> bool:
        """Kill what has `mark`, over a session of its own; return whether nothing is left."""
        deadline = Deadline(15)
        with suppress(SshError, *_TROUBLE):
            channel = self._open(deadline)
            try:
                channel.exec_command(shlex.join(reap.argv(mark)))
                streams = Streams(channel)
                streams.wait(deadline)
                return streams.finish().status == 0
            finally:
                channel.close()
        return False

    def _timeout(
        self, command: Command, got: Collected, seconds: float, killed: bool
    ) -> CommandTimeoutError:
        text = f"`{display(command)}` did not end within {seconds:g} s over SSH. "
        if got.status is not None:
            text += (
                f"It had ended itself with exit status {got.status}, but something that it had "
                "started kept its output open (redirect that). "
            )
        text += "It was killed with all that it had started." if killed else "It can't be killed."
        return CommandTimeoutError(
            text,
            command=command,
            returncode=got.status,
            stdout=got.stdout.decode("utf-8", "replace"),
            stderr=got.stderr.decode("utf-8", "replace"),
        )

    def _lost(self, command: Command, got: Collected) -> SshError:
        text = f"The SSH connection of {self.user} broke during `{display(command)}`."
        for name, stream in (("stdout", got.stdout), ("stderr", got.stderr)):
            if stream.strip():
                text += f"\n{name} until then:\n" + tail(stream.decode("utf-8", "replace"))
        return SshError(text)

    # --- files ---------------------------------------------------------------------------------

    def stream(
        self,
        argv: Sequence[str],
        *,
        stdin: BinaryIO | None,
        stdout: BinaryIO | None,
        timeout: float,
    ) -> CommandResult:
        """Run an argv with files as its stdin and stdout, of any size. Raises as `run`."""
        with self._guarded():
            return self._run(list(argv), timeout, stdin, {}, stdout)

    def put(self, local: str | Path, remote: str, timeout: float = 600) -> None:
        """Copy a file or a tree to `remote` in the guest, as `cp -r` does.

        Modes, times and links are kept; the files belong to the user. Raises `OSError` if `local`
        can't be read, else `ChannelError`.
        """
        files.put(self.stream, Path(local), remote, timeout)

    def get(self, remote: str, local: str | Path, timeout: float = 600) -> None:
        """Copy a file or a tree from the guest to the path `local`.

        As `put`. Raises `OSError` if `local` can't be written, else `ChannelError`.
        """
        files.get(self.stream, remote, Path(local), timeout)


def _timed_out(error: Exception) -> bool:
    """Whether paramiko got no answer: the state of a connection from before a reboot."""
    return isinstance(error, TimeoutError) or "timeout" in str(error).lower()
