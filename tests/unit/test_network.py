"""Forwards, probes and cables, on what QEMU's tables say; a real guest is in tests/vm."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

import pytest

from pytest_nixvm.errors import QemuError, QmpError
from pytest_nixvm.qemu.network import Network

ARGV = ["qemu", "-netdev", "user,id=user.0,restrict=on"]


class Monitor:
    """QEMU's monitor as far as the network asks it; the forwards are real listening sockets.

    `states` are what the table says of a connection, one after the other, the last for good; None
    is no line.
    """

    def __init__(self, states: list[str | None], *, hang_up: bool = False) -> None:
        self.states = states
        self.hang_up = hang_up
        self.listener: socket.socket | None = None
        self.accepted: list[socket.socket] = []
        self.guest_port = 0
        self.links: list[tuple[str, bool]] = []
        self.network = (
            "virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci\n"
            " \\ user.0: index=0,type=user,net=10.0.2.0\n"
            "hub 0\n \\ hub0port1: e1000.0: index=0,type=nic,model=e1000\n"
        )

    def execute(self, command: str, arguments: dict, **_: object) -> dict:
        assert command == "set_link"
        self.links.append((arguments["name"], arguments["up"]))
        return {}

    def hmp(self, line: str) -> str:
        command, *words = line.split()
        if command == "hostfwd_add":
            self.guest_port = int(words[1].rpartition(":")[2])
            self.listener = socket.create_server(("127.0.0.1", 0))
        elif command == "hostfwd_remove":
            assert self.listener is not None
            self.listener.close()
            self.listener = None
        elif line == "info network":
            return self.network
        return self._table() if line == "info usernet" else ""

    def _table(self) -> str:
        rows = [
            "Hub -1 (other):",
            "  TCP[ESTABLISHED]  90       127.0.0.1  4444       10.0.2.15    22     0     0",
            "Hub -1 (user.0):",
            "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ",
            "  UDP[236 sec]       33       10.0.2.15 40000        10.0.2.3    53     0     0",
        ]
        if self.listener is not None:
            host = self.listener.getsockname()[1]
            rows.append(
                f"  TCP[HOST_FORWARD]  12  127.0.0.1 {host}  10.0.2.15  {self.guest_port}  0  0"
            )
            self.listener.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                self.accepted.append(self.listener.accept()[0])
            if self.accepted:
                state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
                if state is not None:
                    rows.append(
                        f"  TCP[{state}]  13  127.0.0.1 {host}  10.0.2.15  {self.guest_port} 0 0"
                    )
                elif self.hang_up:
                    self.accepted[0].close()
        return "\r\n".join(rows)


@pytest.fixture
def network_of() -> Callable[..., tuple[Network, Monitor]]:
    def make(states: list[str | None], **more: bool) -> tuple[Network, Monitor]:
        monitor = Monitor(states, **more)
        return Network(monitor, ARGV, "tiny"), monitor  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("last", ["ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT_2", "A_NEW_ONE"])
def test_open(network_of, last):
    network, monitor = network_of(["SYN_SENT", "SYN_SENT", last])

    found = network.reach(80, 20)

    assert found
    assert found.state == "open"
    assert found.port == 80
    assert monitor.listener is None  # the forward is gone


def test_closed(network_of):
    network, _ = network_of(["SYN_SENT", None], hang_up=True)

    found = network.reach(80, 20)

    assert not found
    assert found.state == "closed"
    assert "port 80 of tiny is closed: refused" in repr(found)


def test_filtered(network_of):
    network, _ = network_of(["SYN_SENT"])

    found = network.reach(80, 0.2)

    assert found.state == "filtered"
    assert 0.2 <= found.seconds < 5


def test_a_chosen_port_is_the_same_each_time(network_of):
    network, monitor = network_of([None])

    first = network.forward(22)

    assert network.forward(22) == first
    assert first == monitor.listener.getsockname()[1]
    assert network.forward(22, first) == first
    with pytest.raises(QemuError, match="forwarded to the guest's port 22 already"):
        network.forward(80, first)


def test_a_port_in_use(network_of, monkeypatch):
    network, monitor = network_of([None])
    hmp = monitor.hmp

    def refuse(line: str) -> str:
        if line.startswith("hostfwd_add"):
            text = "Could not set up host forwarding rule"
            raise QmpError("tiny: failed", error_class="GenericError", description=text)
        return hmp(line)

    monkeypatch.setattr(monitor, "hmp", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(QemuError, match=f"port {taken} of .*another process listens there"):
            network.forward(80, taken)
    with pytest.raises(QemuError, match="Could not set up host forwarding rule"):
        network.forward(80)


def test_every_cable_is_pulled(network_of):
    network, monitor = network_of([None])

    network.plug(False)

    assert monitor.links == [("virtio-net-pci.0", False), ("e1000.0", False)]


def test_no_card_to_pull_a_cable_from(network_of):
    network, monitor = network_of([None])
    monitor.network = ""

    with pytest.raises(QemuError, match="no network card"):
        network.plug(False)


def test_no_user_mode_network():
    with pytest.raises(QemuError, match="tiny has no user-mode network"):
        Network(Monitor([None]), ["qemu"], "tiny").reach(22, 1)
