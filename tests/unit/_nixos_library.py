"""Evaluate the Nix library for flakes on the stand-in's NixOS. Nothing is built.

The module system is the stand-in's, and nixpkgs' own where NIXVM_NIXPKGS_LIB names its directory
`lib`: what one of them takes, the other may not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "pytest_nixvm" / "nixos"
STANDIN = ROOT / "tests" / "standin"
TIMEOUT = 120  # seconds for one evaluation; it takes one

REAL = os.environ.get("NIXVM_NIXPKGS_LIB", "")
# Which module systems there are here, for `pytest.mark.parametrize`.
SYSTEMS = ["stand-in", *(["nixpkgs"] if REAL else [])]


class EvaluationFailed(Exception):
    pass


@cache
def standin(place: Path) -> Path:
    """The stand-in as `prepare` lays it out, with a lock of packages that nobody can fetch."""
    target = place / "nixpkgs"
    shutil.copytree(STANDIN / "nixpkgs", target)
    nowhere = {"url": "http://nowhere.invalid/package.deb", "sha256": "0" * 64}
    debs = dict.fromkeys(("linux", "busybox-static"), nowhere)
    packages: dict[str, list[str]] = {"git": [], "vim": []}
    lock = {"debs": debs, "kernel": "linux", "base": [], "packages": packages}
    (target / "lock.json").write_text(json.dumps(lock))
    return target


def evaluate(system: str, place: Path, expression: str) -> Any:
    """Return the value of an expression, read as JSON. Raises `EvaluationFailed` with nix's words.

    It may use `library` (the flake's `lib`), `flake` (its outputs), `nixpkgs` (as a flake's input),
    `home-manager`, `lib`, and `machine MODULE`: a NixOS system of that module and `vm`.
    """
    nixpkgs = standin(place)
    lib = REAL if system == "nixpkgs" else nixpkgs / "lib"
    text = f"""
      let
        lib = import {lib};
        nixosSystem = import {nixpkgs}/nixos/eval-config.nix {{ inherit lib; }};
        nixpkgs.lib = lib // {{ inherit nixosSystem; }};
        home-manager.nixosModules.home-manager = import {STANDIN}/home-manager/nixos.nix;
        flake = (import {LIBRARY}/flake.nix).outputs {{ }};
        library = flake.lib;
        base = {{
          nixpkgs.hostPlatform = "x86_64-linux";
          networking.hostName = lib.mkDefault "machine";
          system.stateVersion = "25.11";
        }};
        machine = module: nixosSystem {{
          modules = [ flake.nixosModules.vm base {{ vm.enable = lib.mkDefault true; }} module ];
        }};
      in {expression}
    """
    done = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", "--expr", text],
        env={**os.environ, "NIX_CONFIG": "build-users-group ="},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise EvaluationFailed(done.stderr)
    return json.loads(done.stdout)
