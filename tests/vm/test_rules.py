"""The configuration's own sshd rules are obeyed, and where nobody may log in, that is said."""

from __future__ import annotations

import pytest

from pytest_nixvm.errors import SshError


def test_another_port(booted):
    with booted("machines", "other-port") as vm:
        assert vm.ssh.run("id -un").stdout == "root\n"
        assert "2222" in vm.succeed("ss --tcp --listening --numeric --no-header")


def test_root_may_not_log_in(booted):
    with booted("machines", "no-root") as vm:
        assert vm.ssh.run("id -un").stdout in ("alice\n", "bob\n")
        with pytest.raises(SshError, match="PermitRootLogin"):
            vm.ssh_as("root")


def test_only_one_user_may(booted):
    with booted("machines", "only-bob") as vm:
        assert vm.ssh.run("id -un").stdout == "bob\n"
        with pytest.raises(SshError, match="AllowUsers"):
            vm.ssh_as("alice")


def test_keys_are_kept_outside_the_home(booted):
    with booted("machines", "keys-elsewhere") as vm:
        assert vm.ssh.run("id -un").stdout == "root\n"
        vm.fail("test -s /root/.ssh/authorized_keys")


def test_the_firewall_closes_the_port(booted):
    with booted("machines", "walled-off") as vm:
        with pytest.raises(SshError, match=r"(?s)something listens on port 22.*firewall"):
            vm.ssh.run("true")
        assert vm.succeed("echo still here") == "still here\n"


def test_nobody_may_and_the_machine_works_all_the_same(booted):
    with booted("machines", "nobody") as vm:
        with pytest.raises(SshError, match="AllowUsers"):
            _ = vm.ssh
        assert vm.succeed("echo still here") == "still here\n"
