"""The `nix` command: found, spoken to, bounded."""

from __future__ import annotations

import grp
import json
import os
import platform
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import MissingProgramError, SettingsError
from pytest_nixvm.flake import process
from pytest_nixvm.flake.messages import Log, Watcher
from pytest_nixvm.flake.words import near

# Ours, or the user's in /etc, decide nothing else: --accept-flake-config is never passed, because
# with it a flake may name substituters and post-build hooks without anybody being asked.
FEATURES = ("--extra-experimental-features", "nix-command flakes")

# Where an installer puts nix, for a pytest whose PATH lacks it (a cron job, an editor).
_PROFILES = (
    "/run/current-system/sw/bin",
    "/nix/var/nix/profiles/default/bin",
    "~/.nix-profile/bin",
    "~/.local/state/nix/profile/bin",
)

_OLDEST = (2, 8)

_HOW_TO_INSTALL = (
    "Install it with `apt-get install nix-bin` (Debian, Ubuntu), your distribution's package, or "
    "from https://nixos.org/download."
)

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "powerpc64le"}


class NixFailure(Exception):
    """A nix call that failed, or did not end in time; users get a FlakeError made of it."""

    def __init__(self, log: Log, *, timeout: float | None = None) -> None:
        super().__init__(log.error.text)
        self.log = log
        self.timeout = timeout  # seconds, if that was the reason


@dataclass(frozen=True)
class Answer:
    """What a call printed, and what nix warned of."""

    value: Any
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Nix:
    """The nix that is installed here.

    `notes` are sentences for the report header: what is passed to nix because of how it is set up.
    """

    program: Path
    version: str
    notes: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    offline: bool = False
    config: str = ""  # appended to NIX_CONFIG

    @classmethod
    def find(cls, *, options: Sequence[tuple[str, str]] = (), offline: bool = False) -> Nix:
        """Look for nix in PATH and where installers put it.

        `options` are passed on as `--option NAME VALUE`, after ours, so that they win. `offline`
        has nix use what is already here, without asking the network.

        Raises:
            MissingProgramError: there is none, it does not run, or it is too old for flakes.
        """
        program = _which()
        if program is None:
            raise MissingProgramError(
                "nix was not found, neither in PATH nor in its usual places. " + _HOW_TO_INSTALL
            )
        nix = cls(program, _version(program), (), tuple(options), offline)
        notes: list[str] = []
        config = ""
        # Nix wants build users only when run as root.
        lacks_users = os.geteuid() == 0 and not _has_members("nixbld")
        if lacks_users or nix.options:
            settings = _settings(nix)
            group = settings.get("build-users-group", "")
            automatic = settings.get("auto-allocate-uids") == "true"
            if lacks_users and group and not automatic and not _has_members(group):
                config = "build-users-group ="
                notes.append(
                    f"nix is not set up for build users here (group {group} has no members): "
                    "it builds as root, with an empty build-users-group"
                )
            for name, _ in nix.options:
                if settings and name.removeprefix("extra-") not in settings:
                    guess = near(name, list(settings))
                    notes.append(f"nix {nix.version} lists no option {name}{guess}".rstrip("."))
        return replace(nix, notes=tuple(notes), config=config)

    @property
    def system(self) -> str:
        """The platform machines must be for to run here, as nix names it: `x86_64-linux`."""
        for name, value in reversed(self.options):
            if name == "system":
                return value
        machine = platform.machine()
        return f"{_MACHINES.get(machine, machine)}-{platform.system().lower()}"

    @property
    def store_program(self) -> Path:
        """The `nix-store` that belongs to it."""
        program = self.program.parent / "nix-store"
        return program if program.exists() else Path(shutil.which("nix-store") or program)

    @property
    def pure(self) -> bool:
        """Whether an evaluation can only see what is given to it."""
        config = os.environ.get("NIX_CONFIG", "")
        unlocked = any(name == "pure-eval" and value != "true" for name, value in self.options)
        return not unlocked and not re.search(r"^\s*pure-eval\s*=\s*false", config, re.MULTILINE)

    @cached_property
    def identity(self) -> list[object]:
        """All about this nix that may change what an evaluation gives, as JSON data."""
        real = self.program.resolve()
        stat = real.stat()
        names = ("NIX_REMOTE", "NIX_STORE", "NIX_STORE_DIR", "NIX_STATE_DIR", "NIX_CONFIG")
        return [
            str(real),
            stat.st_size,
            stat.st_mtime_ns,
            self.version,
            self.system,
            [list(option) for option in self.options],
            [os.environ.get(name) for name in names],
            _configuration_files(),
        ]

    def evaluate(
        self,
        installable: str,
        apply: str,
        *,
        overrides: Sequence[tuple[str, str]] = (),
        timeout: float,
        watch: Watcher | None = None,
        write: Callable[[str], None] | None = None,
    ) -> Answer:
        """Return `apply` (a Nix function) of a flake's attribute, as JSON data.

        Raises NixFailure. Derivations that are part of the answer are in the store afterwards.
        """
        flags = ("--json", "--apply", apply, "--option", "eval-cache", "false")
        return self._json(
            ["eval", installable, *flags], overrides, timeout=timeout, watch=watch, write=write
        )

    def metadata(
        self,
        url: str,
        *,
        overrides: Sequence[tuple[str, str]] = (),
        timeout: float,
        watch: Watcher | None = None,
    ) -> Answer:
        """Return `nix flake metadata --json`: the locked URL and the graph of inputs."""
        return self._json(
            ["flake", "metadata", url, "--json"], overrides, timeout=timeout, watch=watch
        )

    def path_info(self, path: Path, *, timeout: float) -> Any:
        """Return `nix path-info --json --recursive`: a store path with all that it needs.

        Its form depends on nix's version. Raises NixFailure.
        """
        return self._json(
            ["path-info", str(path), "--json", "--recursive"], (), timeout=timeout
        ).value

    def realise(
        self,
        derivation: str,
        output: str,
        root: Path,
        *,
        timeout: float,
        watch: Watcher | None = None,
        write: Callable[[str], None] | None = None,
    ) -> None:
        """Build one output of a derivation, or fetch it; `root` keeps it from being collected.

        `nix-store --realise`, since `nix build` wants `X.drv^out` from 2.15 on and does not know
        it in 2.8. `derivation` may also be an output path that is there; then only the root is
        made. Raises NixFailure.
        """
        what = f"{derivation}!{output}" if output else derivation
        argv = [str(self.store_program), "--realise", what, "--add-root", str(root)]
        if self.offline:
            argv += ["--option", "substitute", "false"]
        # On SIGTERM nix stops its builders, on SIGKILL what they started would stay behind.
        self._run(argv, timeout=timeout, watch=watch, write=write, stop=signal.SIGTERM)

    def _json(
        self,
        arguments: Sequence[str],
        overrides: Sequence[tuple[str, str]],
        *,
        timeout: float,
        watch: Watcher | None = None,
        write: Callable[[str], None] | None = None,
    ) -> Answer:
        argv = [str(self.program), *FEATURES, *arguments, "--no-write-lock-file"]
        for name, url in overrides:
            argv += ["--override-input", name, url]
        # An unreachable host is told in seconds; nix would try for minutes (curl's 300 s, 5 times).
        argv += ["--option", "connect-timeout", "5", "--option", "download-attempts", "2"]
        if self.offline:
            argv.append("--offline")
        stdout, log = self._run(argv, timeout=timeout, watch=watch, write=write)
        try:
            return Answer(json.loads(stdout), tuple(log.warnings))
        except ValueError:
            log.other.append(f"nix printed no JSON: {stdout[:200].decode(errors='replace')}")
            raise NixFailure(log) from None

    def _run(
        self,
        argv: list[str],
        *,
        timeout: float,
        watch: Watcher | None = None,
        write: Callable[[str], None] | None = None,
        stop: signal.Signals = signal.SIGKILL,  # an evaluation may be deaf to SIGTERM
    ) -> tuple[bytes, Log]:
        argv += ["--log-format", "internal-json"]
        for name, value in self.options:
            argv += ["--option", name, value]
        log = Log(watch, write)
        try:
            ended = process.run(
                argv,
                timeout=timeout,
                env=self.environment(),
                cwd=Path("/"),
                on_line=log.feed,
                stop=stop,
            )
        except process.ProgramTimeoutError:
            raise NixFailure(log, timeout=timeout) from None
        except OSError as error:
            raise MissingProgramError(f"{argv[0]} can't be started: {error.strerror}.") from error
        self._check_options(log)
        if ended.returncode != 0:
            raise NixFailure(log)
        return ended.stdout, log

    def _check_options(self, log: Log) -> None:
        """Nix only warns of an option it does not know, and names a bad value late."""
        for text in (*log.warnings, *(error.text for error in log.errors)):
            found = re.search(r"unknown setting '([^']+)'|setting '([^']+)' has invalid", text)
            name = (found[1] or found[2]) if found else None
            for option, value in self.options:
                if option == name:
                    raise SettingsError(f"--nixvm-nix-option {option} {value}: nix says: {text}.")

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the variables for a nix command: this process's, what nix needs here, `extra`."""
        more = dict(extra or {})
        if self.config:
            more["NIX_CONFIG"] = f"{os.environ.get('NIX_CONFIG', '')}\n{self.config}\n"
        return process.environment(more)


def _which() -> Path | None:
    found = shutil.which("nix")
    if found:
        return Path(found).absolute()
    for folder in _PROFILES:
        candidate = Path(folder).expanduser() / "nix"
        if os.access(candidate, os.X_OK):
            return candidate
    return None


def _ask(argv: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a nix command that reads its own settings and nothing else."""
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            env=process.environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MissingProgramError(
            f"{argv[0]} does not answer within 30 s; check this nix by hand."
        ) from None
    except OSError as error:
        raise MissingProgramError(f"{argv[0]} can't be started: {error.strerror}.") from error


def _version(program: Path) -> str:
    answer = _ask([program, "--version"])
    version = answer.stdout.strip().rpartition(" ")[2]
    if answer.returncode != 0 or not version:
        said = answer.stderr.strip() or f"exit status {answer.returncode}"
        raise MissingProgramError(f"`{program} --version` failed: {said}")
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise MissingProgramError(
            f"{program} is Nix {version}; flakes as used here need {oldest} or newer."
        )
    return version


def _has_members(group: str) -> bool:
    try:
        return bool(grp.getgrnam(group).gr_mem)
    except KeyError:
        return False


def _settings(nix: Nix) -> dict[str, str]:
    """Return what nix itself goes by: nix.conf, NIX_CONFIG, defaults and our options together."""
    options = [word for option in nix.options for word in ("--option", *option)]
    for command in (["show-config"], ["config", "show"]):  # up to 2.19, and from 2.20 on
        answer = _ask([nix.program, *FEATURES, *command, *options])
        if answer.returncode == 0:
            pairs = (line.partition(" =") for line in answer.stdout.splitlines())
            return {name: value.strip() for name, equals, value in pairs if equals}
    return {}


def _configuration_files() -> list[list[str]]:
    """Return the nix.conf files that are read, with their text and what they include."""
    folders = [Path(os.environ.get("NIX_CONF_DIR", "/etc/nix"))]
    user = os.environ.get("NIX_USER_CONF_FILES")
    if user is not None:
        files = [Path(name) for name in user.split(":") if name]
    else:
        home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
        search = [home, *os.environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")]
        files = [Path(name).expanduser() / "nix/nix.conf" for name in search if name]
    seen: dict[Path, str] = {}
    todo = [folders[0] / "nix.conf", *files]
    while todo and len(seen) < 100:
        path = todo.pop()
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        if path not in seen:
            seen[path] = text
            included = re.findall(r"^\s*!?include\s+(\S+)", text, re.MULTILINE)
            todo += [path.parent / name for name in included]
    return sorted([str(path), text] for path, text in seen.items())
