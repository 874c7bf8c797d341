"""A machine with disks, encryption, a static address and secrets is tested as it is."""

from __future__ import annotations

import re

import pytest

from pytest_nixvm.fidelity import fidelity, text
from pytest_nixvm.flake.declared import value_file


@pytest.fixture(scope="module")
def fleet(fleet_of):
    return fleet_of("laptop")


@pytest.fixture(scope="module")
def laptop(fleet):
    vm = fleet.start("laptop")
    yield vm
    vm.kill()


def test_it_boots_without_its_disks_and_its_keys(laptop):
    assert laptop.boot.state == "running"
    assert laptop.failed_units() == ()


# --- its network ---


def test_the_card_has_its_name_and_its_address(laptop):
    addresses = laptop.succeed("ip -4 -o addr show")
    assert re.search(r"enp3s0\s+inet 192\.168\.77\.10/24", addresses)
    assert "eth0" not in addresses
    assert "default via 192.168.77.1 dev enp3s0" in laptop.succeed("ip route")


def test_forwarded_ports_reach_its_address(laptop):
    assert laptop.reachable(22)
    assert laptop.ssh.run("hostname").stdout == "laptop\n"


def test_firewall_rules_for_that_card_apply(laptop):
    """The firewall drops; what is let in is refused, as nobody listens."""
    assert laptop.reachable(8080).state == "closed"
    assert laptop.reachable(8081).state == "filtered"


# --- its secrets ---


def test_secrets_are_where_they_are_declared(laptop):
    def stat(path):
        return laptop.succeed(f"stat -L -c '%U:%G %a' {path}").strip()

    assert stat("/var/lib/app/key") == "alice:users 440"
    assert stat("/run/secrets/app/key") == "alice:users 440"
    assert stat("/run/agenix/token") == "alice:root 400"
    assert stat("/run/secrets-for-users/alice") == "root:root 400"


def test_a_password_is_a_hash_of_nothing(laptop):
    hashed = laptop.succeed("grep ^alice: /etc/shadow").split(":")[1]
    assert re.fullmatch(r"\$6\$[./0-9A-Za-z]{16}\$[./0-9A-Za-z]{86}", hashed)


def test_no_value_is_in_the_store(laptop):
    value = laptop.succeed("cat /var/lib/app/key")
    assert re.fullmatch("[0-9a-f]{64}", value)
    status, _ = laptop.execute(f"grep -r {value} /run/current-system/activate /etc/static/systemd")
    assert status == 1


def test_values_stay_the_same_and_a_test_may_choose_one(laptop):
    token = laptop.succeed("cat /run/agenix/token")
    laptop.succeed(f"printf chosen > {value_file('app/key')}", "/run/current-system/activate")
    assert laptop.succeed("cat /var/lib/app/key") == "chosen"
    assert laptop.succeed("cat /run/agenix/token") == token


# --- what is told about it ---


def test_the_build_says_what_was_changed(fleet):
    build = fleet.build("laptop")
    assert {secret.name for secret in build.secrets} == {"alice", "app/key", "token"}
    assert build.network_options.startswith("net=192.168.77.0/24,host=192.168.77.1,")
    changed = {override.option: override.value for override in build.overrides}
    assert changed["services.udev.extraRules"] == "… eth0 is called enp3s0"
    assert changed["system.activationScripts.setupSecrets.text"] == "… throwaway values"


def test_what_is_not_tested_is_said(fleet):
    said = text(fidelity(fleet.build("laptop"), fleet.declared("laptop")))
    for word in ("/ (btrfs), /boot (vfat)", "cryptroot", "disko", "systemd-boot", "by-label/swap"):
        assert word in said
    for word in ("enp3s0", "wlp2s0", "alice, app/key (sops-nix)", "token (agenix)", "timesyncd"):
        assert word in said
