"""What the stand-in has for a deployment, a nix in the guest, and its Home Manager.

On real nixpkgs these would test Nix and Home Manager.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_nixvm import Fleet, Machine

PROFILE = "/nix/var/nix/profiles/system"


@pytest.fixture(scope="module")
def fleet(fleet_of: Callable[..., Fleet]) -> Fleet:
    return fleet_of("standin_nix")


@pytest.fixture(scope="module")
def vm(fleet: Fleet) -> Iterator[Machine]:
    machine = fleet.start("target")
    yield machine
    machine.kill()


def test_a_home_has_its_files_packages_and_variables(vm: Machine) -> None:
    vm.wait_for_unit("home-manager-alice.service")
    notes = "/home/alice/notes/hi.txt"
    assert vm.succeed(f"stat -c %U {notes}; cat {notes}") == "alice\nhi there\n"
    assert "standin_nix" in vm.succeed("cat /home/alice/.config/tool/settings")
    assert vm.succeed("su - alice -c 'echo $GREETING; hello; git config user.name'") == (
        "hi\nHello, world!\nAlice Example\n"
    )


def test_nix_in_the_guest_knows_its_store_and_takes_a_system(
    vm: Machine, fleet: Fleet, tmp_path: Path
) -> None:
    current = vm.succeed("readlink -f /run/current-system").strip()
    assert current in vm.succeed(f"nix-store -q --requisites {current}").split()
    assert current in vm.succeed("nix-store --gc --print-roots")
    assert "disappeared" not in vm.succeed("nix-store --verify 2>&1")

    second = fleet.flake.toplevel("second", freezable=True, switching=True)
    vm.fail(f"nix-store --check-validity {second}")
    *options, destination = shlex.split(vm.ssh.command_line)[1:]
    host = destination.rpartition("@")[2]
    copy = subprocess.run(
        [
            *("nix", "--extra-experimental-features", "nix-command", "copy"),
            *("--to", f"ssh://root@{host}", str(second)),
        ],
        env={**os.environ, "NIX_SSHOPTS": shlex.join(options), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert copy.returncode == 0, copy.stderr
    vm.succeed(f"nix-store --check-validity {second}")

    vm.succeed(f"nix-env -p {PROFILE} --set {current}")
    vm.succeed(f"nix-env -p {PROFILE} --set {second}")
    vm.succeed(f"{second}/bin/switch-to-configuration test 2>&1")
    assert vm.succeed("cat /etc/second") == "yes\n"
    assert vm.succeed("cat /home/alice/notes/new.txt") == "new\n"
    vm.succeed(f"nix-env -p {PROFILE} --rollback")
    assert vm.succeed(f"readlink -f {PROFILE}").strip() == current
    assert vm.succeed(f"nix-env -p {PROFILE} --list-generations").count("\n") == 2
