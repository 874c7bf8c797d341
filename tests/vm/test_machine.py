"""Commands and waits on a machine, through the plugin's own fixtures."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from pytest_nixvm.errors import (
    CommandFailedError,
    CommandTimeoutError,
    MachineError,
    WaitTimeoutError,
)

pytestmark = pytest.mark.nixvm("dev-vm")


def test_output_status_and_duration(vm):
    result = vm.run("echo out; echo err >&2; exit 5")

    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 5)
    assert 0 < result.duration < 60


def test_an_argv_is_not_touched_by_a_shell(vm):
    words = ["a b", "$HOME", "*", "'\"", "\\", "line\nbreak"]

    assert vm.run(["printf", "%s\\n", *words], check=True).stdout == "".join(
        f"{w}\n" for w in words
    )


def test_stdin_env_cwd_and_user(vm):
    result = vm.run(
        ["sh", "-c", "cat; echo $COLOUR; pwd; id -un; echo $HOME"],
        stdin="in\n",
        env={"COLOUR": "blue green"},
        cwd="/tmp",
        user="alice",
        check=True,
    )

    assert result.stdout == "in\nblue green\n/tmp\nalice\n/home/alice\n"


def test_binary_both_ways(vm):
    data = bytes(range(256)) * 64

    assert vm.run(["cat"], stdin=data, check=True).stdout_bytes == data


def test_a_failing_command_shows_its_output(vm):
    with pytest.raises(CommandFailedError, match=r"(?s)exit status 3.*no such luck"):
        vm.run("echo no such luck >&2; exit 3", check=True)
    with pytest.raises(CommandFailedError, match="should have failed"):
        vm.fail("true")


def test_succeed_and_execute_mean_what_the_test_driver_means(vm):
    assert vm.succeed("echo one", "echo two") == "one\ntwo\n"
    assert vm.fail("echo three; false") == "three\n"
    assert vm.execute("echo out; exit 9") == (9, "out\n")
    with pytest.raises(CommandFailedError):  # set -euo pipefail
        vm.succeed("false | true")


def test_a_command_that_takes_too_long_is_killed_with_its_children(vm):
    with pytest.raises(CommandTimeoutError, match="within 2 s"):
        vm.run("sleep 4242 & sleep 4243", timeout=2)

    assert vm.wait_until_fails("pgrep -f 'sleep 424[23]'", timeout=60) == ""


def test_several_commands_at_once(vm):
    results = {}

    def run(number):
        results[number] = vm.run(f"sleep 0.2; echo {number}").stdout

    threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == {number: f"{number}\n" for number in range(5)}


def test_a_unit_that_starts_later_is_waited_for(vm):
    vm.succeed("systemd-run --on-active=1 --unit=later sleep infinity")
    vm.succeed("systemctl --no-block start later.timer")
    vm.wait_until_succeeds("systemctl is-active later.service", timeout=60)
    vm.wait_for_unit("later", timeout=60)
    vm.succeed("systemctl stop later.service")


def test_a_unit_that_failed_ends_the_wait_with_its_journal(vm):
    vm.fail("systemd-run --wait --unit=doomed sh -c 'echo spilled the milk; exit 3'")
    began = time.monotonic()

    with pytest.raises(MachineError, match=r"(?s)doomed.service.*has failed.*spilled the milk"):
        vm.wait_for_unit("doomed", timeout=600)

    assert time.monotonic() - began < 60
    vm.succeed("systemctl reset-failed doomed")


def test_a_unit_that_nobody_knows(vm):
    with pytest.raises(MachineError, match=r"nobody.service on dev-vm does not exist"):
        vm.wait_for_unit("nobody")


def test_a_wait_says_what_the_last_try_saw(vm):
    with pytest.raises(WaitTimeoutError, match=r"(?s)exit status 4.*not yet"):
        vm.wait_until_succeeds("echo not yet; exit 4", timeout=5)


def test_screenshot(vm):
    picture = vm.screenshot("desk")

    assert picture.name == "desk.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_guest_looks_like_nixos(vm):
    toplevel = str(vm.build.toplevel)

    assert vm.succeed("readlink -f /run/current-system").strip() == toplevel
    assert vm.succeed("readlink -f /run/booted-system").strip() == toplevel
    assert vm.succeed(f"cat {toplevel}/nixos-version")
    vm.fail("touch /proc/nothing")


@pytest.fixture
def host_port():
    """A port of the host's loopback that accepts; SLIRP shows the host as 10.0.2.2."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_network_is_the_vm_s_own(vm, host_port):
    """Isolated by default: not even the host is in reach."""
    vm.wait_until_succeeds("ip -4 addr show eth0 | grep 10.0.2", timeout=30)
    assert vm.run(f"timeout 3 bash -c '</dev/tcp/10.0.2.2/{host_port}'").returncode != 0


@pytest.mark.nixvm("dev-vm", network="nat", memory=600, cores=1)
def test_a_marker_opens_the_network_and_sets_resources(vm, host_port):
    vm.wait_until_succeeds("ip -4 addr show eth0 | grep 10.0.2", timeout=30)
    vm.succeed(f"timeout 30 bash -c '</dev/tcp/10.0.2.2/{host_port}'")

    assert vm.succeed("nproc") == "1\n"
    assert int(vm.succeed("awk '/^MemTotal:/ { print $2 }' /proc/meminfo")) < 600 * 1024
