"""What the flake side hands to the rooms above: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Override:
    """One option whose value differs from the user's own configuration, and why."""

    option: str  # services.qemuGuest.enable
    value: str  # as Nix writes it: true, "text", 512
    reason: str


@dataclass(frozen=True)
class MachineInfo:
    """A machine that the flake has."""

    name: str  # dev-vm
    attribute: str  # nixosConfigurations.dev-vm
    system: str  # x86_64-linux; "" where the configuration does not say
    skip: str | None = None  # why it can't be tested here: another architecture, Darwin
    image: str | None = None  # the format of the image that it boots from: qcow2, ova, …


@dataclass(frozen=True)
class Secret:
    """A secret that the configuration expects at run time; its value is nowhere in here."""

    name: str
    path: str  # where the machine expects it
    owner: str = "root"
    group: str = "root"
    mode: str = "0400"
    provider: str = "hook"  # sops, age, or the hook `pytest_nixvm_secrets`
    restart_units: tuple[str, ...] = ()  # what its module restarts when it changes
    reload_units: tuple[str, ...] = ()


@dataclass(frozen=True)
class VmBuild:
    """A machine's VM, built and safe from garbage collection."""

    name: str  # dev-vm: the machine's name in the flake
    attribute: str  # nixosConfigurations.dev-vm
    start_script: Path  # /nix/store/…/bin/run-*-vm
    output: Path  # the derivation's output
    toplevel: Path | None  # the system, None if the output has no link to it
    system: str  # x86_64-linux
    overrides: tuple[Override, ...]
    freezable: bool  # whether it was built without shares, so that it can be frozen and cloned
    evaluated: float  # seconds spent evaluating, 0 if that was remembered
    built: float  # seconds spent building or fetching, 0 if it was there
    boot_loader: bool = False  # whether it boots through the machine's own boot loader
    carries: tuple[Path, ...] = ()  # toplevels that are in its store besides its own
    network_options: str = ""  # for QEMU's user network, where the machine's address is static
    secrets: tuple[Secret, ...] = ()  # what gets throwaway values when it boots
    image: str | None = None  # the format of the image that it boots from


# What nixpkgs' qemu-vm.nix replaces in every VM build, ours or `nixos-rebuild build-vm`, with
# mkVMOverride: none of this is the real machine's, and a test can't vouch for it.
ALWAYS_REPLACED: tuple[tuple[str, str], ...] = (
    ("fileSystems", "the VM's root disk, the store and the shares"),
    ("swapDevices", "none"),
    ("boot.initrd.luks.devices", "none: nothing is encrypted"),
    ("boot.loader", "QEMU loads the kernel itself, or the loader is put on a virtual disk"),
    ("networking.usePredictableInterfaceNames", "false: the interfaces are eth0, eth1, …"),
    ("networking.wireless.enable", "false"),
    ("services.timesyncd.enable", "false: the clock comes from QEMU"),
    ("services.connman.enable", "false"),
    ("powerManagement.cpuFreqGovernor", "none"),
    ("hardware", "virtual devices; what the real machine's need is not tested"),
)
