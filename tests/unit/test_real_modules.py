"""sops-nix, agenix and nixpkgs' lib as they are: evaluated only where their sources are given.

NIXVM_NIXPKGS_LIB (the directory `lib` of nixpkgs), NIXVM_SOPS_NIX and NIXVM_AGENIX name them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from _flake import needs_nix
from _nix_modules import evaluate

from pytest_nixvm.flake.declared import Declared

VARIABLES = {"lib": "NIXVM_NIXPKGS_LIB", "sops": "NIXVM_SOPS_NIX", "agenix": "NIXVM_AGENIX"}
pytestmark = [
    needs_nix,
    pytest.mark.skipif(
        not all(os.environ.get(name) for name in VARIABLES.values()),
        reason=f"{', '.join(VARIABLES.values())} name the sources",
    ),
]


def machine(units: str) -> Any:
    sources = " ".join(f"{key} = {os.environ[name]};" for key, name in VARIABLES.items())
    here = Path(__file__).parent / "real_modules.nix"
    return evaluate(f"import {here} {{ inherit modules; {sources} units = {units}; }}")


def installs(script: str) -> set[str]:
    return {
        line.split("'")[1] for line in script.splitlines() if line.startswith("install_secret '")
    }


def test_activation_scripts_are_replaced_and_keep_their_order() -> None:
    found = machine("false")
    scripts = found["scripts"]
    assert installs(scripts["setupSecretsForUsers"]["text"]) == {"alice"}
    assert installs(scripts["setupSecrets"]["text"]) == {"web%2Fapi"}
    assert "render_template" in scripts["setupSecrets"]["text"]
    assert installs(scripts["agenixInstall"]["text"]) == {"token"}
    assert installs(scripts["agenixChown"]["text"]) == {"token"}
    assert installs(scripts["nixvmSecrets"]["text"]) == {"token2"}
    assert {"users", "groups"} <= set(scripts["setupSecrets"]["deps"])
    assert {"setupSecretsForUsers", "agenixInstall"} <= set(scripts["users"]["deps"])
    everything = "".join(script["text"] for script in scripts.values())
    assert "bin/sops-install-secrets" not in everything
    assert "--decrypt" not in everything


def test_units_are_replaced() -> None:
    found = machine("true")
    services = found["services"]
    for name in ("sops-install-secrets", "agenix-install-secrets"):
        assert services[name]["serviceConfig"]["ExecStart"].endswith("/bin/true")
        assert installs(services[name]["preStart"])
    assert installs(services["sops-install-secrets-for-users"]["preStart"]) == {"alice"}
    assert installs(services["nixvm-secrets"]["script"]) == {"token2"}


def test_what_is_declared() -> None:
    found = machine("false")
    declared = Declared.from_json(found["declared"])
    assert {s.name: (s.owner, s.group) for s in declared.secrets} == {
        "alice": ("root", "root"),
        "web/api": ("web", "web"),
        "token": ("web", "web"),
    }
    assert declared.templates == ("/run/secrets/rendered/env",)
    assert (declared.interface, declared.address) == ("enp3s0", ("10.0.0.5", 24))
    assert 'NAME="enp3s0"' in found["udev"]
