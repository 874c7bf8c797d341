"""Machines that were prepared and frozen: snapshots, templates, the decorator."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pytest_nixvm.errors import CommandFailedError
from pytest_nixvm.store import Store

MACHINE = "test-vm"


@pytest.fixture
def kept():
    """Directories of templates that the test has put into the user's cache; removed behind it."""
    directories = []
    yield directories
    for place in {directory.parent for directory in directories}:
        Store(place).clear([each.name for each in directories if each.parent == place])


@pytest.fixture
def fleets(fleet_of, kept):  # after these `kept` has its turn: what is in use can't be removed
    """Two fleets with one cache, as in two runs."""
    pair = fleet_of("example", boot_timeout="290"), fleet_of("example", boot_timeout="295")
    yield pair
    for fleet in pair:
        fleet.close()


def test_snapshots_of_snapshots(fleet_of):
    fleet = fleet_of("example")
    with fleet.start(MACHINE) as vm:
        vm.succeed("echo one > /var/one && systemd-run --quiet --unit=goes-on sleep infinity")
        vm.ssh.run("true", check=True)
        port = vm.ssh.port
        boot = vm.succeed("cat /proc/sys/kernel/random/boot_id")

        first = vm.snapshot("one")
        assert (first.name, first.machine) == ("one", MACHINE)

        # The machine itself goes on.
        state = "systemctl is-active goes-on; cat /var/one /proc/sys/kernel/random/boot_id"
        assert vm.succeed(state) == f"active\none\n{boot}"
        assert vm.ssh.run("cat /var/one").stdout == "one\n"
        assert vm.ssh.port
        assert port

        with first.start() as child:
            assert child.succeed(state) == f"active\none\n{boot}"
            child.succeed("echo two > /var/two && systemctl stop goes-on")
            second = child.snapshot("two")
            child.succeed("echo three > /var/three")
            with second.start() as grandchild, first.start() as sibling:
                assert grandchild.succeed("cat /var/one /var/two") == "one\ntwo\n"
                grandchild.fail("test -e /var/three || systemctl is-active goes-on")
                sibling.fail("test -e /var/two")
                assert sibling.succeed(state) == f"active\none\n{boot}"
        vm.fail("test -e /var/two")


def test_a_template_is_prepared_once(fleets, kept, tmp_path):
    count, token = tmp_path / "count", uuid.uuid4().hex
    data = tmp_path / "data"
    data.write_text("first")

    def prepare(vm):
        with count.open("a") as file:
            file.write("x")
        vm.succeed(f"echo {data.read_text()} > /var/data")

    def content(fleet):
        snapshot = fleet.template(MACHINE, prepare, depends=(token, data))
        kept.append(snapshot.template.directory)
        with snapshot.start() as vm:
            found = vm.succeed("cat /var/data")
            vm.succeed("rm /var/data")
        with snapshot.start() as vm:
            assert vm.succeed("cat /var/data") == found
        return found

    first, second = fleets
    assert content(first) == "first\n"
    assert content(second) == "first\n"
    assert count.read_text() == "x"

    data.write_text("second")
    assert content(second) == "second\n"
    assert count.read_text() == "xx"

    def fails(vm):
        vm.succeed("echo not this way >&2; exit 3")

    for _ in range(2):
        with pytest.raises(CommandFailedError, match="not this way"):
            first.template(MACHINE, fails)


TESTS = """
import pathlib, pytest, pytest_nixvm

@pytest_nixvm.template("test-vm", depends=({token!r},))
def with_data(vm):
    \"\"\"A machine with data.\"\"\"
    with open("count", "a") as file:
        file.write("x")
    vm.succeed("echo data > /var/data; systemd-run --quiet --unit=goes-on sleep infinity")

@pytest.mark.parametrize("number", range(2))
def test_pristine(with_data, number):
    pathlib.Path("directory").write_text(str(with_data.template.directory))
    assert with_data.succeed("systemctl is-active goes-on; cat /var/data") == "active\\ndata\\n"
    with_data.succeed("systemctl stop goes-on; rm /var/data")

def test_two_machines(with_data, vm):
    with_data.succeed("test -e /var/data")
    vm.fail("test -e /var/data")
"""


def test_the_decorator(arguments, flake_copy, kept, tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS.format(token=uuid.uuid4().hex))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--nixvm-flake={flake_copy('example')}", *arguments,
         "--nixvm-memory=1024", "--nixvm-machine=test-vm"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    kept.append(Path((tmp_path / "directory").read_text()))
    assert "3 passed" in done.stdout
    assert "test-vm: 4 clones" in done.stdout, done.stdout
    assert (tmp_path / "count").read_text() == "x"
