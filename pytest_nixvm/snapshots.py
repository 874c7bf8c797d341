"""A machine that was prepared and frozen, of which clones can be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.qemu.template import Template


@dataclass(frozen=True)
class Snapshot:
    """A frozen machine; every clone begins as it was.

        prepared = vm.snapshot("with-data")
        with prepared.start() as clone:
            clone.succeed("test -e /var/lib/data")

    `template` is None for a machine that can't be frozen: then each start boots a VM and prepares
    it again.
    """

    name: str
    machine: str
    template: Template | None
    make: Callable[[], Machine]
    make_clone: Callable[[Template], Machine]  # one that is off

    def start(self) -> Machine:
        """Return a clone of its own: woken and ready. It lasts as long as the session, at most.

        `with` ends it earlier. Raises `QemuError`, `BootError`.
        """
        return self.make()
