"""The VM's network as seen from outside."""

from __future__ import annotations

from pytest_nixvm.verbs.guest import Guest


class Network(Guest):
    """Forwarded ports."""

    def forward_port(self, guest_port: int) -> int:
        """Forward a port of this host's loopback to the guest's TCP port; return the host's."""
        return self.qemu.forward(guest_port)
