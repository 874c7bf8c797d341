"""A flake that was not made for us is tested as it is."""

from __future__ import annotations

import pytest

from pytest_nixvm.errors import EvaluationError, SshError


@pytest.fixture(scope="module")
def kiosk(fleet_of):
    vm = fleet_of("stranger", memory=None).start("kiosk")
    yield vm
    vm.kill()


def test_the_flake_s_names(fleet_of, kiosk):
    assert {machine.name for machine in fleet_of("stranger", memory=None).machines} == {
        "kiosk",
        "Büro-server",
    }
    assert kiosk.succeed("hostname") == "till-7\n"


def test_a_failing_unit_is_named_and_does_not_stop_us(kiosk):
    assert kiosk.boot.state == "degraded"
    assert kiosk.boot.failed_units == ("till.service",)
    assert kiosk.failed_units() == ("till.service",)
    assert "no drawer" in kiosk.systemd().report("till.service")


def test_ssh_says_why_there_is_none(kiosk):
    with pytest.raises(SshError, match="sshd"):
        _ = kiosk.ssh


def test_its_memory_is_its_own(kiosk):
    kib = int(kiosk.succeed("awk '/^MemTotal:/ { print $2 }' /proc/meminfo"))

    assert 500_000 < kib < 768 * 1024


def test_its_firewall_stays_closed(kiosk):
    assert "22" not in kiosk.succeed("nft list ruleset | grep dport || true")


def test_a_package_that_is_a_vm(booted):
    with booted("stranger#packages.x86_64-linux.till", "till", memory=None) as vm:
        assert vm.succeed("hostname") == "till-7\n"


def test_a_broken_neighbour_breaks_only_itself(fleet_of):
    with pytest.raises(EvaluationError, match="broken on purpose"):
        fleet_of("stranger", memory=None).build("Büro-server")
