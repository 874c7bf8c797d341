"""The hooks that a conftest.py or another plugin may implement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import pytest

from pytest_nixvm.errors import SettingsError

if TYPE_CHECKING:
    from pytest_nixvm.checks import Check
    from pytest_nixvm.flake.build import Secret


@pytest.hookspec
def pytest_nixvm_checks(machine: str) -> Sequence[Check]:  # type: ignore[empty-body]
    """Return checks of your own for a machine, beside the built-in ones of `--nixvm-check`.

        from pytest_nixvm.checks import Check, Checked

        def backups_are_planned(checked: Checked) -> None:
            \"\"\"The nightly backup has a timer.\"\"\"
            assert checked.vm.unit("backup.timer").is_active

        def pytest_nixvm_checks(machine):
            return [Check("backups", backups_are_planned)] if machine == "db-server" else []

    Each becomes an item, `nixvm::db-server::backups`. It fails with whatever it raises; the text of
    a `CheckFailedError` is shown as it is. Called once for each machine, before any is built.
    """


@pytest.hookspec
def pytest_nixvm_secrets(machine: str) -> Sequence[Secret]:  # type: ignore[empty-body]
    """Return secrets that a machine expects and its configuration does not declare.

        from pytest_nixvm import Secret

        def pytest_nixvm_secrets(machine):
            return [Secret("wifi", "/run/keys/wifi", owner="root", group="root", mode="0400")]

    Each file is there when the machine has booted, with a throwaway value that is made in the VM:
    never the real one, and never in the Nix store. What sops-nix and agenix declare needs no hook.
    """


Item = TypeVar("Item")


def gathered(call: str, results: Iterable[object], kind: type[Item]) -> list[Item]:
    """Return what the implementations of a hook have returned, in one list.

    `call` is the hook with its arguments, for the message. Raises `SettingsError` for anything but
    lists of `kind`, which has to be one that `pytest_nixvm` exports.
    """
    found: list[Item] = []
    for result in results:
        for each in result if isinstance(result, Iterable) else [result]:
            if not isinstance(each, kind):
                raise SettingsError(
                    f"{call} returned {result!r}; it should return a list of "
                    f"pytest_nixvm.{kind.__name__}."
                )
            found.append(each)
    return found
