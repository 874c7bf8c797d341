"""The built-in checks, in the order in which they run."""

from __future__ import annotations

from pytest_nixvm.checks.base import Check
from pytest_nixvm.checks.channels import agent, boots, ssh

BUILT_IN: tuple[Check, ...] = (
    Check("boots", boots),
    Check("agent", agent),
    Check("ssh", ssh),
)
