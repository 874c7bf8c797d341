"""The machine that is measured: the example's, of real nixpkgs or of the stand-in."""

from __future__ import annotations

import shlex
import subprocess
import time
from pathlib import Path

from pytest_nixvm import Fleet, Machine, Settings

ROOT = Path(__file__).parent.parent
DIRECTORY = ROOT / "example_tests" / "nix"
FLAKE = f"path:{DIRECTORY}"
MACHINE, MEMORY = "dev-vm", 1024


def nixpkgs(arguments: list[str]) -> list[str]:
    """Return pytest's arguments that say which nixpkgs: `arguments`, or the stand-in's."""
    if arguments:
        return arguments
    prepare = ROOT / "tests" / "standin" / "prepare"
    done = subprocess.run([prepare, DIRECTORY], stdout=subprocess.PIPE, text=True, check=True)
    return shlex.split(done.stdout.splitlines()[-1])


def fleet(arguments: list[str], **options: object) -> Fleet:
    """Return a fleet of the example flake.

    `arguments` are pytest's (`--nixvm-override-input nixpkgs REF …`); none means the stand-in.
    """
    arguments = nixpkgs(arguments)
    pairs: dict[str, list[list[str]]] = {}
    for at in range(0, len(arguments), 3):
        name = arguments[at].removeprefix("--nixvm-").replace("-", "_")
        pairs.setdefault(name, []).append(arguments[at + 1 : at + 3])
    return Fleet(Settings.make(**{"flake": FLAKE, "memory": str(MEMORY), **pairs, **options}))


def fork_time(vm: Machine, times: int = 200) -> float:
    """Return the seconds that bash in the guest takes to fork and wait, per fork."""
    loop = f"for ((i = 0; i < {times}; i++)); do ( : ); done"
    empty = f"for ((i = 0; i < {times}; i++)); do :; done"
    start = time.perf_counter()
    vm.run(loop, check=True)
    middle = time.perf_counter()
    vm.run(empty, check=True)
    return max(0.0, 2 * middle - start - time.perf_counter()) / times
