"""A person at the VM: --pdb, nixvm.interact, and a VM that is left running."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from pytest_nixvm.wait import poll

TESTS = """
import pytest

pytestmark = pytest.mark.nixvm("dev-vm")

def test_wrong(vm):
    vm.succeed("echo state > /root/state")
    assert vm.run("hostname").stdout == "prod"

def test_by_hand(vm, nixvm):
    nixvm.interact(vm)

def test_console(vm):
    vm.console_interact()
"""


@pytest.fixture
def project(tmp_path, arguments, flake_copy):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nixvm-memory=1024"]
    command += [f"--nixvm-flake={flake_copy('example')}", "--nixvm-output=out", *arguments]

    def make(*words: str) -> list[str]:
        return [*command, *words]

    return make


@pytest.fixture
def terminal(project, tmp_path):
    started = []

    def start(*words: str) -> pexpect.spawn:
        program, *rest = project(*words)
        spawn = pexpect.spawn(program, rest, cwd=str(tmp_path), encoding="utf-8", timeout=120)
        started.append(spawn)
        return spawn

    yield start
    for spawn in started:
        spawn.close(force=True)


def test_pdb_stops_with_the_vm_alive(terminal):
    pytest_run = terminal("--pdb", "-k", "wrong")

    pytest_run.expect(r"\(Pdb\) ")
    pytest_run.sendline("p vm.succeed('cat /root/state')")
    pytest_run.expect(r"'state\\n'")
    pytest_run.sendline("q")
    pytest_run.expect(pexpect.EOF)


def test_a_shell_and_the_console_from_within_a_test(terminal):
    pytest_run = terminal("-s", "-k", "hand or console")

    pytest_run.expect(r"root@dev-vm[^#]*#")
    pytest_run.sendline("echo $((6 * 7)) $(hostname); exit")
    pytest_run.expect("42 dev-vm")
    pytest_run.expect("Control-] leaves it")
    pytest_run.sendline("")
    pytest_run.expect("login: ")
    pytest_run.send("\x1d")
    pytest_run.expect("2 passed")
    pytest_run.expect(pexpect.EOF)


def test_a_kept_vm_can_be_entered_and_ended_by_the_lines_that_are_shown(project, tmp_path):
    argv = project("--nixvm-keep=failed", "-k", "wrong")
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=180)

    assert run.returncode == 1, run.stdout
    assert "dev-vm is left running." in run.stdout
    ssh = shlex.split(re.search(r"SSH: +(ssh .*)", run.stdout)[1])
    pid = int(re.search(r"end it: +kill (\d+)", run.stdout)[1])
    monitor = Path(re.search(r"QMP: .*?(/\S+)", run.stdout)[1])
    try:
        state = subprocess.run(
            [*ssh, "cat", "/root/state"], capture_output=True, text=True, timeout=60
        )
        assert state.stdout == "state\n", state.stderr
        assert monitor.is_socket()
    finally:
        os.kill(pid, signal.SIGTERM)
    gone = f"no {monitor.parent.parent}"
    poll(lambda: not monitor.parent.parent.exists(), gone, timeout=60)
