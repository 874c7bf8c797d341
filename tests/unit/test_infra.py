"""Testinfra without a VM: names in the store, and machines that do not run."""

from __future__ import annotations

import pytest
import testinfra

from pytest_nixvm.errors import MachineError
from pytest_nixvm.infra import register, split_name


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
