"""Machines that boot from their own images, on the hardware that each is for.

On the stand-in this proves how images are found, attached, started and cloned; that nixpkgs' own
boot, only real nixpkgs can. Each format is built and booted, qcow2 is cloned as well; clones of the
others and what differs by its firmware only, where NIXVM_TEST_IMAGES says `all`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from pytest_nixvm import Fleet, Machine

LOOK = "hello; findmnt -no SOURCE,FSTYPE /; cat /proc/cmdline"
ADDRESS = "ip -4 -o addr | grep -F 10.0.2.15/24"

every_format = pytest.mark.skipif(
    os.environ.get("NIXVM_TEST_IMAGES") != "all",
    reason="a minute for each format, and they are like others: NIXVM_TEST_IMAGES=all",
)


@pytest.fixture(scope="module")
def clones(fleet_of: Callable[..., Fleet]) -> Fleet:
    """Machines that are frozen and cloned."""
    return fleet_of("images", isolation="test")


@pytest.fixture(scope="module")
def boots(fleet_of: Callable[..., Fleet]) -> Fleet:
    """Machines that boot each time."""
    return fleet_of("images", isolation="session")


@pytest.fixture
def qcow2(clones: Fleet) -> Iterator[Machine]:
    with clones.start("small@qcow2") as vm:
        yield vm


def test_a_qcow2_image_boots_on_virtio(qcow2: Machine) -> None:
    seen = qcow2.succeed(LOOK)
    assert "Hello, world!" in seen  # a package, from the store on the disk
    assert "/dev/vda1" in seen
    qcow2.wait_until_succeeds(ADDRESS, timeout=60)
    assert qcow2.succeed("hostname").strip() == qcow2.name == "small"
    sectors = int(qcow2.succeed("cat /sys/block/vda/size"))
    assert sectors * 512 == 2048 << 20  # as image.modules.qemu has it
    assert qcow2.ssh.run(["id", "-un"]).stdout == "root\n"
    assert qcow2.host.check_output("id -un") == "root"
    assert "NixOS Stage 1" in qcow2.console.text()


def test_it_is_frozen_and_cloned(clones: Fleet, qcow2: Machine) -> None:
    assert "small@qcow2" not in clones.unfreezable
    qcow2.succeed("echo spoilt > /root/left; sync")
    with clones.start("small@qcow2") as other:
        assert other.template is not None
        assert other.execute("test -e /root/left")[0] == 1


def test_what_differs_is_said(clones: Fleet) -> None:
    build = clones.build("small@qcow2", freezable=True)
    assert [each.option for each in build.overrides] == [
        "services.qemuGuest.enable",
        "boot.kernelParams",
    ]
    not_tested = [str(each) for each in clones.fidelity("small@qcow2")]
    assert any("those of the image (qcow2)" in each for each in not_tested)
    declared = clones.declared("small@qcow2")
    assert declared.ssh is not None


def test_an_ova_boots_on_sata(boots: Fleet) -> None:
    with boots.start("small@ova") as vm:
        seen = vm.succeed(LOOK)
        assert "Hello, world!" in seen
        assert "/dev/sda1" in seen
        vm.wait_until_succeeds(ADDRESS, timeout=60)
        assert "virtio_net" in vm.succeed("readlink /sys/class/net/e*/device/driver")
        build = boots.build("small@ova")
        assert vm.succeed("readlink -f /run/current-system").strip() == str(build.toplevel)


@pytest.mark.parametrize(
    ("form", "root", "efi"),
    [
        ("raw", "/dev/vda1", False),
        ("iso", "tmpfs", False),
        ("vmdk", "/dev/sda1", True),
        pytest.param("qcow2-efi", "/dev/vda1", True, marks=every_format),
        pytest.param("raw-efi", "/dev/vda1", True, marks=every_format),
    ],
)
def test_others_boot_as_well(boots: Fleet, form: str, root: str, efi: bool) -> None:
    with boots.start(f"small@{form}") as vm:
        seen = vm.succeed(LOOK)
        assert "Hello, world!" in seen
        assert root in seen
        assert (vm.execute("test -d /sys/firmware/efi")[0] == 0) is efi


@every_format
@pytest.mark.parametrize("form", ["ova", "vmdk", "iso", "qcow2-efi"])
def test_others_are_cloned_as_well(clones: Fleet, form: str) -> None:
    with clones.start(f"small@{form}") as vm:
        assert vm.template is not None
        assert "Hello, world!" in vm.succeed("hello")
