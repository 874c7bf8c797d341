"""The example's tests as a pytest user runs them: -m, -k, -x, --lf, --junitxml, -n, …"""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_nixvm.tested import Tested as Records  # or pytest takes it for a test

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(arguments: list[str], flake_copy: Callable[[str], Path], tmp_path_factory):
    """Run pytest on a copy of the example's tests, as from a shell in their directory."""
    place = tmp_path_factory.mktemp("face")
    for file in (ROOT / "example_tests").glob("test_*.py"):
        (place / file.name).write_bytes(file.read_bytes())
    flake = flake_copy("example")
    (place / "pytest.ini").write_text(
        (ROOT / "example_tests" / "pytest.ini").read_text().replace("nix\n", f"{flake}\n", 1)
    )

    def run(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", f"--nixvm-flake={flake}", *arguments,
             "--nixvm-memory=512", *words],
            cwd=place, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        return output

    run.place = place  # type: ignore[attr-defined]
    return run


def test_collect_only_boots_nothing(run):
    output = run("--collect-only", "-q")

    assert "test_every_machine.py::test_sshd[dev-vm]" in output
    assert "test_every_machine.py::test_sshd[test-vm]" in output
    assert "test_channels.py::test_qmp[test-vm]" in output
    assert "Booting" not in output
    assert "Building" not in output


def test_a_machine_and_a_marker(run):
    output = run("--nixvm-machine=test-*", "-m", "smoke", "-v", "--junitxml=out.xml")

    assert "test_sshd[test-vm] PASSED" in output
    assert "dev-vm" not in output.replace("test_dev_vm", "")
    assert "2 passed" in output
    names = [case.get("name") for case in ElementTree.parse(run.place / "out.xml").iter("testcase")]
    assert "test_sshd[test-vm]" in names


def test_first_failure_then_last_failed(run):
    (run.place / "test_zz.py").write_text(
        "import pytest\npytestmark = pytest.mark.nixvm('test-vm')\n"
        "def test_one(vm): vm.succeed('echo seen on the way; false')\n"
        "def test_two(vm): pass\n"
    )
    try:
        output = run("-x", "test_zz.py", status=1)
        assert "1 failed" in output
        assert "passed" not in output
        assert "seen on the way" in output
        assert "everything else: " in output
        assert "machine.py" not in output  # our own frames are hidden
        output = run("--lf", "-k", "test_one", "test_zz.py", status=1)
        assert "1 failed" in output
    finally:
        (run.place / "test_zz.py").unlink()


def test_two_workers(run):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    output = run("-n", "2", "-m", "smoke", "--nixvm-machine=*-vm")

    assert "4 passed" in output
    assert "dev-vm: 2 clones" in output
    assert "test-vm: 2 clones" in output
    # What the workers' tests used is known here, for nixvm deploy.
    tested = {test: how for each in Records().records() for test, (how, _) in each.tests.items()}
    for machine in ("dev-vm", "test-vm"):
        assert tested[f"test_every_machine.py::test_sshd[{machine}]"] == "passed"


def test_without_the_plugin(run):
    (run.place / "test_plain.py").write_text("def test_plain(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:nixvm", "-c", "/dev/null", "test_plain.py"],
        cwd=run.place, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    (run.place / "test_plain.py").unlink()

    assert done.returncode == 0, done.stdout
    # The directory may well be called pytest-nixvm.
    assert "nixvm:" not in done.stdout
    assert "nixvm-" not in re.findall(r"^plugins: .*", done.stdout, re.MULTILINE)[0]
