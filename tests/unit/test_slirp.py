"""QEMU's user network takes on the guest's static address."""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess

import pytest

from pytest_nixvm.flake.slirp import network_options


def found(address: str | None, prefix: int | None, gateway: str | None = None) -> dict[str, object]:
    return {"name": "enp3s0", "address": address, "prefixLength": prefix, "gateway": gateway}


def test_the_gateway_is_qemu_and_the_first_dhcp_address_the_guest() -> None:
    options = network_options(found("192.168.1.10", 24, "192.168.1.1"))
    assert options == "net=192.168.1.0/24,host=192.168.1.1,dns=192.168.1.3,dhcpstart=192.168.1.10"


@pytest.mark.parametrize(
    ("address", "prefix", "gateway"),
    [
        ("192.168.1.2", 24, None),
        ("192.168.1.3", 24, "192.168.1.2"),
        ("10.0.0.3", 29, "10.0.0.1"),
        ("10.0.0.6", 29, None),
        ("172.16.0.1", 12, "172.31.255.254"),
        ("192.168.1.10", 24, "10.0.0.1"),  # a gateway of another network
        ("192.168.1.10", 24, "192.168.1.10"),  # its own: it is a router
        ("192.168.1.10", 24, "192.168.1.255"),
        ("192.168.1.10", 24, "fe80::1"),
    ],
)
def test_all_addresses_are_different_hosts_of_the_network(
    address: str, prefix: int, gateway: str | None
) -> None:
    options = dict(
        one.split("=") for one in network_options(found(address, prefix, gateway)).split(",")
    )
    net = ipaddress.IPv4Network(options.pop("net"))
    assert options["dhcpstart"] == address
    assert len(set(options.values())) == 3
    assert all(ipaddress.IPv4Address(one) in list(net.hosts()) for one in options.values()) or (
        net.prefixlen < 16
    )


@pytest.mark.parametrize(
    "network",
    [
        None,
        found(None, None),
        found("5.9.1.2", 32, "172.31.1.1"),
        found("10.0.0.1", 30, "10.0.0.2"),
        found("fd00::5", 64),
        found("192.168.1.0", 24),
        found("192.168.1.255", 24),
        found("127.0.0.2", 8),
        found("224.0.0.5", 8),
        found("10.0.0.1", 3),
        found("not an address", 24),
        found("10.0.0.1", None),
    ],
)
def test_nothing_where_it_is_not_needed_or_not_possible(network: dict[str, object] | None) -> None:
    assert network_options(network) == ""


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
@pytest.mark.parametrize(
    ("address", "prefix", "gateway"),
    [("192.168.1.10", 24, "192.168.1.1"), ("10.0.0.3", 29, None), ("172.16.0.2", 12, "172.31.0.1")],
)
def test_qemu_accepts_it_and_forwards_to_that_address(
    address: str, prefix: int, gateway: str | None
) -> None:
    options = network_options(found(address, prefix, gateway))
    done = subprocess.run(
        [
            *("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"),
            *("-netdev", f"user,id=user.0,restrict=on,{options},hostfwd=tcp:127.0.0.1:0-:22"),
            *("-monitor", "stdio", "-S"),
        ],
        input="info usernet\nquit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    forward = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+\d+\s+(\S+)\s+22", done.stdout)
    assert forward, done.stdout
    assert forward[1] == address
