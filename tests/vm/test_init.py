"""What `nixvm init` writes: it boots, its own tests pass, and who it is for is let in."""

from __future__ import annotations

import subprocess
import sys

NIXVM = [sys.executable, "-m", "pytest_nixvm.cli"]
TEST = """
import pytest

@pytest.mark.nixvm("db-vm", user="carol")
def test_carol_administers(ssh):
    assert ssh.run("id -un; sudo -n id -un").stdout == "carol\\nroot\\n"

def test_no_password_opens_an_account(vm):
    accounts = vm.succeed("getent shadow root carol").splitlines()
    assert all(line.split(":")[1] in ("!", "*", "!*") for line in accounts), accounts
"""


def test_a_flake_and_a_vm_more_from_nothing(arguments, tmp_path):
    flake = tmp_path / "config"
    for words in (
        ["init", str(flake), "--user", "carol", "--vm", "web-vm"],
        ["init", "vm", "db-vm", "--home", "--flake", str(flake)],
    ):
        subprocess.run([*NIXVM, *words], check=True, timeout=60)
    (flake / "tests" / "test_carol.py").write_text(TEST)

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--nixvm-memory=768", "-p", "no:cacheprovider",
         "--nixvm-machine=db-vm", "--strict-config"],
        cwd=flake, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
