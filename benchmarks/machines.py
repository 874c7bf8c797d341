"""The machine that is measured: the example's, of real nixpkgs or of the stand-in."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from pytest_nixvm import Fleet, Settings

ROOT = Path(__file__).parent.parent


def fleet(arguments: list[str], **options: object) -> Fleet:
    """Return a fleet of the example flake.

    `arguments` are pytest's (`--nixvm-override-input nixpkgs REF …`); none means the stand-in.
    """
    if not arguments:
        prepare = ROOT / "tests" / "standin" / "prepare"
        done = subprocess.run([prepare], stdout=subprocess.PIPE, text=True, check=True)
        arguments = shlex.split(done.stdout.splitlines()[-1])
    pairs: dict[str, list[list[str]]] = {}
    for at in range(0, len(arguments), 3):
        name = arguments[at].removeprefix("--nixvm-").replace("-", "_")
        pairs.setdefault(name, []).append(arguments[at + 1 : at + 3])
    flake = f"path:{ROOT / 'example_tests' / 'nix'}"
    return Fleet(Settings.make(**{"flake": flake, "memory": "1024", **pairs, **options}))
