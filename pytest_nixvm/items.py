"""Tests as pytest has collected them: which machines each is for, and what it shares them with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_nixvm.settings import MachineRequest

PARAMETER = "nixvm_machine"
TEMPLATE_OF = "nixvm_template_of"
"""What a fixture of `template` is marked with: its machine's name."""


class Mistake(pytest.Item):
    """What a worker found wrong while collecting, told to the controller in place of its tests.

    Only node ids reach the controller before the first test runs.
    """

    PREFIX = "nixvm mistake: "

    def __init__(self, *, name: str, parent: pytest.Session) -> None:
        super().__init__(name, parent, nodeid=self.PREFIX + name)

    def runtest(self) -> None:
        """Never get here: the controller ends the run."""
        raise pytest.UsageError(self.name)


def marked_machines(node: pytest.Item) -> list[str]:
    """Return the machines that the closest nixvm marker with names names."""
    for marker in node.iter_markers("nixvm"):
        if marker.args:
            return [str(name) for name in marker.args]
    return []


def item_machines(item: pytest.Item) -> list[str]:
    """Return the machines that a test will run on: its parameter, or those of its fixtures.

    An item that is no function says it itself, in `nixvm_machines`.
    """
    own = getattr(item, "nixvm_machines", None)
    if own is not None:
        return list(own)
    prepared = prepared_machines(item)
    callspec = getattr(item, "callspec", None)
    if callspec is not None and PARAMETER in callspec.params:
        return [callspec.params[PARAMETER], *prepared]
    if "machines" in getattr(item, "fixturenames", ()):
        return [*marked_machines(item), *prepared]
    return prepared


def is_check(item: pytest.Item) -> bool:
    """Whether an item is one of the checks of --nixvm-check."""
    return hasattr(item, "nixvm_machines")


def is_change(item: pytest.Item) -> bool:
    """Whether an item tests the change from the deployed generation."""
    check = getattr(item, "check", None)
    return "change" in getattr(item, "fixturenames", ()) or bool(getattr(check, "change", False))


def prepared_machines(item: pytest.Item) -> list[str]:
    """Return the machines that fixtures of `template` prepare for a test, where they are named."""
    info = getattr(item, "_fixtureinfo", None)
    found = []
    for definitions in getattr(info, "name2fixturedefs", {}).values():
        name = getattr(definitions[-1].func, TEMPLATE_OF, None)
        if name is not None:
            found.append(str(name))
    return found


def module_of(item: pytest.Item) -> str:
    """Return the node id of a test's module."""
    module = item.getparent(pytest.Module)
    return item.nodeid if module is None else module.nodeid


def scope(item: pytest.Item, request: MachineRequest) -> str:
    """Return the name under which tests share a VM."""
    if request.isolation == "test":
        return item.nodeid
    return module_of(item) if request.isolation == "module" else "session"
