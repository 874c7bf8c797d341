"""A machine that can't be frozen is tested all the same, and its user told what would help."""

from __future__ import annotations

import os
import subprocess
import sys

TESTS = """
import pytest
pytestmark = pytest.mark.nixvm("stubborn")

@pytest.mark.parametrize("number", range(2))
def test_pristine(vm, number):
    vm.succeed("findmnt --types 9p && test -b /dev/nvme0n1")
    vm.fail("test -e /var/mine")
    vm.succeed("touch /var/mine && sync")
"""


def test_each_reason_is_told_and_each_test_boots(arguments_of, flake_copy, tmp_path):
    flake = flake_copy("machines")
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, 2**20)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--nixvm-flake={flake}", *arguments_of(flake),
         "--nixvm-memory=512"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "STUBBORN_DISK": str(disk)},
    )  # fmt: skip

    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "2 passed" in output
    assert output.count("booted in") == 2, output
    assert "stubborn: each test booted a VM of its own, for it can't be frozen: " in output
    (line,) = [line for line in output.splitlines() if "can't be frozen: " in line]
    assert f"the drive {disk}, which is written to and not the machine's own (to lift" in line
    assert 'driveExtraOpts.readonly = "on"' in line
    assert "the nvme disk (to lift that: " in line
    assert "virtio-blk" in line
    for share in ("xchg", "nix-store"):
        assert f"the 9p share '{share}'" in line
    assert "virtualisation.sharedDirectories = lib.mkForce {}" in line
    assert "clone" not in output
