"""What each further clone adds to the memory in use."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.cloning import Lab
from benchmarks.machines import MACHINE
from pytest_nixvm import Machine

CLONES = 7
IDLE = 2.0
"""Seconds for which an idle clone is left alone before it counts."""

WORK = 30 * 10**6
"""Bytes that a clone writes, and reads again."""


def pss(pid: int) -> float:
    """Return the MiB that a process uses, what it shares with others divided among them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"the kernel does not tell the memory of {pid}")


def increases(totals: Sequence[float]) -> list[float]:
    """Return by how much each total is above the one before."""
    return [after - before for before, after in pairwise(totals)]


def idle(lab: Lab) -> list[float]:
    """Return the MiB that each further idle clone adds."""
    return _further(lab, lambda _: time.sleep(IDLE))


def after_work(lab: Lab) -> list[float]:
    """Return the MiB that each further clone adds after it has written and read `WORK` bytes."""

    def work(vm: Machine) -> None:
        vm.run(f"head -c {WORK} /dev/urandom > /var/tmp/work", check=True)
        vm.run("sync; sha256sum /var/tmp/work", check=True)

    return _further(lab, work)


def bare(lab: Lab) -> list[float]:
    """Return the MiB that each further QEMU adds that has loaded nothing."""
    machines: list[Machine] = []
    qemus = []
    totals = []
    try:
        for _ in range(CLONES):
            machines.append(lab.make())
            qemus.append(lab.bare(machines[-1]))
            totals.append(sum(pss(qemu.pid) for qemu in qemus))
    finally:
        for qemu in qemus:
            qemu.kill()
        for machine in machines:
            lab.workshop.clear(machine)
        lab.turn = None
    return increases(totals)


def _further(lab: Lab, use: Callable[[Machine], object]) -> list[float]:
    machines: list[Machine] = []
    totals = []
    try:
        for _ in range(CLONES):
            machines.append(lab.fleet.start(MACHINE))
            use(machines[-1])
            totals.append(sum(pss(machine.qemu.pid) for machine in machines))
    finally:
        for machine in machines:
            lab.fleet.end(machine)
    return increases(totals)
