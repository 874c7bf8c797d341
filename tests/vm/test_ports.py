"""The network of a VM as seen from outside, and QEMU's monitor."""

from __future__ import annotations

import socket
import time

import pytest

from pytest_nixvm.errors import QemuError, QmpError, WaitTimeoutError

pytestmark = pytest.mark.nixvm("dev-vm")


@pytest.fixture
def firewall(vm):
    """Let ports through, or reject, for one test."""

    def rule(text):
        vm.succeed(f"nft insert rule inet nixos-fw input {text}")

    before = vm.succeed("nft list ruleset")
    yield rule
    vm.run("nft -f -", stdin=f"flush ruleset\n{before}", check=True)


def listen(vm, address, port):
    """Start a service that accepts; the port is open when this returns."""
    vm.succeed(
        f"systemd-run --quiet --unit=nc-{port} nc -lk {address} {port}",
    )
    vm.wait_until_succeeds(f"ss -Hltn sport = :{port} | grep -q .", timeout=30)


def test_a_port_is_open_from_outside(vm):
    found = vm.reachable(22, timeout=20)

    assert found
    assert found.state == "open"
    assert "port 22 of dev-vm is open" in repr(found)


def test_the_firewall_drops(vm):
    listen(vm, "0.0.0.0", 8081)

    found = vm.reachable(8081, timeout=1)

    assert not found
    assert found.state == "filtered"
    assert 0.9 < found.seconds < 30


def test_nobody_listens_or_on_loopback_only(vm, firewall):
    firewall("tcp dport 8082-8084 accept")
    listen(vm, "127.0.0.1", 8083)
    listen(vm, "0.0.0.0", 8084)

    assert vm.reachable(8082, timeout=20).state == "closed"
    assert vm.reachable(8083, timeout=20).state == "closed"
    assert vm.reachable(8084, timeout=20).state == "open"


def test_a_forwarded_port(vm):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(QemuError, match=rf"port {taken} .*another process listens there"):
            vm.forward_port(taken, 22)
    # The one that was taken is free now.
    assert vm.forward_port(taken, 22) == taken
    assert vm.forward_port(taken, 22) == taken
    with pytest.raises(QemuError, match="forwarded to the guest's port 22 already"):
        vm.forward_port(taken, 23)
    for port in (taken, vm.port(22), vm.forward_port(0, 22)):
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.settimeout(90)
            assert client.recv(4) == b"SSH-"


def test_block_and_unblock(vm):
    assert vm.reachable(22, timeout=20)
    vm.block()
    try:
        assert vm.reachable(22, timeout=1).state == "filtered"
        assert vm.succeed("cat /sys/class/net/eth0/carrier") == "0\n"
    finally:
        vm.unblock()
    assert vm.reachable(22, timeout=30)


def test_the_human_monitor(vm):
    assert "VM status: running" in vm.send_monitor_command("info status")
    with pytest.raises(QmpError, match="no-such-command"):
        vm.send_monitor_command("no-such-command")


def test_events(vm):
    vm.qmp.execute("stop")
    vm.qmp.execute("cont")
    began = time.monotonic()

    event = vm.wait_for_qmp_event(lambda event: event["event"] == "STOP", timeout=10)

    assert set(event) == {"event", "data", "timestamp"}
    assert vm.wait_for_qmp_event(lambda event: event["event"] == "RESUME", timeout=10)
    assert time.monotonic() - began < 30
    with pytest.raises(WaitTimeoutError, match=r"(?s)QMP event of dev-vm.*in vain.*none"):
        vm.wait_for_qmp_event(lambda event: event["event"] == "STOP", timeout=0.2)
