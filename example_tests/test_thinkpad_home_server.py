"""A physical machine in a VM: without its disks and its hardware, and else as it is."""

import pytest

pytestmark = pytest.mark.nixvm("thinkpad-home-server")


def test_it_has_its_address(vm):
    assert "192.168.1.10/24" in vm.succeed("ip -4 -brief address show enp0s25").split()


def test_the_household_has_accounts(vm):
    for name in ("alice", "bob"):
        assert vm.succeed(f"getent passwd {name}").split(":")[5] == f"/home/{name}"
    assert "wheel" in vm.succeed("id -nG alice").split()
    assert "wheel" not in vm.succeed("id -nG bob").split()
