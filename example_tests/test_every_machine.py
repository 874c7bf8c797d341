"""No machine is named here: each test runs once for every machine of the flake.

`pytest -m smoke` runs the first ones only, `pytest --nixvm-machine=test-vm` one machine only.
"""

import pytest


@pytest.mark.smoke
def test_is_the_machine_we_asked_for(vm):
    assert vm.succeed("hostname").strip() == vm.name
    assert "ID=nixos" in vm.succeed("cat /etc/os-release").splitlines()


@pytest.mark.smoke
def test_sshd(vm, ssh):
    vm.wait_for_unit("sshd.service")

    assert ssh.run(["systemctl", "is-active", "sshd"]).stdout == "active\n"


def test_no_unit_has_failed(vm):
    assert vm.succeed("systemctl list-units --failed --plain --no-legend") == ""


def test_passwords_are_refused_over_ssh(vm):
    vm.wait_for_unit("sshd.service")
    rules = vm.succeed("sshd -T").splitlines()

    assert "passwordauthentication no" in rules
    assert "kbdinteractiveauthentication no" in rules
