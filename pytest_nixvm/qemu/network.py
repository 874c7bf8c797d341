"""The VM's user-mode network (SLIRP): forwarded ports, what they reach, and the cables.

Source of the format of `info usernet`: libslirp's src/misc.c, slirp_connection_info.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pytest_nixvm.errors import QemuError, QmpError
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.wait import Deadline

LOOPBACK = "127.0.0.1"

_ENTRY = re.compile(
    r"\s*TCP\[(?P<state>[A-Z0-9_]+)\]\s+(?P<fd>-?\d+)\s+\S+\s+(?P<host>\d+)\s+\S+\s+(?P<guest>\d+)\b"
)
# Until the guest has answered, one way or the other.
_ASKING = ("SYN_SENT", "SYN_RCVD", "CLOSED", "LISTEN")

State = Literal["open", "closed", "filtered"]


@dataclass(frozen=True)
class Reached:
    """Whether a TCP port of the guest can be reached from outside. True in a test if it is open.

    `state` is "open" (somebody has accepted), "closed" (the guest has refused: nobody listens, or
    its firewall rejects) or "filtered" (no answer in time: its firewall drops, its network or its
    address is not up, or the cable is unplugged).
    """

    state: State
    port: int
    machine: str
    seconds: float  # how long it took to know

    def __bool__(self) -> bool:
        return self.state == "open"

    def __repr__(self) -> str:
        meaning = {
            "open": "accepted",
            "closed": "refused",
            "filtered": "no answer",
        }[self.state]
        return (
            f"<port {self.port} of {self.machine} is {self.state}: "
            f"{meaning} after {self.seconds:.2g} s>"
        )


@dataclass(frozen=True)
class _Entry:
    """A line of `info usernet` about TCP; a `state` of HOST_FORWARD is a forward itself."""

    state: str
    fd: int
    host_port: int
    guest_port: int


class Network:
    """The network of one running QEMU. All methods may be called from several threads."""

    def __init__(self, monitor: Monitor, argv: Sequence[str], name: str) -> None:
        self._monitor = monitor
        self._argv = argv
        self._name = name
        self._lock = threading.Lock()  # what is new after hostfwd_add is ours
        self._chosen: dict[int, int] = {}  # guest's port -> host's that QEMU chose

    # --- forwards ---

    def forward(self, guest_port: int, host_port: int = 0) -> int:
        """Forward a TCP port of 127.0.0.1 to one of the guest; return the host's port.

        Of `host_port` 0 QEMU chooses a free one, the same each time. That it accepts connections
        proves nothing about the guest: QEMU accepts first. Raises `QemuError` if the host's port is
        in use, or the VM has no user-mode network.
        """
        with self._lock:
            if host_port == 0:
                if guest_port not in self._chosen:
                    self._chosen[guest_port] = self._add(self._netdev(), guest_port, 0)
                return self._chosen[guest_port]
            netdev = self._netdev()
            ours = {e.host_port: e.guest_port for e in self._forwards(netdev)}
            if ours.get(host_port) == guest_port:
                return host_port
            if host_port in ours:
                raise QemuError(
                    f"{self._name}: port {host_port} of {LOOPBACK} is forwarded to the guest's "
                    f"port {ours[host_port]} already."
                )
            return self._add(netdev, guest_port, host_port)

    def _add(self, netdev: str, guest_port: int, host_port: int) -> int:
        before = self._forwards(netdev)
        rule = f"tcp:{LOOPBACK}:{host_port}-:{guest_port}"
        said = ""
        try:
            said = self._monitor.hmp(f"hostfwd_add {netdev} {rule}").strip()
        except QmpError as error:
            if not error.description:
                raise  # no answer at all
            said = error.description
        if said:
            why = _why_not(host_port)
            raise QemuError(
                f"{self._name}: QEMU can't forward port {host_port} of {LOOPBACK} to the guest's "
                f"port {guest_port}: {why or said}"
            )
        new = self._forwards(netdev) - before
        ports = [entry.host_port for entry in new if entry.guest_port == guest_port]
        if not ports:
            raise QemuError(
                f"{self._name}: QEMU forwards a port to port {guest_port}, but does not say "
                f"which:\n{self._monitor.hmp('info usernet')}"
            )
        return ports[0]

    def _netdev(self) -> str:
        for option, value in itertools.pairwise(self._argv):
            if option in ("-netdev", "-nic", "-net", "--netdev", "--nic", "--net") and re.match(
                r"(type=)?user\b", value
            ):
                match = re.search(r"\bid=([^,]+)", value)
                if match:
                    return match[1]
        raise QemuError(
            f"{self._name} has no user-mode network (`-netdev user,id=…`) on its QEMU command "
            "line, so no port can be forwarded into it. Does its configuration replace "
            "virtualisation.qemu.networkingOptions?"
        )

    def _forwards(self, netdev: str) -> set[_Entry]:
        return {entry for entry in self._entries(netdev) if entry.state == "HOST_FORWARD"}

    def _entries(self, netdev: str) -> set[_Entry]:
        """Return the TCP forwards and connections of `netdev`.

        `info usernet` prints a line for each back end, then a table. The ports of a connection
        through a forward are those of the forward, not its client's:

            Hub -1 (user.0):
              Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
              TCP[SYN_SENT]      13       127.0.0.1 36519       10.0.2.15    22     0     0
              TCP[HOST_FORWARD]  12       127.0.0.1 36519       10.0.2.15    22     0     0
        """
        found = set()
        ours = True
        for line in self._monitor.hmp("info usernet").splitlines():
            header = re.match(r"\S.*?\(?([^\s()]+)\)?:\s*$", line)
            if header:
                ours = header[1] == netdev
                continue
            match = _ENTRY.match(line)
            if match and ours:
                fd, host, guest = (int(match[name]) for name in ("fd", "host", "guest"))
                found.add(_Entry(match["state"], fd, host, guest))
        return found

    # --- reaching a port ---

    def reach(self, guest_port: int, timeout: float) -> Reached:
        """Try to connect to a TCP port of the guest from outside, as its network card sees it.

        QEMU accepts on the host before the guest has said anything, so the guest's answer is read
        from QEMU's table of connections. No data is sent, and the connection is closed at once.
        """
        deadline = Deadline(timeout)
        with self._forward_for_now(guest_port) as (netdev, host_port):
            before = {entry.fd for entry in self._entries(netdev)}
            with socket.create_connection((LOOPBACK, host_port), 10) as client:
                state: State | None = None
                while state is None:
                    state = self._answer(client, netdev, host_port, before)
                    if state is None and deadline.expired:
                        state = "filtered"
                    if state is None:
                        # A refusal, or the service's first word, ends the pause.
                        select.select([client], [], [], deadline.remaining(0.01))
        return Reached(state, guest_port, self._name, deadline.elapsed)

    def _answer(
        self, client: socket.socket, netdev: str, host_port: int, before: set[int]
    ) -> State | None:
        ended = False
        if select.select([client], [], [], 0)[0]:
            try:
                if client.recv(1, socket.MSG_PEEK):
                    return "open"
            except ConnectionError:
                pass
            ended = True
        # Looked up after the end was seen: a service that hung up is still in the table, because
        # our side is open; a connection that was refused is not.
        states = [
            entry.state
            for entry in self._entries(netdev)
            if entry.host_port == host_port
            and entry.state != "HOST_FORWARD"
            and entry.fd not in before
        ]
        if any(state not in _ASKING for state in states):
            return "open"
        return "closed" if ended else None

    @contextlib.contextmanager
    def _forward_for_now(self, guest_port: int) -> Iterator[tuple[str, int]]:
        # One of its own: on a shared one the connections can't be told apart.
        with self._lock:
            netdev = self._netdev()
            host_port = self._add(netdev, guest_port, 0)
        try:
            yield netdev, host_port
        finally:
            with contextlib.suppress(QemuError):
                self._monitor.hmp(f"hostfwd_remove {netdev} tcp:{LOOPBACK}:{host_port}")

    # --- cables ---

    def plug(self, plugged: bool) -> None:
        """Plug in, or pull, the cables of all network cards. Raises `QemuError` if there are none.

        `info network` says which cards there are; QMP has no command that does:

            virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
        """
        text = self._monitor.hmp("info network")
        cards = re.findall(r"(?m)^(?:.*\s)?([^\s:]+): index=\d+,type=nic\b", text)
        if not cards:
            raise QemuError(f"{self._name} has no network card, so there is no cable to pull.")
        for card in cards:
            self._monitor.execute("set_link", {"name": card, "up": plugged})


def _why_not(host_port: int) -> str:
    """Say what keeps QEMU, which doesn't tell, from listening there; "" if nothing does."""
    if not 0 < host_port < 65536:
        return ""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, host_port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "another process listens there. forward_port(0, …) takes a free one."
            return f"{error.strerror}."
    return ""
