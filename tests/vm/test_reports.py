"""What failed tests leave behind, in one run with planted failures; and a VM that is kept."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_nixvm.wait import poll

TESTS = """
import os, signal, pytest

pytestmark = pytest.mark.nixvm("dev-vm")

def test_passes(vm, nixvm_output):
    vm.succeed("echo of-an-earlier-test >/dev/console; echo of-an-earlier-test | systemd-cat -t x")
    (nixvm_output / "note.txt").write_text("kept")

def test_assertion(vm):
    vm.succeed("echo of-this-test >/dev/console; echo of-this-test | systemd-cat -t x")
    vm.run("systemd-run --wait --unit=planted sh -c 'echo why it failed; exit 3'")
    assert vm.run("echo seen; exit 5").returncode == 0, "50% of | it"

def test_teardown(broken): pass

@pytest.fixture
def broken(vm):
    yield
    assert not vm.is_up()

def test_panic(vm):
    vm.run("echo c >/proc/sysrq-trigger", timeout=60)
"""


class Planted:
    """The run, as its user finds it."""

    def __init__(self, place: Path, output: str, status: int) -> None:
        self.place = place
        self.output = output
        self.status = status
        self.kept = [int(pid) for pid in re.findall(r"end it: +kill (\d+)", output)]

    def end_kept(self) -> None:
        """End the VMs that are left running, as their user is told to."""
        while self.kept:
            os.kill(self.kept.pop(), signal.SIGTERM)

    def folder(self, test: str) -> Path:
        return self.place / "results" / f"test_it-{test}-dev-vm"

    def text(self, test: str, name: str) -> str:
        return (self.folder(test) / name).read_text()


@pytest.fixture(scope="module")
def planted(arguments: list[str], flake_copy, tmp_path_factory) -> Iterator[Planted]:
    place = tmp_path_factory.mktemp("planted")
    (place / "pytest.ini").write_text("[pytest]\n")
    (place / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--nixvm-flake={flake_copy('example')}", *arguments,
         "--nixvm-memory=512", "--nixvm-output=results", "--nixvm-keep=failed",
         "--junitxml=junit.xml", "test_it.py"],
        cwd=place, capture_output=True, text=True, timeout=400, check=False,
        env=os.environ | {
            "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(place / "summary.md"),
        },
    )  # fmt: skip
    planted = Planted(place, done.stdout + done.stderr, done.returncode)
    yield planted
    planted.end_kept()


def test_each_failure_has_a_folder_and_the_passed_test_what_it_kept(planted):
    assert planted.status == 1, planted.output
    assert "2 failed, 2 passed, 1 error" in planted.output
    assert [file.name for file in planted.folder("test_passes").iterdir()] == ["note.txt"]
    for test in ("test_assertion", "test_teardown", "test_panic"):
        names = {file.name for file in planted.folder(test).iterdir()}
        assert {
            "failure.txt", "console.log", "transcript.txt", "transcript.json", "versions.txt",
            "reproduce.txt",
        } <= names, test  # fmt: skip
        assert str(planted.folder(test)) in planted.output


def test_logs_are_of_the_tests_own_time(planted):
    for log in ("console.log", "journal.log"):
        text = planted.text("test_assertion", log)
        assert "of-this-test" in text
        assert "of-an-earlier-test" not in text


def test_the_failed_unit_is_named_with_its_last_words(planted):
    assert "why it failed" in planted.text("test_assertion", "units.txt")
    shown = planted.output.partition("newly failed units: planted.service")[2]
    assert "why it failed" in shown[:600]


def test_the_transcript_has_commands_with_their_outcome(planted):
    text = planted.text("test_assertion", "transcript.txt")

    assert "echo seen; exit 5" in text
    assert "exit status 5" in text
    assert "seen" in text.partition("exit status 5")[2]
    assert "earlier" not in text


def test_a_panicked_vm_leaves_its_console_and_is_asked_nothing(planted):
    assert "Kernel panic" in planted.text("test_panic", "console.log")
    assert not (planted.folder("test_panic") / "journal.log").exists()
    assert "GuestPanicError" in planted.text("test_panic", "failure.txt")


def test_junit_and_github_say_the_same(planted):
    cases = ElementTree.parse(planted.place / "junit.xml").iter("testcase")
    case = next(case for case in cases if case.get("name") == "test_assertion[dev-vm]")
    [folder] = [each.get("value") for each in case.iter("property")]
    assert folder == str(planted.folder("test_assertion"))
    assert "newly failed units: planted.service" in (case.findtext("failure") or "")

    summary = (planted.place / "summary.md").read_text()
    assert "`test_it.py::test_assertion[dev-vm]`" in summary
    assert "50% of \\| it" in summary
    assert re.search(r"^::error file=test_it\.py,line=\d+,.*::.*50%25 of", planted.output, re.M)


def test_the_command_of_the_folder_selects_that_test_alone(planted):
    command = planted.text("test_assertion", "reproduce.txt").strip()

    again = command.replace("&& pytest", f"&& {shlex.quote(sys.executable)} -m pytest", 1)
    done = subprocess.run(
        ["sh", "-c", f"{again} --collect-only -q"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "test_it.py::test_assertion[dev-vm]" in done.stdout, done.stdout + done.stderr
    assert "1 test collected" in done.stdout


def test_a_kept_vm_is_the_failed_tests_own_and_ends_with_all_it_had(planted):
    block = planted.output.partition("is left running.")[2]
    ssh = re.search(r"SSH: +(ssh .*)", block)
    qmp = re.search(r"(?:UNIX-CONNECT:|nc -U )(\S+qmp\S+)", block)  # with socat, or without
    assert ssh is not None
    assert len(planted.kept) == 3
    assert qmp is not None
    sockets = Path(qmp[1]).parent.parent
    done = subprocess.run(
        [*shlex.split(ssh[1]), "systemctl is-failed planted.service"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "failed\n", done.stderr

    planted.end_kept()
    poll(lambda: not sockets.exists(), "the directory of the kept VMs to go", timeout=60)
