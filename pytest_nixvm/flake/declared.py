"""What a configuration declares, as values: what a running machine is compared with.

`modules/declared.nix` reads it. An option that the flake's nixpkgs does not have gives the value
that means nothing: an empty tuple, False, "".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from pytest_nixvm.flake.build import Secret
from pytest_nixvm.flake.variant import secrets_of

__all__ = [
    "VALUES",
    "Declared",
    "FileSystem",
    "Firewall",
    "Interface",
    "Real",
    "Ssh",
    "User",
    "value_file",
]

PasswordKind = Literal["hashed", "plain", "file", "none"]
Ranges = tuple[tuple[int, int], ...]  # of ports, both ends included

# Where a machine keeps the throwaway values of its secrets: modules/secrets.sh.
VALUES = "/var/lib/nixvm/secrets"


def value_file(name: str) -> str:
    """Return where the machine keeps the value of the secret `name`.

    A value that is there when the machine's secrets are installed (when it boots, and at each
    switch) is used as it is; so this is where a particular value goes.
    """
    return f"{VALUES}/{name.replace('%', '%25').replace('/', '%2F')}"


@dataclass(frozen=True)
class User:
    """An account that somebody may use: a normal user, root, or one with a key or a password."""

    name: str
    normal: bool
    shell: str  # "" where NixOS's default applies
    home: str
    password: PasswordKind
    keys: int  # authorized keys, files of keys count once
    hashed: str | None = None  # the hash, where the configuration has it
    password_file: str | None = None  # where the hash is read from, on the machine


@dataclass(frozen=True)
class Interface:
    """A network interface that the configuration names."""

    name: str
    addresses: tuple[tuple[str, int], ...] = ()  # IPv4: address, length of the prefix
    dhcp: bool | None = None  # None: as for every interface


@dataclass(frozen=True)
class Ssh:
    """The machine's SSH server."""

    ports: tuple[int, ...]
    open_firewall: bool


@dataclass(frozen=True)
class Firewall:
    """What the firewall lets in."""

    enabled: bool
    tcp: Ranges = ()
    udp: Ranges = ()
    interface_tcp: Mapping[str, Ranges] = field(default_factory=dict)
    interface_udp: Mapping[str, Ranges] = field(default_factory=dict)
    trusted: tuple[str, ...] = ()  # interfaces through which everything comes in
    ping: bool = True
    own_rules: bool = False  # whether there are rules whose meaning only the firewall knows

    def opens(self, port: int, interface: str | None, protocol: str = "tcp") -> bool:
        """Whether a port is open from the outside, through `interface` where it has a name."""
        if not self.enabled or interface in self.trusted:
            return True
        everywhere, by_name = (
            (self.tcp, self.interface_tcp) if protocol == "tcp" else (self.udp, self.interface_udp)
        )
        here = by_name.get(interface, ()) if interface else ()
        return any(first <= port <= last for first, last in (*everywhere, *here))


@dataclass(frozen=True)
class FileSystem:
    """A mount of the real machine."""

    mount_point: str
    type: str
    device: str


@dataclass(frozen=True)
class Real:
    """What the real machine has, and its VM has not, or has otherwise."""

    file_systems: tuple[FileSystem, ...] = ()
    luks: tuple[str, ...] = ()
    swap: tuple[str, ...] = ()  # devices
    zram: bool = False
    disko: bool = False
    zfs: tuple[str, ...] = ()  # pools besides those of its file systems
    persistence: tuple[str, ...] = ()  # of impermanence: where what is kept is kept
    boot_loader: str = ""  # systemd-boot, GRUB, …; "" for none
    secure_boot: bool = False
    tpm2: bool = False
    initrd_network: bool = False  # to unlock it from afar, say
    initrd_secrets: tuple[str, ...] = ()  # files that its boot loader adds to the initrd
    video_drivers: tuple[str, ...] = ()
    wireless: bool = False
    bluetooth: bool = False
    time_sync: str = ""  # systemd-timesyncd, chrony, …; "" for none


@dataclass(frozen=True)
class Declared:
    """What one machine's configuration declares."""

    host_name: str = ""
    switchable: bool = True  # system.switch.enable
    ssh: Ssh | None = None
    firewall: Firewall = Firewall(enabled=False)
    users: tuple[User, ...] = ()
    home_manager: tuple[str, ...] = ()  # users
    home_secrets: tuple[str, ...] = ()  # users whose homes have secrets that nobody replaces
    secrets: tuple[Secret, ...] = ()  # of sops-nix and agenix
    templates: tuple[str, ...] = ()  # paths of sops-nix's templates: files with secrets in them
    specialisations: tuple[str, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    interface: str | None = None  # what QEMU's network interface is called in its VM
    other_interfaces: tuple[str, ...] = ()  # of hardware, too, but its VM has only one
    address: tuple[str, int] | None = None  # the static one of `interface`
    gateway: str | None = None
    kernel_modules: tuple[str, ...] = ()
    real: Real = Real()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Declared:
        """Return what modules/declared.nix said."""
        network: Mapping[str, Any] = data.get("network") or {}
        address = network.get("address")
        ssh = data.get("ssh")
        return cls(
            host_name=data.get("hostName") or "",
            switchable=data.get("switchable", True) is not False,
            ssh=Ssh(tuple(ssh["ports"]), bool(ssh["openFirewall"])) if ssh else None,
            firewall=_firewall(data.get("firewall") or {}),
            users=tuple(map(_user, data.get("users") or ())),
            home_manager=_texts(data, "homeManager"),
            home_secrets=_texts(data, "homeSecrets"),
            secrets=secrets_of(data.get("secrets") or ()),
            templates=_texts(data, "templates"),
            specialisations=_texts(data, "specialisations"),
            interfaces=tuple(
                Interface(
                    one["name"],
                    tuple((str(text), int(length)) for text, length in one.get("addresses") or ()),
                    one.get("dhcp"),
                )
                for one in data.get("interfaces") or ()
            ),
            interface=network.get("name"),
            other_interfaces=_texts(network, "others"),
            address=(str(address), int(network["prefixLength"])) if address else None,
            gateway=network.get("gateway") or data.get("gateway"),
            kernel_modules=_texts(data, "kernelModules"),
            real=_real(data.get("real") or {}),
        )


def _texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(str(one) for one in data.get(key) or ())


def _ranges(pairs: Sequence[Sequence[int]] | None) -> Ranges:
    return tuple(sorted({(int(first), int(last)) for first, last in pairs or ()}))


def _by_name(data: Mapping[str, Any] | None) -> dict[str, Ranges]:
    return {name: _ranges(pairs) for name, pairs in (data or {}).items()}


def _firewall(data: Mapping[str, Any]) -> Firewall:
    return Firewall(
        enabled=bool(data.get("enabled")),
        tcp=_ranges(data.get("tcp")),
        udp=_ranges(data.get("udp")),
        interface_tcp=_by_name(data.get("interfaceTcp")),
        interface_udp=_by_name(data.get("interfaceUdp")),
        trusted=_texts(data, "trusted"),
        ping=data.get("ping") is not False,
        own_rules=bool(data.get("ownRules")),
    )


def _user(data: Mapping[str, Any]) -> User:
    return User(
        name=data["name"],
        normal=bool(data.get("normal")),
        shell=data.get("shell") or "",
        home=data.get("home") or "",
        password=cast(PasswordKind, data.get("password") or "none"),
        keys=int(data.get("keys") or 0),
        hashed=data.get("hashed"),
        password_file=data.get("passwordFile"),
    )


def _real(data: Mapping[str, Any]) -> Real:
    return Real(
        file_systems=tuple(
            FileSystem(one["mountPoint"], one.get("fsType") or "auto", one.get("device") or "")
            for one in data.get("fileSystems") or ()
        ),
        luks=_texts(data, "luks"),
        swap=_texts(data, "swap"),
        zram=bool(data.get("zram")),
        disko=bool(data.get("disko")),
        zfs=_texts(data, "zfs"),
        persistence=_texts(data, "persistence"),
        boot_loader=data.get("bootLoader") or "",
        secure_boot=bool(data.get("secureBoot")),
        tpm2=bool(data.get("tpm2")),
        initrd_network=bool(data.get("initrdNetwork")),
        initrd_secrets=_texts(data, "initrdSecrets"),
        video_drivers=_texts(data, "videoDrivers"),
        wireless=bool(data.get("wireless")),
        bluetooth=bool(data.get("bluetooth")),
        time_sync=data.get("timeSync") or "",
    )
