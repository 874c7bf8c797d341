"""The example's flake, and what `nixvm init` makes of it, evaluated. Nothing is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _flake import needs_nix
from _nixos_library import ROOT, SYSTEMS, EvaluationFailed, evaluate

from pytest_nixvm import layout

pytestmark = [needs_nix, pytest.mark.parametrize("system", SYSTEMS)]

EXAMPLE = ROOT / "example_tests" / "nix"
PHYSICAL = {"dell-xps-15", "thinkpad-home-server"}
LOOK = """
  name: nixos: let inherit (nixos) config; inherit (config.system.build) vm toplevel; in {
    # Both have to be evaluated, assertions and all.
    builds = builtins.seq vm.drvPath (builtins.seq toplevel.drvPath true);
    host = config.networking.hostName;
    people = builtins.attrNames (lib.filterAttrs (_: user: user.isNormalUser) config.users.users);
    vm = config.vm.enable or false;
    homes = builtins.attrNames (config.home-manager.users or { });
  }
"""


def outputs(flake: Path) -> str:
    """Return an expression for the outputs of a flake of this layout."""
    return f"""
      (let
        inputs = {{ inherit nixpkgs home-manager; pytest-nixvm = flake; }};
        self = (import {flake}/flake.nix).outputs (inputs // {{ inherit self; }});
      in self)
    """


def machines(system: str, place: Path, flake: Path) -> dict[str, Any]:
    look = f"builtins.mapAttrs ({LOOK}) {outputs(flake)}.nixosConfigurations"
    found: dict[str, Any] = evaluate(system, place, look)
    return found


def test_the_machines_of_the_example(system, tmp_path):
    found = machines(system, tmp_path, EXAMPLE)

    assert found.keys() == {"dev-vm", "test-vm", *PHYSICAL}
    for name, machine in found.items():
        assert machine["host"] == name
        assert machine["builds"]
        assert machine["vm"] == (name not in PHYSICAL)
        assert machine["people"] == (["alice", "bob"] if name in PHYSICAL else ["alice"])
        assert machine["homes"] == (["alice"] if name == "dev-vm" else [])


def test_the_other_outputs(system, tmp_path):
    parts = f"{{ inherit ({outputs(EXAMPLE)}) packages apps checks; }}"
    names = f"builtins.mapAttrs (_: builtins.mapAttrs (_: builtins.attrNames)) {parts}"
    found = evaluate(system, tmp_path, names)

    formats = ("iso", "ova", "qcow2", "raw", "vmdk")
    vms = ["dev-vm", "test-vm"]
    assert found == {
        "packages": {"x86_64-linux": [f"{vm}-{format}" for vm in vms for format in formats]},
        "apps": {"x86_64-linux": vms},
        "checks": {"x86_64-linux": sorted([*vms, *PHYSICAL])},
    }


def test_a_flake_from_nothing_and_a_vm_more(system, tmp_path):
    flake = tmp_path / "config"
    layout.write_layout(flake, layout.layout(layout.Person("carol"), ["web-vm"]))
    layout.add_vm(flake, "db-vm", home=True)

    found = machines(system, tmp_path, flake)

    assert found.keys() == {"web-vm", "db-vm"}
    for name, machine in found.items():
        assert machine["host"] == name
        assert machine["builds"]
        assert machine["people"] == ["carol"]
    assert found["db-vm"]["homes"] == ["carol"]


def test_a_mac_is_a_machine_for_nix_darwin(system, tmp_path):
    mac = f'{outputs(EXAMPLE)}.lib.mkDarwinSystem {{ name = "mac"; directory = ./.; }}'
    with pytest.raises(EvaluationFailed) as caught:
        evaluate(system, tmp_path, mac)
    # What can be copied: no path of this computer.
    assert 'modules = [ (directory + "/configuration.nix") ]' in str(caught.value)
