"""Off, on, again: the machine's power."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pytest_nixvm.errors import MachineGoneError

pytestmark = pytest.mark.nixvm("test-vm", isolation="module")


def test_a_reboot_is_a_new_boot_on_the_same_disk(vm, ssh):
    before = vm.agent.read_file("/proc/sys/kernel/random/boot_id")
    vm.succeed("echo kept > /var/kept && echo lost > /run/lost && sync")

    vm.reboot()

    assert vm.agent.read_file("/proc/sys/kernel/random/boot_id") != before
    assert vm.succeed("cat /var/kept") == "kept\n"
    vm.fail("test -e /run/lost")
    assert vm.ssh.run("echo back").stdout == "back\n"


def test_shutdown_then_start(vm):
    vm.succeed("echo kept > /var/kept-too && sync")
    vm.shutdown()

    assert not vm.is_up()
    with pytest.raises(MachineGoneError, match=r"vm.start\(\)"):
        vm.run("true")

    vm.start()
    assert vm.succeed("cat /var/kept-too") == "kept\n"


def test_a_crash(vm):
    vm.crash()

    assert not vm.is_up()
    with pytest.raises(MachineGoneError):
        vm.succeed("true")


def test_the_next_test_gets_a_machine_that_runs_and_qemu_s_end_ends_what_is_under_way(vm):
    assert vm.succeed("echo alive") == "alive\n"
    threading.Timer(1, os.kill, (vm.qmp.pid, signal.SIGKILL)).start()
    began = time.monotonic()

    with pytest.raises(MachineGoneError, match="SIGKILL"):
        vm.run("sleep 600")

    assert time.monotonic() - began < 30
    assert not vm.is_up()
