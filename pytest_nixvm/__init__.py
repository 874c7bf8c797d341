"""Test NixOS configurations in VMs with pytest.

With pytest, the fixtures are all that is needed. Without it:

    from pytest_nixvm import Fleet, Settings

    with Fleet(Settings.make(flake=".")) as fleet:
        vm = fleet.start("dev-vm")
        print(vm.succeed("uname -a"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nixvm import errors
    from pytest_nixvm.change import Change
    from pytest_nixvm.checks import Check, Checked
    from pytest_nixvm.fixtures import template
    from pytest_nixvm.flake.build import Secret
    from pytest_nixvm.fleet import Fleet
    from pytest_nixvm.guest.result import CommandResult
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.secrets import Secrets
    from pytest_nixvm.settings import Settings
    from pytest_nixvm.snapshots import Snapshot

__all__ = [
    "Change",
    "Check",
    "Checked",
    "CommandResult",
    "Fleet",
    "Machine",
    "Secret",
    "Secrets",
    "Settings",
    "Snapshot",
    "errors",
    "template",
]

_HOMES = {
    "Change": "pytest_nixvm.change",
    "Check": "pytest_nixvm.checks",
    "Checked": "pytest_nixvm.checks",
    "CommandResult": "pytest_nixvm.guest.result",
    "Fleet": "pytest_nixvm.fleet",
    "Machine": "pytest_nixvm.machine",
    "Secret": "pytest_nixvm.flake.build",
    "Secrets": "pytest_nixvm.secrets",
    "Settings": "pytest_nixvm.settings",
    "Snapshot": "pytest_nixvm.snapshots",
    "template": "pytest_nixvm.fixtures",
}


def __getattr__(name: str) -> object:
    # Imported on first use: pytest loads this package in every run, most of which start no VM.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "errors":
        return importlib.import_module("pytest_nixvm.errors")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
