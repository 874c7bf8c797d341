"""The example's changes, as its owner runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from pytest_nixvm.tested import Tested as Records  # or pytest takes it for a test

ROOT = Path(__file__).parents[2]


def test_seven_changes_of_dev_vm(arguments, flake_copy, tmp_path):
    """One boot for all of them, or none where an earlier run has kept it; none is skipped."""
    state = {"XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--nixvm-flake={flake_copy('example')}", *arguments,
         "--nixvm-memory=1024", "-p", "no:cacheprovider", "test_changes.py"],
        cwd=ROOT / "example_tests", capture_output=True, text=True, timeout=900,
        env={**os.environ, **state},
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
    assert len(re.findall(r"^dev-vm \(\w+\): .*frozen;", done.stdout, re.MULTILINE)) <= 1
    # They are changes to flakes of their own: of dev-vm as it is they say nothing.
    assert Records(tmp_path / "pytest-nixvm" / "tested").records() == []
