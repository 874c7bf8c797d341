"""The variant of a machine that can be frozen: without shares. Real nix on tiny flakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from _flake import Seen, Workshop, evaluations, machine, needs_nix, write_flake

pytestmark = needs_nix

SHARES = "virtualisation.sharedDirectories"
STORE_IMAGE = "virtualisation.useNixStoreImage"


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def write_machine(shop: Workshop, settings: str = "", *, direct: bool = False) -> Path:
    """Write a flake with one machine, `vm`, that has imported qemu-vm.nix itself if `direct`."""
    if not direct:
        settings = f"virtualisation.vmVariant = {{ {settings} }};"
    body = machine("vm", shop.host, f"({{ force, ... }}: {{ {settings} }})")
    body = body.replace("nixosSystem {", f"nixosSystem {{ direct = {str(direct).lower()};")
    return write_flake(shop.tmp / "config", body)


both_rules = pytest.mark.parametrize("direct", [False, True], ids=["vmVariant", "top level"])


@both_rules
def test_a_freezable_machine_has_no_shares_and_says_so(shop: Workshop, direct: bool) -> None:
    flake = write_machine(shop, direct=direct)
    vm = shop.flake(flake).build("vm", freezable=True)
    assert vm.freezable
    assert vm.start_script.read_text().split() == ["exec", "qemu", "store.img", "rw-store"]
    assert {o.option: o.value for o in vm.overrides} == {SHARES: "{ }", STORE_IMAGE: "true"}
    assert all("so that it can be frozen and cloned" in o.reason for o in vm.overrides)


@both_rules
def test_the_usual_machine_is_what_it_was(shop: Workshop, direct: bool) -> None:
    flake = shop.flake(write_machine(shop, direct=direct))
    frozen = flake.build("vm", freezable=True)
    vm = flake.build("vm")
    assert not vm.freezable
    assert vm.overrides == ()
    assert vm.output != frozen.output
    assert vm.start_script.read_text().split() == ["exec", "qemu", "nix-store", "xchg", "rw-store"]


@both_rules
def test_what_the_user_has_anyway_is_not_listed(shop: Workshop, direct: bool) -> None:
    settings = f"{SHARES} = force {{ }}; {STORE_IMAGE} = true;"
    flake = shop.flake(write_machine(shop, settings, direct=direct))
    vm = flake.build("vm", freezable=True)
    assert vm.freezable
    assert vm.overrides == ()
    assert vm.output == flake.build("vm").output


@both_rules
def test_a_store_that_the_user_has_made_read_only_stays_so(shop: Workshop, direct: bool) -> None:
    flake = write_machine(shop, "virtualisation.writableStore = false;", direct=direct)
    vm = shop.flake(flake).build("vm", freezable=True)
    assert vm.start_script.read_text().split() == ["exec", "qemu", "store.img"]


def test_a_machine_with_a_store_of_its_own_keeps_it(shop: Workshop) -> None:
    flake = write_machine(shop, "virtualisation.useBootLoader = true;")
    vm = shop.flake(flake).build("vm", freezable=True)
    assert [o.option for o in vm.overrides] == [SHARES]
    assert "store.img" not in vm.start_script.read_text()


def test_shares_under_whatever_option_are_switched_off(shop: Workshop) -> None:
    settings = "virtualisation = { useHostCerts = force true; qemu.enableSharedMemory = true; };"
    vm = shop.flake(write_machine(shop, settings)).build("vm", freezable=True)
    listed = {o.option: o.value for o in vm.overrides}
    assert listed["virtualisation.useHostCerts"] == "false"
    assert listed["virtualisation.qemu.enableSharedMemory"] == "false"


def test_an_agent_that_was_off_is_listed_with_the_rest(shop: Workshop) -> None:
    flake = write_machine(shop, "services.qemuGuest.enable = force false;")
    vm = shop.flake(flake).build("vm", freezable=True)
    assert [o.option for o in vm.overrides] == ["services.qemuGuest.enable", SHARES, STORE_IMAGE]
    assert vm.toplevel is not None
    assert (vm.toplevel / "what").read_text() == "agent on\n"


def test_a_bare_derivation_stays_as_it_is(shop: Workshop) -> None:
    body = machine("dev-vm", shop.host)
    body += "packages.x86_64-linux.my-vm = self.nixosConfigurations.dev-vm.config.system.build.vm;"
    flake = shop.flake(f"{write_flake(shop.tmp / 'config', body)}#my-vm")
    vm = flake.build("my-vm", freezable=True)
    assert not vm.freezable
    assert vm.overrides == ()
    assert vm.output == flake.build("my-vm").output


def test_the_two_variants_are_remembered_and_rooted_apart(shop: Workshop) -> None:
    config = write_machine(shop)
    made = [shop.flake(config).build("vm", freezable=freezable) for freezable in (False, True)]
    assert all(vm.evaluated > 0 for vm in made)
    roots = {root.readlink() for root in (shop.cache / "roots").iterdir()}
    assert roots == {vm.output for vm in made}
    seen = Seen()
    again = shop.flake(config, progress=seen)
    for freezable in (True, False):
        vm = again.build("vm", freezable=freezable)
        assert vm.output == made[freezable].output
        assert vm.overrides == made[freezable].overrides
        assert vm.freezable == freezable
        assert (vm.evaluated, vm.built) == (0, 0)
    assert evaluations(seen) == 0


def test_each_variant_has_a_build_log_of_its_own(shop: Workshop) -> None:
    flake = shop.flake(write_machine(shop))
    flake.build("vm")
    flake.build("vm", freezable=True)
    logs = {path.name for path in shop.logs.iterdir()}
    assert {"build-vm.log", "build-vm-freezable.log"} <= logs
