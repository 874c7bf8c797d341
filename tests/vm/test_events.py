"""Waits that run in a real guest: how soon they end, and what they show."""

from __future__ import annotations

import time

import pytest

from pytest_nixvm.errors import GuestPanicError, MachineError, WaitTimeoutError


@pytest.fixture(scope="module")
def vm(fleet_of):
    vm = fleet_of("example").start("dev-vm")
    yield vm
    vm.kill()


def in_a_second(vm, event):
    """`event` happens in the guest one second later; the time of that is in /tmp/event."""
    vm.succeed("rm -f /tmp/event")
    vm.execute(
        f"sleep 1; {event}; read -r now _ </proc/uptime; echo $now >/tmp/event", check_output=False
    )


def since_event(vm):
    """Seconds since the event, by the guest's clock, and the time of a command."""
    now = float(vm.succeed("read -r now _ </proc/uptime; echo $now"))
    vm.wait_for_file("/tmp/event")
    return now - float(vm.wait_until_succeeds("grep . /tmp/event"))


SOON = 10.0
"""Seconds: a tenth in a guest that has a processor to itself, which tests don't have."""


def test_a_file(vm):
    in_a_second(vm, "touch /tmp/a-file")

    vm.wait_for_file("/tmp/a-fil?")

    assert since_event(vm) < SOON


def test_a_port_opens_and_closes(vm):
    vm.succeed("systemctl stop sshd")
    vm.wait_for_closed_port(22)
    with pytest.raises(WaitTimeoutError, match=r"(?s)port 22 of localhost to open.*refused.*ss -l"):
        vm.wait_for_open_port(22, timeout=2)
    in_a_second(vm, "systemctl start sshd")

    vm.wait_for_open_port(22)
    vm.wait_for_open_port(22, "127.0.0.1")
    vm.wait_for_open_port(22, addr="::1")

    with pytest.raises(WaitTimeoutError, match=r'(?s)answers on localhost port 22.*"sshd"'):
        vm.wait_for_closed_port(22, timeout=2)


def test_sockets(vm):
    vm.wait_for_open_unix_socket("/run/systemd/private")
    vm.wait_for_open_unix_socket("/var/run/systemd/journal/stdout")
    vm.wait_for_open_unix_socket("/run/systemd/notify", is_datagram=True)

    with pytest.raises(WaitTimeoutError, match=r"(?s)no /run/nope.*\n  /run/systemd/private\n"):
        vm.wait_for_open_unix_socket("/run/nope", timeout=2)


def test_a_socket_in_a_network_namespace_of_its_own(vm):
    vm.succeed(
        "systemd-run --quiet --unit=apart --property=PrivateNetwork=yes nc -l -k -U /run/apart"
    )

    vm.wait_for_open_unix_socket("/run/apart", timeout=60)

    vm.succeed("systemctl stop apart")


def test_a_file_that_does_not_come(vm):
    with pytest.raises(WaitTimeoutError, match=r"(?s)/etc/ssh/nope on dev-vm.*sshd_config"):
        vm.wait_for_file("/etc/ssh/nope", timeout=2)
    began = time.monotonic()
    with pytest.raises(MachineError, match="unbound variable"):
        vm.wait_for_file("$NOT_THERE/x")
    assert time.monotonic() - began < 20


def test_commands_that_are_repeated(vm):
    in_a_second(vm, "touch /tmp/repeated")

    assert vm.wait_until_succeeds("test -e /tmp/repeated && echo yes") == "yes\n"

    assert since_event(vm) < SOON
    tries = [entry for entry in vm.transcript.entries if "repeated && echo" in entry.what]
    assert [entry.kind for entry in tries] == ["wait", "command"]  # the last one, of many
    assert vm.wait_until_fails("echo no; test -e /nope") == "no\n"
    with pytest.raises(WaitTimeoutError, match=r"(?s)`echo 1; exit 7` to succeed.*status 7.*\n1"):
        vm.wait_until_succeeds("echo 1; exit 7", timeout=5)
    with pytest.raises(WaitTimeoutError, match=r"(?s)`sleep 50` to succeed.*Try 1 was still"):
        vm.wait_until_succeeds("sleep 50", timeout=1)


def test_a_command_that_is_only_started(vm):
    began = time.monotonic()

    assert vm.execute("sleep 30; touch /tmp/late", check_output=False) == (-2, "")

    assert time.monotonic() - began < 20
    assert vm.run("test -e /tmp/late").returncode == 1
    assert vm.execute("echo out; exit 3", check_return=False) == (-1, "out\n")
    assert vm.execute("echo out; exit 3") == (3, "out\n")


def test_a_command_that_is_only_started_is_ended_in_time(vm):
    vm.execute("echo $$ >/tmp/pid; sleep 300", check_output=False, timeout=5)
    pid = vm.wait_until_succeeds("grep . /tmp/pid").strip()

    vm.wait_until_fails(f"kill -0 {pid}", timeout=30)


def test_a_panic_ends_a_wait(booted):
    with booted("example", "dev-vm") as vm:
        vm.execute("sleep 1; echo c >/proc/sysrq-trigger", check_output=False)

        with pytest.raises(GuestPanicError):
            vm.wait_for_file("/nope", timeout=120)
