"""test-vm is small, has no display, and can be reached through SSH only."""

import pytest

pytestmark = pytest.mark.nixvm("test-vm")

GIB = 1024**3


def test_small(vm):
    memory = int(vm.succeed("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")) * 1024
    disk = int(vm.succeed("lsblk --bytes --nodeps --noheadings --output SIZE /dev/vda"))

    assert memory < 2 * GIB
    assert disk == 10 * GIB


def test_only_sshd_listens(vm):
    vm.wait_for_unit("sshd.service")
    sockets = vm.succeed("ss --tcp --listening --numeric --no-header").splitlines()
    elsewhere = {line.split()[3] for line in sockets if not line.split()[3].startswith("127.")}

    assert elsewhere == {"0.0.0.0:22", "[::]:22"}


def test_no_tools(vm):
    """`run` tells how it went, `succeed` and `fail` insist."""
    assert vm.run("git --version").returncode == 127
    vm.fail("vim --version")
