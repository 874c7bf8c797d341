"""What ends a VM, or all calls to it, and how each call says so: at once, with a typed error."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from pytest_nixvm.errors import (
    EmergencyModeError,
    GuestHungError,
    GuestPanicError,
    GuestRebootError,
    MachineGoneError,
    OutOfMemoryError,
    ShellError,
)
from pytest_nixvm.guest import health


@pytest.fixture
def vm(fleet_of):
    with fleet_of("example").start("dev-vm") as vm:
        yield vm


def soon(what):
    """Do it from another thread, when the call under test is under way."""
    timer = threading.Timer(1.0, what)
    timer.start()
    return timer


def crash(vm):
    vm.agent.start("sync; echo c > /proc/sysrq-trigger")


def test_a_panic_ends_every_call_that_is_under_way(vm):
    vm.ssh.run("true", check=True)
    calls = {
        "ssh": lambda: vm.ssh.run("sleep 600", timeout=600),
        "console": lambda: vm.serial.wait_for("a text that never comes", timeout=600),
        "agent": lambda: vm.agent.exec("sleep 600", timeout=600),
    }
    ended = {}

    def call(name):
        with pytest.raises(GuestPanicError) as told:
            calls[name]()
        ended[name] = told.value

    threads = [threading.Thread(target=call, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    soon(lambda: crash(vm))
    began = time.monotonic()

    with pytest.raises(GuestPanicError, match="dev-vm: the kernel panicked") as told:
        vm.run("sleep 600")
    for thread in threads:
        thread.join(30)

    assert time.monotonic() - began < 60
    assert "sysrq triggered crash" in str(told.value)
    assert ended.keys() == calls.keys()
    # later calls say the same, without waiting; the screen can still be seen
    with pytest.raises(GuestPanicError):
        vm.wait_for_unit("sshd")
    assert not vm.is_up()
    assert vm.screenshot("panic").read_bytes().startswith(b"\x89PNG")


def test_a_line_that_only_looks_like_a_panic_ends_nothing(vm):
    result = vm.run("echo 'Kernel panic - not syncing: fake' > /dev/console; sleep 5; echo fine")

    assert result.stdout == "fine\n"
    assert vm.is_up()


def test_emergency_mode(vm):
    soon(lambda: vm.agent.start("sleep 1; systemctl isolate emergency.target"))

    with pytest.raises(EmergencyModeError, match="emergency mode"):
        vm.run("sleep 600")
    assert not vm.is_up()


def test_memory_that_runs_out(vm):
    with pytest.raises(OutOfMemoryError, match=r"ran out of memory, and its kernel killed tail"):
        vm.run("tail /dev/zero")
    assert not vm.is_up()


def test_memory_of_a_group_that_runs_out_is_the_command_s_own_affair(vm):
    """A limit that the configuration sets is no fault of the machine."""
    result = vm.run(
        "systemd-run --wait -p MemoryMax=20M -p MemorySwapMax=0 tail /dev/zero", timeout=120
    )

    assert not result.ok
    assert "oom-kill" in result.stderr
    with pytest.raises(OutOfMemoryError, match="killed tail"):
        vm.run("systemd-run --scope -p MemoryMax=20M -p MemorySwapMax=0 tail /dev/zero")
    assert vm.is_up()


def test_a_reboot_that_nobody_asked_us_for(vm):
    before = len(vm.boots)

    with pytest.raises(GuestRebootError, match="was reset while this ran"):
        vm.run("systemctl reboot; sleep 600")

    assert vm.succeed("cut -d. -f1 /proc/uptime").strip().isdigit()  # waits for the boot
    assert len(vm.boots) == before + 1


def test_qemu_s_death(vm):
    vm.ssh.run("true", check=True)
    pid = vm.qemu.pid
    soon(lambda: os.kill(pid, signal.SIGKILL))

    with pytest.raises(MachineGoneError, match=r"dev-vm ended while this ran: .*SIGKILL"):
        vm.run("sleep 600")
    with pytest.raises(MachineGoneError, match=r"vm\.start\(\) starts it"):
        vm.run("true")


def test_a_guest_that_hangs(vm, monkeypatch):
    """A stopped QEMU is a guest that does nothing any more, whatever waits for it."""
    monkeypatch.setattr(health, "HUNG_AFTER", 3.0)
    pid = vm.qemu.pid
    soon(lambda: os.kill(pid, signal.SIGSTOP))

    with pytest.raises(GuestHungError, match="the guest hangs"):
        vm.run("sleep 600")
    assert not vm.is_up()


def test_without_a_shell_commands_go_through_the_agent_then_over_ssh(vm):
    vm.ssh.run("true", check=True)
    vm.qmp.execute("device_del", {"id": "nixvm-shell.0-port"})
    with suppress(ShellError):  # if that is seen too late, nobody can know whether it had begun
        vm.run("true")

    assert vm.run("echo $((6 * 7))", check=True).channel == "agent"
    assert "no virtio ports" in vm.commands_note

    vm.ssh.run("systemctl stop qemu-guest-agent", check=True)
    result = vm.run("pwd; id -un", cwd="/tmp", user="alice", check=True)
    assert (result.channel, result.stdout) == ("ssh", "/tmp\nalice\n")
    vm.kill()


def test_a_paused_machine_says_so(vm):
    vm.pause()
    with pytest.raises(Exception, match=r"is paused; vm\.resume\(\) lets it go on"):
        vm.run("true")
    vm.resume()
    assert vm.run("true").ok
