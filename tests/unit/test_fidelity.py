"""What a VM does not test is said, and only what the machine has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pytest_nixvm.fidelity import fidelity, lines, text
from pytest_nixvm.flake.build import Override, Secret, VmBuild
from pytest_nixvm.flake.declared import Declared, FileSystem, Real

BUILD = VmBuild(
    name="laptop",
    attribute="nixosConfigurations.laptop",
    start_script=Path("/nix/store/x/bin/run-laptop-vm"),
    output=Path("/nix/store/x"),
    toplevel=None,
    system="x86_64-linux",
    overrides=(Override("services.qemuGuest.enable", "true", "the guest agent lets the tests in"),),
    freezable=False,
    evaluated=0,
    built=0,
)
LAPTOP = Declared(
    interface="enp3s0",
    other_interfaces=("wlp2s0",),
    secrets=(Secret("wifi", "/run/secrets/wifi", provider="sops"),),
    real=Real(
        file_systems=(
            FileSystem("/", "btrfs", "/dev/mapper/root"),
            FileSystem("/boot", "vfat", ""),
        ),
        luks=("root",),
        swap=("/dev/sda3",),
        disko=True,
        boot_loader="lanzaboote",
        secure_boot=True,
        tpm2=True,
        video_drivers=("nvidia",),
        wireless=True,
        time_sync="systemd-timesyncd",
    ),
)


def test_what_a_laptop_s_vm_has_not() -> None:
    said = text(fidelity(BUILD, LAPTOP))
    for word in ("/ (btrfs)", "/boot (vfat)", "LUKS", "disko", "/dev/sda3", "lanzaboote", "TPM"):
        assert word in said
    for word in ("Secure Boot", "enp3s0", "wlp2s0", "wifi (sops-nix)", "nvidia", "timesyncd"):
        assert word in said
    assert "option services.qemuGuest.enable: true\n    (the guest agent lets" in said


def test_nothing_that_the_machine_has_not_either() -> None:
    said = text(fidelity(BUILD, Declared(interface="eth0")))
    for word in ("LUKS", "disko", "swap", "secret", "TPM", "Secure Boot", "wireless", "interface"):
        assert word not in said
    assert "the boot loader: QEMU loads" in said


def test_a_machine_that_boots_through_its_boot_loader() -> None:
    said = "\n".join(lines(fidelity(replace(BUILD, boot_loader=True), LAPTOP)))
    assert "QEMU loads" not in said
    assert "lanzaboote on a virtual disk" in said


def test_a_static_address_that_qemu_can_t_have() -> None:
    server = Declared(interface="enp1s0", address=("5.9.1.2", 32))
    assert "5.9.1.2/32: set in the VM, but" in text(fidelity(BUILD, server))
    reachable = replace(BUILD, network_options="net=5.9.1.0/24")
    assert "5.9.1.2" not in text(fidelity(reachable, server))


def test_secrets_are_those_that_were_built_in() -> None:
    """The hook's are in the build only."""
    build = replace(BUILD, secrets=(*LAPTOP.secrets, Secret("token", "/etc/token")))
    said = text(fidelity(build, LAPTOP))
    assert "the secrets wifi (sops-nix): throwaway values" in said
    assert "the secrets token (pytest_nixvm_secrets): throwaway values" in said


def test_a_bare_derivation_has_nothing_to_compare_with() -> None:
    assert [entry.what for entry in fidelity(BUILD, None)] == ["option services.qemuGuest.enable"]
    assert text(()).startswith("Nothing")


def test_one_line_each() -> None:
    entries = fidelity(BUILD, LAPTOP)
    said = lines(entries)
    assert len(said) == len(entries)
    assert all("\n" not in line and len(line) <= 96 for line in said)


def test_an_image_has_disks_and_a_clock_of_its_own() -> None:
    said = text(fidelity(replace(BUILD, image="qcow2", boot_loader=True), LAPTOP))
    assert "file systems /, /boot of an installed machine: those of the image (qcow2)" in said
    for word in ("encrypted disks (LUKS)", "disko makes"):
        assert word in said
    assert "boot entries: the image's boot loader on a virtual disk" in said
    assert "it finds no server" in said
    for word in ("nothing is encrypted", "no swap", "QEMU loads kernel"):
        assert word not in said
