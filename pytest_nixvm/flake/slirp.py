"""Addresses for QEMU's user network, so that a machine with a static address is reached at it.

QEMU's network is 10.0.2.0/24 unless it is told otherwise, and it forwards a port to its first
DHCP address unless it is told to which. A guest that has 192.168.1.10 in its configuration hears
nothing of that; so QEMU's network becomes the guest's, the gateway becomes QEMU's own address in
it, and the guest's address the first that DHCP would give. It stays a network of QEMU's alone: the
real 192.168.1.0/24 is not reached through it.

Source of the rules: QEMU's net/slirp.c, net_slirp_init, and libslirp's slirp_add_hostfwd.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any

__all__ = ["network_options"]

# Guest, gateway and name server must differ; the first and the last address are nobody's.
_LONGEST_PREFIX = 29
_SHORTEST_PREFIX = 4  # QEMU refuses shorter ones

# What QEMU picks by itself, as far as it fits: hosts .2 and .3 of the network.
_HOST, _DNS = 2, 3


def network_options(found: Mapping[str, Any] | None) -> str:
    """Return what QEMU's user network is told: "net=192.168.1.0/24,host=192.168.1.1,…".

    `found` is what modules/interface.nix found, with `address`, `prefixLength` and `gateway`.
    Returns "" where QEMU's own network will do (no static address), or where none can be made of
    the address: not IPv4, a loopback or multicast one, or a prefix too small for three hosts. Then
    forwarded ports don't reach the machine, while the agent and the shell do.
    """
    if not found or not found.get("address"):
        return ""
    try:
        guest = ipaddress.IPv4Interface(f"{found['address']}/{found.get('prefixLength')}")
    except ValueError:
        return ""
    net = guest.network
    if not _SHORTEST_PREFIX <= net.prefixlen <= _LONGEST_PREFIX or not _is_usable(guest.ip, net):
        return ""
    gateway = _gateway(found.get("gateway"), guest)
    host = gateway or _free(net, _HOST, {guest.ip})
    dns = _free(net, _DNS, {guest.ip, host})
    return f"net={net},host={host},dns={dns},dhcpstart={guest.ip}"


def _gateway(text: object, guest: ipaddress.IPv4Interface) -> ipaddress.IPv4Address | None:
    """Return the gateway if QEMU can be it."""
    try:
        gateway = ipaddress.IPv4Address(str(text))
    except ValueError:
        return None
    if (
        gateway not in guest.network
        or gateway == guest.ip
        or not _is_usable(gateway, guest.network)
    ):
        return None
    return gateway


def _is_usable(address: ipaddress.IPv4Address, net: ipaddress.IPv4Network) -> bool:
    if address in (net.network_address, net.broadcast_address):
        return False
    return not (address.is_loopback or address.is_multicast or address.is_unspecified)


def _free(
    net: ipaddress.IPv4Network, first: int, taken: set[ipaddress.IPv4Address]
) -> ipaddress.IPv4Address:
    """Return the first address from the `first`th on that nobody has; the rest of it is behind."""
    hosts = net.num_addresses - 2
    for n in range(hosts):
        address = net.network_address + 1 + (first - 1 + n) % hosts
        if address not in taken:
            return address
    raise AssertionError(f"{net} is too small")  # not with _LONGEST_PREFIX
