"""The ways into a machine. Each is a fixture, and all of them reach the same machine."""

import pytest

pytestmark = pytest.mark.nixvm("test-vm")


def test_ssh(ssh):
    """What a person would do from another computer: here as root, with a key of this session."""
    result = ssh.run("echo out; echo err >&2; exit 3")

    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 3)


def test_serial_console(serial):
    """The user of lib/users.nix logs in where a screen and a keyboard would be."""
    serial.wait_for(r"test-vm login:")
    serial.login("alice", "opensesame")

    assert serial.run("id -un").stdout == "alice\n"


def test_guest_agent(agent, vm):
    """Needs neither network nor log-in: still there when a change broke both."""
    assert "guest-exec" in agent.info().commands
    assert agent.read_file("/etc/hostname").decode().strip() == vm.name


def test_qmp(qmp):
    """QEMU itself: the machine from outside."""
    assert qmp.execute("query-status")["status"] == "running"
