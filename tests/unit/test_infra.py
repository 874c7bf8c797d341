"""Testinfra without a VM: names in the store, and machines that do not run."""

from __future__ import annotations

import pytest
import testinfra

from pytest_nixvm.errors import MachineError
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.infra import register, split_name
from pytest_nixvm.verbs.infra import MACHINES


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("git-2.44.0", ("git", "2.44.0")),
        ("git-2.44.0-doc", ("git", "2.44.0")),
        ("gtk+3-3.24.41", ("gtk+3", "3.24.41")),
        ("bash-interactive-5.2p26-man", ("bash-interactive", "5.2p26")),
        ("system-path", ("system-path", "")),
        ("python3.11-requests-2.31.0", ("python3.11-requests", "2.31.0")),
    ],
)
def test_a_name_in_the_store_is_split_as_nix_does(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_a_machine_that_does_not_run_is_said() -> None:
    register()
    with pytest.raises(MachineError, match=r"nixvm://nobody.*running: none"):
        testinfra.get_host("nixvm://nobody").run("true")


def test_a_machine_that_boots_from_an_image_is_no_user_of_a_host() -> None:
    class Machine:
        def is_up(self) -> bool:
            return True

        def run(self, command: str, *, user: str | None) -> CommandResult:
            return CommandResult(command, 0, str(user).encode(), b"", 0.0, "shell")

    register()
    machine = Machine()
    MACHINES["dev-vm@qcow2"] = machine  # type: ignore[assignment]
    assert testinfra.get_host("nixvm://dev-vm@qcow2").check_output("id") == "None"
    assert testinfra.get_host("nixvm://alice@dev-vm@qcow2").check_output("id") == "alice"
