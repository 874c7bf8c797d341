"""What listens in the guest: read from the kernel, with its processes where they can be told.

Format of /proc/net/tcp: proc_net_tcp(5); addresses are words in the byte order of the machine.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

_SCRIPT = r"""
for table in tcp tcp6 udp udp6; do
  echo "nixvm $table"
  [ ! -r /proc/net/$table ] || cat /proc/net/$table
done
echo "nixvm cards"
for card in /sys/class/net/*/device; do
  [ ! -e "$card" ] || { card=${card%/device}; echo "${card##*/}"; }
done
echo "nixvm ss"
ss -Hltunp 2>/dev/null
"""
_CGROUPS = 'for pid; do echo "$pid $(cat /proc/$pid/cgroup 2>/dev/null | tail -n 1)"; done'

LISTENS, UNCONNECTED = "0A", "07"
"""The states of a TCP socket that listens, and of a UDP socket that takes from anybody."""


@dataclass(frozen=True)
class Listener:
    """A port that a process in the guest listens on."""

    protocol: str  # tcp or udp
    port: int
    addresses: tuple[str, ...]  # 0.0.0.0, ::, 192.168.1.5
    process: str = ""  # nginx; "" where it can't be told
    unit: str = ""  # nginx.service

    @property
    def everywhere(self) -> bool:
        """Whether it takes IPv4 connections on whatever address the machine has."""
        return "0.0.0.0" in self.addresses or "::" in self.addresses  # noqa: S104 - read, not bound

    def __str__(self) -> str:
        who = " of ".join(filter(None, (self.process, self.unit))) or "a process"
        return f"{self.protocol} port {self.port} ({who}, on {', '.join(self.addresses)})"


@dataclass(frozen=True)
class Sockets:
    """What listens on other addresses than the loopback's, and the machine's network cards."""

    listeners: tuple[Listener, ...]
    cards: tuple[str, ...]

    def on(self, port: int, protocol: str = "tcp") -> Listener | None:
        """Return what listens on a port."""
        for each in self.listeners:
            if (each.port, each.protocol) == (port, protocol):
                return each
        return None


def sockets(vm: Machine) -> Sockets:
    """Return what listens in the guest now. Raises `MachineError` as `vm.run` does."""
    parts = split(vm.run(_SCRIPT, timeout=120, check=True).stdout)
    owners = processes(parts.get("ss", ""))
    pids = sorted({str(pid) for _, pid in owners.values()})
    units: dict[str, str] = {}
    if pids:
        told = vm.run(["/bin/sh", "-c", _CGROUPS, "sh", *pids], timeout=120).stdout
        for line in told.splitlines():
            pid, _, group = line.partition(" ")
            units[pid] = unit_of(group)
    waiting: dict[int, str] = {}
    if "1" in pids:  # systemd listens for others
        waiting = socket_units(
            vm.systemd().call("list-sockets", "--all", "--plain", "--no-legend", "--full").stdout
        )
    found = []
    for protocol, port, addresses in _joined(parts):
        name, number = owners.get((protocol, port), ("", 0))
        unit = waiting.get(port, "") if number == 1 else units.get(str(number), "")
        found.append(Listener(protocol, port, addresses, name, unit))
    return Sockets(tuple(found), tuple(parts.get("cards", "").split()))


def split(text: str) -> dict[str, str]:
    """Return the script's output by part."""
    parts = {}
    for part in re.split(r"(?m)^nixvm ", text)[1:]:
        name, _, rest = part.partition("\n")
        parts[name] = rest
    return parts


def _joined(parts: dict[str, str]) -> Iterable[tuple[str, int, tuple[str, ...]]]:
    addresses: dict[tuple[str, int], list[str]] = {}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        protocol = table.removesuffix("6")
        for address, port in listening(parts.get(table, ""), protocol):
            if not is_loopback(address):
                addresses.setdefault((protocol, port), []).append(address)
    for (protocol, port), each in sorted(addresses.items()):
        yield protocol, port, tuple(dict.fromkeys(each))


def listening(table: str, protocol: str) -> list[tuple[str, int]]:
    """Return the addresses and ports of a table's sockets that wait for somebody to come."""
    wanted = LISTENS if protocol == "tcp" else UNCONNECTED
    found = []
    for line in table.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[3] == wanted and ":" in fields[1]:
            address, _, port = fields[1].rpartition(":")
            found.append((_address(address), int(port, 16)))
    return found


def _address(text: str) -> str:
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    packed = struct.pack(f"<{len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def is_loopback(address: str) -> bool:
    """Whether an address is reached from the machine itself only."""
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def processes(told: str) -> dict[tuple[str, int], tuple[str, int]]:
    """Return who listens, of `ss -Hltunp`: process name and pid by protocol and port."""
    found = {}
    for line in told.splitlines():
        fields = line.split()
        who = re.search(r'users:\(\("([^"]+)",pid=(\d+)', line)
        if len(fields) > 4 and who and (port := fields[4].rpartition(":")[2]).isdigit():
            found[fields[0], int(port)] = (who[1], int(who[2]))
    return found


def socket_units(told: str) -> dict[int, str]:
    """Return the socket units by port, of `systemctl list-sockets`."""
    found = {}
    for line in told.splitlines():
        address, _, rest = line.partition(" ")
        port = address.rpartition(":")[2]
        if port.isdigit() and rest.split():
            found[int(port)] = rest.split()[0]
    return found


def unit_of(group: str) -> str:
    """Return the unit of a control group: 0::/system.slice/nginx.service."""
    for part in reversed(group.strip().split("/")):
        if re.search(r"\.(?:service|scope)$", part):
            return part
    return ""
