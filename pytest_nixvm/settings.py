"""Command line and ini, checked once, as one frozen value.

Each option (see `options`) is `--nixvm-NAME` on the command line and `nixvm_name` in the ini file;
the command line wins. What is wrong with a value is said here, with the place it came from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import platformdirs

from pytest_nixvm.errors import SettingsError
from pytest_nixvm.options import (
    ACCELERATORS,
    DEFAULT_BOOT_TIMEOUT,
    DEFAULT_CACHE_SIZE,
    ISOLATIONS,
    KEEPS,
    NETWORKS,
    OPTIONS,
    SCREENSHOTS,
    Isolation,
    Keep,
    Network,
    Screenshot,
)


@dataclass(frozen=True)
class Settings:
    """What the user asked for, valid. `None` means: as the machine configures it."""

    flake: str | None
    machine: tuple[str, ...]
    override_input: tuple[tuple[str, str], ...]
    nix_option: tuple[tuple[str, str], ...]
    isolation: Isolation
    accel: Literal["auto", "kvm", "tcg"]
    memory: int | None
    cores: int | None
    boot_timeout: float
    network: Network
    keep: Keep
    screenshot: Screenshot
    output: Path | None
    cache: Path
    cache_size: int  # bytes
    offline: bool
    from_: str | None
    check: bool
    check_off: tuple[str, ...]
    changed: str | None
    fidelity: bool
    boot_loader: bool

    @classmethod
    def make(cls, **options: object) -> Settings:
        """Make settings from keyword arguments: the options' names, with underscores.

        What is not given has the command line's default. `from`, which is a word of Python's, may
        be given as `from_`. Raises `SettingsError`.
        """
        options = {name.removesuffix("_"): value for name, value in options.items()}
        names = {option.ini.removeprefix("nixvm_") for option in OPTIONS}
        for name in options:
            if name not in names:
                raise SettingsError(f"There is no setting {name!r}; there are {sorted(names)}.")
        return cls.read(lambda ini: options.get(ini.removeprefix("nixvm_")), lambda _: None)

    @classmethod
    def read(
        cls,
        command_line: Callable[[str], object],
        ini: Callable[[str], object],
        ini_directory: Path | None = None,
    ) -> Settings:
        """Read every option, from the command line first, then from the ini file.

        Both callables take `Option.ini` and return what they have, None or something empty where
        the user said nothing. Paths on the command line start in the current directory, paths in
        the ini file in `ini_directory`. Raises `SettingsError`.
        """
        reader = _Reader(command_line, ini, ini_directory or Path.cwd())
        return cls(
            flake=reader.reference("flake"),
            machine=tuple(reader.words("machine")),
            override_input=reader.references("override-input"),
            nix_option=reader.pairs("nix-option"),
            isolation=cast(Isolation, reader.one_of("isolation", ISOLATIONS, "test")),
            accel=cast(
                'Literal["auto", "kvm", "tcg"]', reader.one_of("accel", ACCELERATORS, "auto")
            ),
            memory=reader.whole("memory"),
            cores=reader.whole("cores"),
            boot_timeout=reader.seconds("boot-timeout", DEFAULT_BOOT_TIMEOUT),
            network=cast(Network, reader.one_of("network", NETWORKS, "isolated")),
            keep=cast(Keep, reader.one_of("keep", KEEPS, "never")),
            screenshot=cast(
                Screenshot, reader.one_of("screenshot", SCREENSHOTS, "only-on-failure")
            ),
            output=reader.path("output"),
            cache=reader.path("cache") or platformdirs.user_cache_path("pytest-nixvm"),
            cache_size=(reader.whole("cache-size") or DEFAULT_CACHE_SIZE) * 2**30,
            offline=reader.yes("offline"),
            from_=reader.revision("from"),
            check=reader.yes("check"),
            check_off=tuple(reader.words("check-off")),
            changed=reader.revision("changed"),
            fidelity=reader.yes("fidelity"),
            boot_loader=reader.yes("boot-loader"),
        )


@dataclass(frozen=True)
class Generations:
    """Which generation runs, and which ones it may be switched to: flake references, absolute."""

    base: str
    candidates: tuple[str, ...]

    @classmethod
    def of(cls, base: str, *candidates: str) -> Generations:
        """Return the same value for the same candidates, in whatever order they are given."""
        return cls(base, tuple(sorted(set(candidates))))


@dataclass(frozen=True)
class MachineRequest:
    """What one test asks of its machine: the `nixvm` marker's arguments over the settings.

    `generations` is for tests of a change: the deployed generation runs, not the flake as it is.
    """

    isolation: Isolation
    memory: int | None
    cores: int | None
    network: Network
    user: str | None = None
    boot_loader: bool = False
    generations: Generations | None = None

    @classmethod
    def read(cls, keywords: dict[str, object], settings: Settings, where: str) -> MachineRequest:
        """Check a marker's keyword arguments; `where` names the test. Raises `SettingsError`."""
        known = ("isolation", "memory", "cores", "network", "user", "boot_loader")
        for name in keywords:
            if name not in known:
                raise SettingsError(
                    f"{where}: the nixvm marker knows no argument {name!r}; "
                    f"it takes {', '.join(known)}."
                )
        place = f"{where}: the nixvm marker's "
        isolation = keywords.get("isolation", settings.isolation)
        network = keywords.get("network", settings.network)
        memory = keywords.get("memory", settings.memory)
        cores = keywords.get("cores", settings.cores)
        user = keywords.get("user")
        if user is not None and not isinstance(user, str):
            raise SettingsError(f"{place}user must be a user's name, not {user!r}.")
        boot_loader = keywords.get("boot_loader", settings.boot_loader)
        if not isinstance(boot_loader, bool):
            raise SettingsError(f"{place}boot_loader must be True or False, not {boot_loader!r}.")
        return cls(
            isolation=cast(Isolation, _one_of(isolation, ISOLATIONS, place + "isolation")),
            memory=None if memory is None else _whole(memory, place + "memory"),
            cores=None if cores is None else _whole(cores, place + "cores"),
            network=cast(Network, _one_of(network, NETWORKS, place + "network")),
            user=user,
            boot_loader=boot_loader,
        )


class _Reader:
    """Takes each option from where it was given, and remembers where that was."""

    def __init__(
        self,
        command_line: Callable[[str], object],
        ini: Callable[[str], object],
        ini_directory: Path,
    ) -> None:
        self._command_line = command_line
        self._ini = ini
        self._ini_directory = ini_directory
        self._options = {option.name: option for option in OPTIONS}

    def _get(self, name: str) -> tuple[object, str]:
        option = self._options[name]
        value = self._command_line(option.ini)
        if value not in (None, [], False):
            return value, option.flag
        return self._ini(option.ini), f"{option.ini} (ini)"

    def _base(self, where: str) -> Path:
        return self._ini_directory if where.endswith("(ini)") else Path.cwd()

    def reference(self, name: str) -> str | None:
        value, where = self._get(name)
        return anchored(str(value), self._base(where)) if value not in (None, "") else None

    def revision(self, name: str) -> str | None:
        """Return a reference, or a revision: a branch may be called as a directory is."""
        value, where = self._get(name)
        if value in (None, ""):
            return None
        base = self._base(where)
        directory = base / str(value).partition("#")[0].partition("?")[0]
        is_flake = (directory / "flake.nix").is_file()
        if not is_flake and not str(value).startswith((".", "~", "path:", "git+file:")):
            return str(value)
        return anchored(str(value), base)

    def references(self, name: str) -> tuple[tuple[str, str], ...]:
        _, where = self._get(name)
        base = self._base(where)
        return tuple((key, anchored(value, base)) for key, value in self.pairs(name))

    def text(self, name: str) -> str | None:
        value, _ = self._get(name)
        return str(value) if value not in (None, "") else None

    def words(self, name: str) -> list[str]:
        value, _ = self._get(name)
        return [str(word) for word in value] if isinstance(value, Sequence) else []

    def pairs(self, name: str) -> tuple[tuple[str, str], ...]:
        value, where = self._get(name)
        pairs = []
        for entry in value if isinstance(value, Sequence) else []:
            # The ini file has one line for each pair: "nixpkgs path:/…", "substituters" (empty).
            words = entry.split(None, 1) if isinstance(entry, str) else [str(w) for w in entry]
            if len(words) == 1 and name == "nix-option":
                words.append("")
            if len(words) != 2:
                raise SettingsError(f"{where}: {entry!r} should be a name and a value.")
            pairs.append((words[0], words[1]))
        return tuple(pairs)

    def one_of(self, name: str, allowed: Sequence[str], default: str) -> str:
        value, where = self._get(name)
        return _one_of(value or default, allowed, where)

    def whole(self, name: str) -> int | None:
        value, where = self._get(name)
        return None if value in (None, "") else _whole(value, where)

    def seconds(self, name: str, default: float) -> float:
        value, where = self._get(name)
        if value in (None, ""):
            return default
        try:
            seconds = float(str(value))
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise SettingsError(f"{where}: {value!r} is not a number of seconds above 0.")
        return seconds

    def path(self, name: str) -> Path | None:
        value, where = self._get(name)
        if value in (None, ""):
            return None
        # Not resolve(): a link that the user names stays what the messages name.
        return Path(os.path.normpath(self._base(where) / Path(str(value)).expanduser()))

    def yes(self, name: str) -> bool:
        value, where = self._get(name)
        if isinstance(value, bool):
            return value
        word = str(value or "false").lower()
        if word not in ("true", "false", "yes", "no", "1", "0", "on", "off"):
            raise SettingsError(f"{where}: {value!r} should be true or false.")
        return word in ("true", "yes", "1", "on")


def anchored(reference: str, base: Path) -> str:
    """Make a flake reference that means a directory absolute, as seen from `base`.

    What is no directory there (`github:o/r`, a registry's name) is returned as it is.
    """
    path, hash_sign, attribute = reference.partition("#")
    scheme = next((each for each in ("path:", "git+file:") if path.startswith(each)), "")
    where = path.removeprefix(scheme)
    if not where.startswith((".", "~")) and not (base / where).is_dir():
        return reference
    where, question_mark, query = where.partition("?")
    absolute = os.path.normpath(base / Path(where).expanduser())
    return f"{scheme}{absolute}{question_mark}{query}{hash_sign}{attribute}"


def _one_of(value: object, allowed: Sequence[str], where: str) -> str:
    if value not in allowed:
        raise SettingsError(f"{where}: {value!r} is not one of {', '.join(allowed)}.")
    return str(value)


def _whole(value: object, where: str) -> int:
    try:
        number = int(str(value)) if not isinstance(value, bool) else 0
    except ValueError:
        number = 0
    if number < 1:
        raise SettingsError(f"{where}: {value!r} is not a whole number above 0.")
    return number
