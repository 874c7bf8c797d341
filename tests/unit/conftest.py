"""Tests without a VM, in seconds."""

from __future__ import annotations

import shutil

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture(scope="session", autouse=True)
def _state_of_their_own(tmp_path_factory):
    """Not the user's: what these tests record of made-up machines is nothing to be deployed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nix") and shutil.which("nix") is None:
        pytest.skip("nix is not installed")
