"""The virtio ports that shells in the guest are on: two each, more of them while the VM runs.

A port carries one stream each way, so a shell with stdout and stderr apart needs two. The first
pair is on QEMU's command line; `Ports.plug` adds more through QMP, and `Ports.unplug` takes those
away again, for whoever needs the VM with its command line's devices only.

Sources: QEMU's hw/char/virtio-serial-bus.c, Linux' drivers/char/virtio_console.c.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm.errors import QmpError
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.wait import poll

BUS = "nixvm-ports.0"
"""QEMU's id of the bus that the ports are on; it takes 30 of them."""

MOST = 8
"""Pairs of ports at most: more commands at once than that wait for each other in any guest."""


@dataclass(frozen=True)
class Port:
    """One port: its name in the guest, QEMU's ids, and the socket that is its host's end."""

    name: str
    id: str
    chardev: str
    socket: Path


@dataclass(frozen=True)
class Pair:
    """The ports of one shell: commands go in and stdout comes out on one, stderr on the other."""

    number: int
    main: Port
    error: Port

    @classmethod
    def make(cls, sockets: Path, number: int) -> Pair:
        """Return pair `number` with its sockets in the directory `sockets`."""
        return cls(number, _port(sockets, f"{number}"), _port(sockets, f"{number}.err"))

    @property
    def both(self) -> tuple[Port, Port]:
        """The two ports."""
        return (self.main, self.error)


def _port(sockets: Path, suffix: str) -> Port:
    return Port(
        name=f"org.pytest-nixvm.shell.{suffix}",
        id=f"nixvm-shell.{suffix}-port",
        chardev=f"nixvm-shell.{suffix}",
        socket=sockets / f"shell.{suffix}",
    )


class Ports:
    """The pairs of ports of one running QEMU. May be used from several threads at once.

    Every method raises `QmpError` if QEMU refuses, and `MachineGoneError` when it has ended.
    """

    def __init__(self, monitor: Monitor, sockets: Path) -> None:
        self.first = Pair.make(sockets, 0)
        self._monitor = monitor
        self._sockets = sockets
        self._lock = threading.Lock()
        self._plugged: set[int] = set()

    def plug(self) -> Pair | None:
        """Add a pair while the VM runs; None if there are `MOST` already."""
        with self._lock:
            free = next((n for n in range(1, MOST) if n not in self._plugged), None)
            if free is None:
                return None
            pair = Pair.make(self._sockets, free)
            self._plugged.add(free)
            try:
                for port in pair.both:
                    self._add(port)
            except BaseException:
                for port in pair.both:
                    with suppress(QmpError):
                        self._remove(port)
                self._plugged.discard(free)
                raise
            return pair

    def unplug(self, pair: Pair) -> None:
        """Take a pair away that `plug` has added. The guest should have closed it before."""
        with self._lock:
            if pair.number not in self._plugged:
                return
            for port in pair.both:
                self._remove(port)
            self._plugged.discard(pair.number)

    def is_open(self, pair: Pair) -> bool:
        """Whether a program in the guest has both ports of the pair open."""
        state = {
            str(each["label"]): bool(each["frontend-open"])
            for each in self._monitor.execute("query-chardev")
        }
        return all(state.get(port.chardev, False) for port in pair.both)

    def _add(self, port: Port) -> None:
        address = {"type": "unix", "data": {"path": str(port.socket)}}
        self._monitor.execute(
            "chardev-add",
            {
                "id": port.chardev,
                "backend": {
                    "type": "socket",
                    "data": {"addr": address, "server": True, "wait": False},
                },
            },
        )
        self._monitor.execute(
            "device_add",
            {
                "driver": "virtserialport",
                "bus": BUS,
                "id": port.id,
                "chardev": port.chardev,
                "name": port.name,
            },
        )

    def _remove(self, port: Port) -> None:
        # Unlike that of a PCI device, a port's removal does not wait for the guest's consent, but
        # QEMU lets go of the chardev a moment later and sends no event when it has.
        self._delete("device_del", port.id)
        poll(
            lambda: self._delete("chardev-remove", port.chardev),
            f"QEMU to let go of {port.chardev}",
            timeout=5,
            interval=0.001,
        )
        port.socket.unlink(missing_ok=True)

    def _delete(self, command: str, name: str) -> bool:
        try:
            self._monitor.execute(command, {"id": name})
        except QmpError as error:
            if "is busy" in error.description:
                return False
            if error.error_class != "DeviceNotFound" and "not found" not in error.description:
                raise
        return True
