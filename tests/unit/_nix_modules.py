"""Evaluate the plugin's Nix files on configurations that a test writes down."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from pytest_nixvm.flake.remember import MODULES

FLAGS = ("--extra-experimental-features", "nix-command flakes", "--impure", "--json")


def evaluate(expression: str) -> Any:
    """Return the value of an expression in which `modules` is the directory of the Nix files."""
    done = subprocess.run(
        ["nix", "eval", *FLAGS, "--expr", f"let modules = {MODULES}; in {expression}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
