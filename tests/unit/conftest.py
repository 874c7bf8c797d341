"""Tests without a VM, in seconds."""

from __future__ import annotations

pytest_plugins = ["pytester"]
