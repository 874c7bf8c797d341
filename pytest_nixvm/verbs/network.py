"""The VM's network as seen from outside."""

from __future__ import annotations

from pytest_nixvm.qemu.network import Reached
from pytest_nixvm.verbs.guest import Guest


class Network(Guest):
    """Forwarded ports, what the guest's firewall lets through, and the cable. TCP only."""

    def forward_port(self, host_port: int = 8080, guest_port: int = 80) -> int:
        """Forward a TCP port of this host to the guest's; return the host's port.

        The NixOS test driver's verb, but on 127.0.0.1 only: a VM under test is nobody else's
        business. With `host_port` 0 QEMU chooses a free one. Raises `QemuError` if the host's port
        is in use or the VM has no user-mode network.
        """
        return self.qemu.network.forward(guest_port, host_port)

    def port(self, guest_port: int) -> int:
        """Return a port of 127.0.0.1 that leads to the guest's TCP port, the same one each time.

        It accepts connections whether or not anybody listens in the guest: see `reachable`.
        """
        return self.qemu.network.forward(guest_port)

    def reachable(self, port: int, timeout: float = 5.0) -> Reached:
        """Try the guest's TCP port from outside, through its firewall.

            assert vm.reachable(22)
            assert vm.reachable(5432).state == "filtered"

        The result is true if the port is open, and its `state` says what it is otherwise: "closed"
        (refused) or "filtered" (no answer within `timeout` seconds). What listens on the guest's
        loopback only is not reachable. Nothing is sent; the service sees a connection that is
        closed at once (OpenSSH 9.8 or newer refuses a client for a while that makes many such).
        """
        with self.transcript.note("wait", f"port {port} from outside", channel="network") as entry:
            found = self.qemu.network.reach(port, timeout)
            entry.outcome = found.state
        return found

    def block(self) -> None:
        """Pull the network cables: all of them, where the NixOS test driver pulls eth1's only.

        Forwarded ports and SSH (`vm.ssh`) are cut off as well, until `unblock`; commands, the agent
        and the serial console are not. Raises `QemuError` if the VM has no network card.
        """
        with self.transcript.note("power", "pull the network cables"):
            self.qemu.network.plug(False)

    def unblock(self) -> None:
        """Undo `block`. The guest's network manager may take a moment to notice."""
        with self.transcript.note("power", "plug the network cables in"):
            self.qemu.network.plug(True)
