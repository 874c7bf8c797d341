"""Tests on real VMs, made of the stand-in for nixpkgs in tests/standin.

`pytest tests/vm` prepares the stand-in itself; options on the command line win, so that the same
tests run on real nixpkgs with `--nixvm-override-input nixpkgs github:NixOS/nixpkgs/…`.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest

from pytest_nixvm import Fleet, Settings

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
EXAMPLE = ROOT / "example_tests" / "nix"
LIBRARY = ROOT / "pytest_nixvm" / "nixos"
ARGUMENTS = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if hasattr(config, "workerinput"):  # xdist's workers are given what the controller was
        config.stash[ARGUMENTS], options = config.workerinput["standin"]
        vars(option).update(options)
        return
    config.stash[ARGUMENTS] = []
    if option.help or option.version:
        return
    if not option.nixvm_override_input:
        prepare = ROOT / "tests" / "standin" / "prepare"
        done = subprocess.run([prepare, EXAMPLE], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise pytest.UsageError(f"{prepare} failed: see above.")
        words = shlex.split(done.stdout.splitlines()[-1])
        config.stash[ARGUMENTS] = words
        while words:
            flag, words = words[0], words[1:]
            values = words[: _values(flag)]
            words = words[len(values) :]
            name = flag.removeprefix("--").replace("-", "_")
            setattr(option, name, [*(getattr(option, name) or []), values])
    else:
        if not any(name == "pytest-nixvm" for name, _ in option.nixvm_override_input):
            option.nixvm_override_input.append(("pytest-nixvm", f"path:{LIBRARY}"))
        for flag in ("override_input", "nix_option"):
            for pair in getattr(option, f"nixvm_{flag}") or []:
                config.stash[ARGUMENTS] += [f"--nixvm-{flag.replace('_', '-')}", *pair]
    if option.nixvm_flake is None:
        option.nixvm_flake = str(EXAMPLE)
    # 4 GiB, as dev-vm has it, is more than these tests need.
    option.nixvm_memory = option.nixvm_memory or "1024"


def _values(flag: str) -> int:
    return 2 if flag in ("--nixvm-override-input", "--nixvm-nix-option") else 1


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    names = ("flake", "memory", "override_input", "nix_option")
    options = {f"nixvm_{name}": getattr(node.config.option, f"nixvm_{name}") for name in names}
    node.workerinput["standin"] = (node.config.stash[ARGUMENTS], options)


@pytest.fixture(scope="session", autouse=True)
def _state_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Not the user's: nobody deploys these machines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def arguments(pytestconfig: pytest.Config) -> list[str]:
    """The pytest arguments that make VMs of the stand-in, for the example."""
    return pytestconfig.stash[ARGUMENTS]


@pytest.fixture(scope="session")
def arguments_of(arguments: list[str]) -> Callable[[str | Path], list[str]]:
    """The same for another flake (its directory), which may have fewer inputs."""

    def those(flake: str | Path) -> list[str]:
        inputs = _inputs(Path(flake))
        triples = zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True)
        return [
            word
            for flag, name, value in triples
            if flag != "--nixvm-override-input" or name.partition("/")[0] in inputs
            for word in (flag, name, value)
        ]

    return those


@cache
def _inputs(flake: Path) -> frozenset[str]:
    """The names of a flake's inputs: to override one that it does not have is a mistake."""
    expression = (
        f"builtins.attrNames ((import {json.dumps(str(flake / 'flake.nix'))}).inputs or {{ }})"
    )
    command = ["nix-instantiate", "--eval", "--json", "--strict", "-E", expression]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    return frozenset(json.loads(done.stdout))


@pytest.fixture(scope="session")
def flake_copy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A copy of one of the flakes beside this file, in a git repository of its own."""

    def copy(name: str) -> Path:
        place = tmp_path_factory.mktemp(name) / name
        shutil.copytree(EXAMPLE if name == "example" else HERE / name, place)
        subprocess.run(["git", "init", "--quiet", place], check=True)
        subprocess.run(["git", "-C", place, "add", "."], check=True)
        return place

    return copy


@pytest.fixture(scope="session")
def fleet_of(
    arguments_of: Callable[[str | Path], list[str]],
    flake_copy: Callable[[str], Path],
    tmp_path_factory,
) -> Iterator[Callable[..., Fleet]]:
    """A fleet of one of the flakes beside this file, ended with the session."""
    fleets: dict[object, Fleet] = {}
    copies: dict[str, Path] = {}

    def make(name: str, **options: object) -> Fleet:
        key = (name, tuple(sorted(options.items())))
        if key not in fleets:
            flake, _, attribute = name.partition("#")
            copies[flake] = copies.get(flake) or flake_copy(flake)
            reference = f"{copies[flake]}#{attribute}" if attribute else str(copies[flake])
            fleets[key] = Fleet(
                settings_for(reference, arguments_of(copies[flake]), **options),
                output=tmp_path_factory.mktemp(f"{flake}-output"),
            )
        return fleets[key]

    yield make
    for fleet in fleets.values():
        fleet.close()


def settings_for(flake: str, arguments: list[str], **options: object) -> Settings:
    pairs: dict[str, list[list[str]]] = {}
    for at in range(0, len(arguments), 3):
        name = arguments[at].removeprefix("--nixvm-").replace("-", "_")
        pairs.setdefault(name, []).append(arguments[at + 1 : at + 3])
    return Settings.make(**{"flake": flake, "memory": "1024", **pairs, **options})


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A TCP port of loopback for a VM to come, that the system gives nobody in the meantime."""

    def find() -> int:
        # Below those that it gives to who asks for any. Workers may have the same seed.
        for port in random.SystemRandom().sample(range(10240, 32000), 100):
            with suppress(OSError), socket.create_server(("127.0.0.1", port)):
                return port
        raise AssertionError("none of 100 ports is free")

    return find


@pytest.fixture
def booted(fleet_of: Callable[..., Fleet]):
    """`with booted("flake", "machine") as vm`: a VM of its own, ended behind the block."""

    @contextmanager
    def boot(flake: str, machine: str, **options: object):
        vm = fleet_of(flake, **options).start(machine)
        try:
            yield vm
        finally:
            vm.kill()

    return boot
