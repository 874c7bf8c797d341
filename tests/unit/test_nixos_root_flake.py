"""The flake at the project's root: its outputs, with nixpkgs' packages as names.

What nixpkgs makes of them can be seen only where it is: `nix flake check`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _nixos_library import LIBRARY, ROOT, SYSTEMS, evaluate

pytestmark = pytest.mark.nix

NAMES = Path(__file__).parent / "nixpkgs_names.nix"
X86 = "x86_64-linux"


@pytest.fixture(scope="session", params=SYSTEMS)
def output(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    place = tmp_path_factory.mktemp("nixpkgs")
    flake = f"""
      let
        nixpkgs = import {NAMES} {{ inherit lib nixosSystem; }};
        self = (import {ROOT}/flake.nix).outputs {{ inherit self nixpkgs; }};
      in
    """
    return lambda expression: evaluate(request.param, place, f"{flake} {expression}")


def normal(requirement: str) -> str:
    """The name of a package as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=\[; ]", requirement)[0]).lower()


def test_what_there_is(output: Callable[[str], Any]) -> None:
    found = output(
        f"builtins.mapAttrs (_: v: builtins.attrNames (v.{X86} or v)) (removeAttrs self [ ])"
    )
    assert found["packages"] == ["default", "nixvm", "pytest-nixvm"]
    assert found["devShells"] == ["default", "develop"]
    assert found["nixosModules"] == ["default", "vm"]
    assert found["templates"] == ["default", "vm"]
    assert {"mkSystem", "mkVmSystem", "machines", "images"} <= set(found["lib"])
    assert output("builtins.attrNames self.packages") == ["aarch64-linux", X86]


def test_the_package_is_what_pyproject_says(output: Callable[[str], Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = output(
        "(p: { inherit (p) version; needs = map (d: d.name) p.dependencies; "
        f"files = p.src.fileset; }}) self.packages.{X86}.pytest-nixvm"
    )
    assert found["version"] == project["version"]
    needs = {normal(name.removesuffix("-changed")) for name in found["needs"]}
    assert needs == {normal(requirement) for requirement in project["dependencies"]}
    # An older qemu.qmp than ours needs is replaced.
    assert "qemu-qmp-changed" in found["needs"]
    for file in found["files"]:
        assert Path(file).exists()


def test_the_command_finds_the_programs_that_it_starts(output: Callable[[str], Any]) -> None:
    script = output(f"self.packages.{X86}.nixvm.postBuild")
    for program in ("gitMinimal", "nix", "openssh", "qemu_kvm"):
        assert f"/nix/store/{program}/bin" in script


def test_shells(output: Callable[[str], Any]) -> None:
    packages = f"map (p: p.name or p) self.devShells.{X86}"
    (tools,) = [p for p in output(f"{packages}.default.packages") if isinstance(p, list)]
    assert {"pytest-nixvm", "pytest-xdist"} <= set(tools)
    (tools,) = [p for p in output(f"{packages}.develop.packages") if isinstance(p, list)]
    assert {"pytest", "pytest-timeout"} <= set(tools)
    assert "pytest-nixvm" not in tools


def test_checks_look_at_a_machine_and_its_images(output: Callable[[str], Any]) -> None:
    assert output(f"self.checks.{X86}.toplevel.drvPath").startswith("/nix/store/")
    assert output(f"self.checks.{X86}.vm.drvPath").startswith("/nix/store/")

    def formats(system: str) -> set[str]:
        return {line.split()[0] for line in output(f"self.checks.{system}.images").splitlines()}

    # VirtualBox makes it, which nixpkgs has for x86 only.
    assert formats(X86) - formats("aarch64-linux") == {"ova"}
    assert formats(X86) == {"iso", "ova", "qcow2", "qcow2-efi", "raw", "raw-efi", "vmdk"}


def test_the_library_is_the_one_beside_it(output: Callable[[str], Any]) -> None:
    assert output("map toString self.nixosModules.vm.imports") == [str(LIBRARY / "modules" / "vm")]
    assert output("builtins.attrNames self.lib == builtins.attrNames library") is True
    path = Path(output("toString self.templates.default.path"))
    assert (path / "flake.nix").is_file()
    # `nix flake init` reads no directory through a link.
    assert not path.is_symlink()
