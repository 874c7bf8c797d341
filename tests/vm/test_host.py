"""Testinfra on a real VM."""

from __future__ import annotations

import pytest
import testinfra

from pytest_nixvm import Machine

pytestmark = pytest.mark.nixvm("dev-vm")


def test_testinfra_asks_the_vm(vm: Machine) -> None:
    host = vm.host
    assert host.service("sshd").is_running
    assert host.file("/etc/os-release").exists
    assert host.user("root").uid == 0
    assert host.sysctl("kernel.ostype") == "Linux"
    assert host.run("echo %s", "it's").stdout == "it's\n"
    assert host.process.filter(comm="systemd")
    assert not host.package("no-such-package").is_installed
    assert testinfra.get_host(f"nixvm://{vm.name}").check_output("id -un") == "root"


def test_testinfras_users(vm: Machine) -> None:
    with vm.host.sudo("nobody"):
        assert vm.host.check_output("id -un") == "nobody"
    assert testinfra.get_host(f"nixvm://nobody@{vm.name}").check_output("id -un") == "nobody"
