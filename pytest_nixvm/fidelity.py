"""What a machine's VM is not: what was changed in it, so what a test of it can't vouch for.

Only what the configuration has is named: a machine without LUKS gets no line about LUKS. Nothing
here is a defect. Whoever reads "all passed" is told what was not looked at.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pytest_nixvm.flake.build import Override, VmBuild
from pytest_nixvm.flake.declared import Declared, Real
from pytest_nixvm.flake.words import listed

__all__ = ["NotTested", "fidelity", "lines", "text"]

_WIDTH = 96
_QEMU_VM = "nixpkgs replaces it in every VM build, `nixos-rebuild build-vm` too"
_OF_AN_IMAGE = "nixpkgs makes the partitions of an image"
_NO_HARDWARE = "QEMU's devices are virtual"
_MOST = 6  # names in one line


@dataclass(frozen=True)
class NotTested:
    """One thing of the real machine that its VM has not, or has otherwise.

    `because` is the reason, a sentence without its full stop.
    """

    what: str
    instead: str
    because: str

    def __str__(self) -> str:
        return f"{self.what}: {self.instead}"


def fidelity(build: VmBuild, declared: Declared | None) -> tuple[NotTested, ...]:
    """Return what the VM of a machine does not test, what matters most first.

    `declared` is None for what has no configuration, a bare derivation: then only the options are
    known that the plugin itself has changed.
    """
    found: list[NotTested] = []
    if declared is not None:
        found += _disks(declared.real) if build.image is None else _image(build, declared.real)
        found += _boot(build, declared.real)
        found += _network(build, declared)
        found += _secrets(build, declared)
        found += _hardware(build, declared.real)
    return (*found, *_overrides(build.overrides))


def lines(entries: Sequence[NotTested]) -> list[str]:
    """Return one line for each, for the terminal."""
    return [textwrap.shorten(str(entry), _WIDTH, placeholder=" …") for entry in entries]


def text(entries: Sequence[NotTested]) -> str:
    """Return everything, with the reasons."""
    if not entries:
        return "Nothing: the VM is the machine as it is configured, on virtual hardware.\n"
    return "".join(f"{entry}\n    ({entry.because})\n" for entry in entries)


# --- one subject each ------------------------------------------------------------------------


def _disks(real: Real) -> Iterator[NotTested]:
    mounts = [
        f"{fs.mount_point} ({fs.type})" if fs.type != "auto" else fs.mount_point
        for fs in real.file_systems
    ]
    if mounts:
        yield NotTested(
            f"file systems {_names(mounts)}",
            "one new disk for /, in ext4, and QEMU's shares or image for the store",
            f"the VM has none of the machine's disks: {_QEMU_VM}",
        )
    if real.luks:
        yield NotTested(
            f"encryption (LUKS) of {_names(real.luks)}",
            "nothing is encrypted, no passphrase is asked for",
            _QEMU_VM,
        )
    if real.disko:
        yield NotTested(
            "the partitions that disko makes", "not made", "disko runs when a machine is installed"
        )
    if real.zfs:
        yield NotTested(
            f"ZFS pools {_names(real.zfs)}", "not there", "they are on the machine's disks"
        )
    if real.persistence:
        yield NotTested(
            f"what persists in {_names(real.persistence)}",
            "all of / persists, until the VM is thrown away",
            _QEMU_VM,
        )
    if real.swap:
        yield NotTested(f"swap on {_names(real.swap)}", "no swap", _QEMU_VM)


def _image(build: VmBuild, real: Real) -> Iterator[NotTested]:
    mounts = [fs.mount_point for fs in real.file_systems]
    if mounts:
        yield NotTested(
            f"file systems {_names(mounts)} of an installed machine",
            f"those of the image ({build.image})",
            _OF_AN_IMAGE,
        )
    for what, names in (("encrypted disks (LUKS)", real.luks), ("ZFS pools", real.zfs)):
        if names:
            yield NotTested(f"{what} {_names(names)}", "not in the image", _OF_AN_IMAGE)
    if real.disko:
        yield NotTested("the partitions that disko makes", "not made", _OF_AN_IMAGE)


def _boot(build: VmBuild, real: Real) -> Iterator[NotTested]:
    if not build.boot_loader:
        yield NotTested(
            f"the boot loader ({real.boot_loader})" if real.boot_loader else "the boot loader",
            "QEMU loads kernel and initrd itself",
            "the boot loader mode (--nixvm-boot-loader) puts one on a virtual disk",
        )
    else:
        # An image may have another one than the machine: isolinux on an ISO, GRUB for a BIOS.
        loader = "the image's boot loader" if build.image else real.boot_loader or "the boot loader"
        yield NotTested(
            "the machine's firmware and its boot entries",
            f"{loader} on a virtual disk, on QEMU's firmware",
            _NO_HARDWARE,
        )
    if real.secure_boot:
        yield NotTested("Secure Boot", "off", "the keys are the machine's")
    if real.tpm2:
        yield NotTested(
            "the TPM",
            "none, unless virtualisation.tpm.enable is set; then an empty one",
            _NO_HARDWARE,
        )
    if real.initrd_secrets:
        yield NotTested(
            f"secrets in the initrd: {_names(real.initrd_secrets)}",
            "not there",
            "they are files of the machine, which its boot loader adds",
        )
    if real.initrd_network:
        yield NotTested(
            "the network in the initrd",
            "nothing is unlocked from afar",
            "there is nothing to unlock",
        )


def _network(build: VmBuild, declared: Declared) -> Iterator[NotTested]:
    name = declared.interface
    if name and name != "eth0":
        yield NotTested(
            f"the network card {name}",
            f"QEMU's card, called {name}",
            "so that its addresses and firewall rules apply; its own driver is not used",
        )
    elif name is None:
        yield NotTested(
            "the name of the network card", "eth0", f"the configuration names none; {_QEMU_VM}"
        )
    if declared.other_interfaces:
        yield NotTested(
            f"the interfaces {_names(declared.other_interfaces)}",
            "not there: what is configured for them applies to nothing",
            "the VM has one network card",
        )
    if declared.address and not build.network_options:
        address = "/".join(map(str, declared.address))
        yield NotTested(
            f"the address {address}",
            "set in the VM, but its ports can't be reached from outside it",
            "QEMU's network can't be made of this address and prefix",
        )
    if declared.real.wireless:
        yield NotTested("the wireless network", "none", _NO_HARDWARE)
    if declared.real.bluetooth:
        yield NotTested("Bluetooth", "no adapter", _NO_HARDWARE)


def _secrets(build: VmBuild, declared: Declared) -> Iterator[NotTested]:
    secrets = build.secrets or declared.secrets
    providers = {"sops": "sops-nix", "age": "agenix", "hook": "pytest_nixvm_secrets"}
    for provider, who in providers.items():
        names = [secret.name for secret in secrets if secret.provider == provider]
        if names:
            yield NotTested(
                f"the secrets {_names(names)} ({who})",
                "throwaway values, at the declared path, owner and mode",
                "a VM has no key to decrypt them, and should have none"
                if provider != "hook"
                else "the hook names them",
            )
    if declared.home_secrets:
        yield NotTested(
            f"the secrets in the homes of {_names(declared.home_secrets)}",
            "none: the user units that would decrypt them fail",
            "only the system's own secrets get throwaway values",
        )
    if declared.templates:
        yield NotTested(
            f"the templates {_names(declared.templates)}",
            "filled with the throwaway values",
            "sops-nix's own program does not run",
        )


def _hardware(build: VmBuild, real: Real) -> Iterator[NotTested]:
    if real.time_sync == "systemd-timesyncd" and build.image is None:
        yield NotTested("time synchronisation (systemd-timesyncd)", "QEMU's clock", _QEMU_VM)
    elif real.time_sync:
        yield NotTested(
            f"time synchronisation ({real.time_sync})",
            "QEMU's clock; it finds no server while the VM is isolated",
            'no network beyond the VM\'s own, unless network="nat"',
        )
    if real.video_drivers:
        yield NotTested(
            f"the video drivers {_names(real.video_drivers)}",
            "QEMU's display, without acceleration",
            _NO_HARDWARE,
        )
    yield NotTested(
        "kernel modules and firmware for the machine's hardware", "for QEMU's devices", _NO_HARDWARE
    )


def _overrides(overrides: Iterable[Override]) -> Iterator[NotTested]:
    for one in overrides:
        yield NotTested(f"option {one.option}", one.value, one.reason)


def _names(names: Sequence[str]) -> str:
    return listed(list(names), _MOST)
