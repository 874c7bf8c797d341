"""Tests without a VM, in seconds."""

from __future__ import annotations

import shutil

import pytest

pytest_plugins = ["pytester"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nix") and shutil.which("nix") is None:
        pytest.skip("nix is not installed")
