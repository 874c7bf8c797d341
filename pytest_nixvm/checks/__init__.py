"""Checks that need no test code: what `--nixvm-check` looks at on each machine.

One subject a file. `BUILT_IN` has all of them, in the order in which they run.
"""

from __future__ import annotations

from pytest_nixvm.checks.base import Check, Checked, DoesNotApply, finding
from pytest_nixvm.checks.registry import BUILT_IN

__all__ = ["BUILT_IN", "Check", "Checked", "DoesNotApply", "finding"]
