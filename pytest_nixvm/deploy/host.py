"""The host that is deployed to, over the user's own OpenSSH."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pytest_nixvm.errors import MachineError, MissingProgramError, SettingsError, SshError

REMOTE = Path(__file__).with_name("remote.sh")

SCRIPT = "/run/nixvm-deploy.sh"
"""Where remote.sh is on the host."""

_SSH_FAILED = 255  # ssh(1): also where the command itself ends with that, which ours don't
_BUSY = 3
_NOT_ROOT = 77
_CONNECT_TIMEOUT = 10
_CALL_TIMEOUT = 60.0

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class NoEndError(SshError):
    """What was run on the host did not end in time."""


class DeployError(MachineError):
    """The host could not be deployed to, or is not fit for it; the text says what runs there."""


@dataclass(frozen=True)
class Target:
    """Where to: `ssh://root@host:2222`. A port of None is what ssh's configuration says."""

    user: str
    host: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a URL. Raises `SettingsError` for what is none."""
        wrong = f"--to {text}: should be ssh://root@HOST or ssh://root@HOST:PORT."
        try:
            url = urlsplit(text)
            port = url.port
        except ValueError:
            raise SettingsError(wrong) from None
        host, user = url.hostname or "", url.username or "root"
        rest = url.path.strip("/") or url.query or url.fragment or url.password
        # Of hostname the case is lost, which a Host line of ssh's configuration may depend on.
        at = url.netloc.lower().rfind(host)
        host = url.netloc[at : at + len(host)] if host else ""
        is_address = ":" in host and re.fullmatch(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?", host)
        if url.scheme != "ssh" or rest or not (is_address or _NAME.fullmatch(host)):
            raise SettingsError(wrong)
        if not _NAME.fullmatch(user):
            raise SettingsError(wrong)
        return cls(user, host, port)

    @property
    def login(self) -> str:
        """As ssh wants it: root@host."""
        return f"{self.user}@{self.host}"

    @property
    def store(self) -> str:
        """The host's store, as nix names it; its port is an option of ssh's."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{self.user}@{host}"

    def __str__(self) -> str:
        return self.store + (f":{self.port}" if self.port else "")


@dataclass(frozen=True)
class Facts:
    """What the host says of itself."""

    values: Mapping[str, str]
    failed: tuple[str, ...]  # units that had not failed before the start

    @classmethod
    def parse(cls, text: str) -> Facts:
        """Read lines of `name=value`; what is no such line comes from a talkative profile."""
        values: dict[str, str] = {}
        failed = []
        for line in text.splitlines():
            name, sign, value = line.partition("=")
            if name == "failed" and sign:
                failed.append(value)
            elif sign:
                values[name] = value
        return cls(values, tuple(failed))

    def without(self, *names: str) -> Facts:
        """Return them without some."""
        kept = {name: value for name, value in self.values.items() if name not in names}
        return Facts(kept, self.failed)

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")


class Host:
    """Runs remote.sh on the host, each time over a connection of its own.

    host = Host(Target.parse("ssh://root@host"), ["IdentityFile=/home/me/key"])
    host.upload()
    host.call("preflight")

    `options` are ssh's, as its `-o` takes them. Questions are never asked: an unknown host key, or
    a log-in that wants a password, is an error in ssh's own words.
    """

    def __init__(
        self, target: Target, options: Sequence[str] = (), *, script: str = SCRIPT
    ) -> None:
        self.target = target
        self._options = tuple(options)
        self._script = script
        program = shutil.which("ssh")
        if program is None:
            raise MissingProgramError("ssh was not found in PATH: install OpenSSH's client.")
        self._program = program

    @property
    def ssh_options(self) -> list[str]:
        """What nix is given as well, in NIX_SSHOPTS."""
        words = []  # of each option ssh takes the first
        for option in ("BatchMode=yes", *self._options, f"ConnectTimeout={_CONNECT_TIMEOUT}"):
            words += ["-o", option]
        if self.target.port is not None:
            words += ["-p", str(self.target.port)]
        return words

    def ssh(
        self, command: str, *, timeout: float = _CALL_TIMEOUT, data: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command on the host; `timeout` in seconds.

        Raises:
            NoEndError: no end in time.
            SshError: no connection.
        """
        argv = [
            self._program,
            "-T",
            # A new connection: that one can be made is what is to be shown.
            *("-o", "ControlMaster=no", "-o", "ControlPath=none"),
            *self.ssh_options,
            *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
            self.target.login,
            command,
        ]
        try:
            ended = subprocess.run(
                argv,
                input=data,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
                start_new_session=True,  # Ctrl-C is for us
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )
        except subprocess.TimeoutExpired:
            raise NoEndError(f"{self.target} did not answer within {timeout:g} s.") from None
        if ended.returncode == _SSH_FAILED:
            said = ended.stderr.strip() or "ssh does not say why"
            if "Host key verification failed" in said:
                said += f"\nLog in once by hand, so that it is known: ssh {self.target}"
            raise SshError(f"No connection to {self.target}: {said}")
        return ended

    def check(self, command: str, *, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a user's command, whatever its end. Raises as `ssh` does.

        255 is ssh's own exit status: where the command ends with it, that is told as 254.
        """
        kept = f"bash -c {shlex.quote(command)}; s=$?; [ $s != {_SSH_FAILED} ] || s=254; exit $s"
        return self.ssh(f"bash -c {shlex.quote(kept)}", timeout=timeout)

    def upload(self) -> None:
        """Put remote.sh on the host. Raises `SshError`, `DeployError`."""
        path = shlex.quote(self._script)
        # Renamed into its place: a deploy that is under way goes on reading the one that it has.
        command = (
            f'test "$(id -u)" = 0 || exit {_NOT_ROOT}; '
            f"umask 077; cat > {path}.$$ && mv -f {path}.$$ {path}"
        )
        text = REMOTE.read_text(encoding="utf-8")
        ended = self.ssh(f"sh -c {shlex.quote(command)}", data=text)
        if ended.returncode == _NOT_ROOT:
            raise DeployError(
                f"{self.target} does not log in as root: a system is switched by root. "
                f"Name it: ssh://root@{self.target.host}."
            )
        if ended.returncode != 0:
            raise DeployError(
                f"{self.target}: {self._script} can't be written there: {ended.stderr.strip()}"
            )

    def run(
        self, *words: str, timeout: float = _CALL_TIMEOUT, data: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a verb of remote.sh, whatever its end. Raises `SshError`."""
        return self.ssh(shlex.join(["bash", self._script, *words]), timeout=timeout, data=data)

    def call(self, *words: str, timeout: float = _CALL_TIMEOUT, data: str = "") -> str:
        """Run a verb of remote.sh and return what it prints. Raises `SshError`, `DeployError`."""
        ended = self.run(*words, timeout=timeout, data=data)
        if ended.returncode == _BUSY:
            raise DeployError(f"{self.target}: {ended.stderr.strip()}; nothing was changed.")
        if ended.returncode != 0:
            said = ended.stderr.strip() or f"exit status {ended.returncode}"
            raise DeployError(f"{self.target}: {words[0]} failed: {said}")
        return ended.stdout

    def facts(self, verb: str = "status", timeout: float = 20.0) -> Facts:
        """Return what `preflight` or `status` prints. Raises as `call` does."""
        return Facts.parse(self.call(verb, timeout=timeout))


def check(facts: Facts, target: Target, machine: str) -> None:
    """Raise `DeployError` where the host can't be deployed to. `machine` is uname's: x86_64."""
    for name, what in (
        ("nixos", "is no NixOS, or has no switch-to-configuration"),
        ("systemd", "has no systemd-run"),
        ("nix", "has no nix: nothing can be copied into its store"),
    ):
        if facts[name] != "yes":
            raise DeployError(f"{target} {what}.")
    if facts["busy"]:
        raise DeployError(f"{target}: another deploy is under way there; nothing was changed.")
    if not facts["current"] or not facts["profile"]:
        raise DeployError(
            f"{target} has no generation to go back to: /nix/var/nix/profiles/system is no system."
        )
    if machine and facts["machine"] and facts["machine"] != machine:
        raise DeployError(f"{target} is {facts['machine']}, the system is for {machine}.")
