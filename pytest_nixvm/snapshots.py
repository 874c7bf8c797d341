"""A machine that was prepared and frozen, of which clones can be had."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_nixvm.errors import SettingsError

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.qemu.template import Template


def check_prepare(prepare: Callable[..., object]) -> None:
    """Raise `SettingsError` for what is no function of a machine that prepares it."""
    name = getattr(prepare, "__name__", repr(prepare))
    if not callable(prepare):
        raise SettingsError(f"A template is made by a function of a machine, not by {prepare!r}.")
    try:
        inspect.signature(prepare).bind(object())
    except TypeError:
        raise SettingsError(
            f"{name}{inspect.signature(prepare)} has to take one argument, the machine that it "
            "prepares: a template is made before any test, without other fixtures."
        ) from None
    except ValueError:
        pass  # a built-in function that does not say
    if inspect.isgeneratorfunction(prepare) or inspect.iscoroutinefunction(prepare):
        raise SettingsError(
            f"{name} yields or awaits: what prepares a template has to be done when it returns."
        )


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
