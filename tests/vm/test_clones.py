"""Clones of a template: each is as the template was frozen, and knows nothing of the others."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from pytest_nixvm.errors import MachineGoneError

MACHINE = "test-vm"


@pytest.fixture(scope="module")
def fleet(fleet_of):
    return fleet_of("example")


@pytest.fixture
def clone(fleet):
    """Start clones that end with the test."""
    started = []

    def start(snapshot=None):
        started.append(fleet.start(MACHINE) if snapshot is None else snapshot.start())
        return started[-1]

    yield start
    for vm in started:
        fleet.end(vm)


def digests(template):
    """What every file of a template that clones read has in it."""
    return {
        path.name: digest(path)
        for path in sorted(template.directory.iterdir())
        if path.name.startswith(("ram", "state", "disk-", "overlay-", "scratch"))
    }


def digest(path):
    """The digest of what a file holds, and where; a hole may be zeros the next time."""
    found, at, block = hashlib.blake2b(str(path.stat().st_size).encode()), 0, 4096
    with path.open("rb") as file:
        while True:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // block * block
            except OSError:  # there is no more
                return found.hexdigest()
            until = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < until:
                data = os.pread(file.fileno(), block, at)
                if any(data):
                    found.update(at.to_bytes(8, "big") + data)
                at += block


def clock_off(vm):
    """Seconds by which the guest's clock is certainly wrong: outside of the round trip."""
    offs = []
    for _ in range(3):
        before = time.time()
        guest = float(vm.succeed("date +%s.%N"))
        after = time.time()
        offs.append(max(before - guest, guest - after, 0.0))
    return min(offs)


def random_bytes(vm):
    return vm.succeed("cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1")


def banner(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.settimeout(20)
        return connection.recv(4)


def gone(pid):
    """Whether a process has ended; its parent may not have waited for it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_clones_share_nothing_but_what_the_template_had(clone):
    first, second = clone(), clone()
    drawn = [random_bytes(first), random_bytes(second)]
    before = digests(first.template)
    assert {"ram", "state", "disk-0", "overlay-0"} <= before.keys()

    for number, vm in enumerate((first, second)):
        vm.succeed(f"echo {number} | tee /var/mine-{number} /run/mine-{number} && sync")
        vm.succeed(f"systemd-run --quiet --unit=mine-{number} sleep 1234{number}")
    third = clone()
    drawn.append(random_bytes(third))

    traces = "ls /var /run | grep ^mine- | sort -u; pgrep -af '^[^ ]*sleep 1234' | cut -d' ' -f2-"
    assert "mine-0" in first.run(traces).stdout
    assert "12341" not in first.run(traces).stdout
    assert "mine-0" not in second.run(traces).stdout
    assert "12341" in second.run(traces).stdout
    assert third.run(traces).stdout == ""
    assert len({line for text in drawn for line in text.splitlines()}) == 6
    assert max(map(clock_off, (first, second, third))) < 5

    same = "cat /proc/sys/kernel/random/boot_id /etc/machine-id /etc/ssh/ssh_host_*_key.pub"
    assert first.succeed(same) == second.succeed(same) == third.succeed(same)
    for vm in (first, second, third):
        vm.kill()
    assert digests(first.template) == before


def test_a_template_that_is_old_and_not_well(clone):
    """Its clock is behind, a unit has failed, a key of the session's was in it."""
    vm = clone()
    vm.ssh.run("true", check=True)
    keys = vm.ssh.access.keys_file
    public = vm.ssh.client.get_transport().auth_handler.private_key.get_base64()
    assert public in vm.succeed(f"cat {keys}")
    vm.run("systemd-run --quiet --wait --unit=broken --property=Type=oneshot false")
    vm.succeed("date --set=@$(($(date +%s) - 600))")

    snapshot = vm.snapshot("old")
    one, two = clone(snapshot), clone(snapshot)

    assert public not in one.run(f"cat {keys}").stdout
    assert public not in two.run(f"cat {keys}").stdout
    assert max(map(clock_off, (one, two, vm))) < 5  # of 600
    assert one.failed_units() == ("broken.service",)
    assert one.unit("broken.service").failed
    assert one.ssh.run("hostname").stdout == f"{MACHINE}\n"
    assert public not in two.run(f"cat {keys}").stdout


def test_ways_in_and_out_of_two_at_once(clone):
    one, two = clone(), clone()
    keys = one.ssh.access.keys_file
    assert not two.run(f"grep pytest-nixvm {keys}").ok
    for vm, name in ((one, "one"), (two, "two")):
        vm.succeed(f"echo {name} > /run/who")
    assert one.ssh.port != two.ssh.port
    assert [vm.ssh.run("cat /run/who").stdout for vm in (one, two)] == ["one\n", "two\n"]

    ports = [one.forward_port(0, 22), two.forward_port(0, 22)]
    assert ports[0] != ports[1]
    assert list(map(banner, ports)) == [b"SSH-", b"SSH-"]
    one.block()
    assert one.reachable(22, timeout=1).state == "filtered"
    assert two.reachable(22, timeout=20)
    one.unblock()
    assert one.reachable(22, timeout=20)


def test_services_and_the_console(clone):
    vm = clone()
    unit = vm.unit("sshd.service")
    before = unit.main_pid
    unit.restart()
    assert unit.is_active
    assert vm.unit("sshd.service").main_pid != before
    vm.succeed("echo said by a clone | systemd-cat -t clone")
    vm.wait_until_succeeds("journalctl -t clone -o cat | grep 'said by a clone'", timeout=30)
    assert vm.journal(unit="sshd.service").text

    assert "SeaBIOS" in vm.console.text()
    assert "Reached target multi-user.target" in vm.console.text()
    assert vm.boot.state == "running"
    vm.serial.login("alice", "opensesame")
    assert vm.serial.run("id -un").stdout == "alice\n"


def test_from_its_reset_on_a_clone_is_a_machine_on_a_disk_of_its_own(clone):
    """The rest of a machine's power is in test_power.py, which has clones as well."""
    vm = clone()
    before = digests(vm.template)
    boot_id = vm.succeed("cat /proc/sys/kernel/random/boot_id")
    vm.succeed("echo kept > /var/kept && sync && echo lost > /run/lost")

    vm.reset()

    assert vm.succeed("cat /proc/sys/kernel/random/boot_id") != boot_id
    assert vm.succeed("cat /var/kept") == "kept\n"
    vm.fail("test -e /run/lost")
    assert vm.ssh.run("cat /etc/hostname").stdout == f"{MACHINE}\n"
    vm.kill()
    assert digests(vm.template) == before


def test_a_clone_whose_qemu_is_killed(clone):
    vm, other = clone(), clone()
    vm.ssh.run("true", check=True)
    os.kill(vm.qmp.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(MachineGoneError):
        vm.succeed("sleep 60")
    assert time.monotonic() - began < 30
    assert not vm.is_up()
    assert other.succeed("echo alive") == "alive\n"


def test_the_end_of_a_block_is_the_end_of_a_clone(fleet):
    with fleet.start(MACHINE) as vm:
        vm.ssh.run("true", check=True)
        pid, places = vm.qmp.pid, (vm.spec.scratch, vm.spec.sockets)
        assert all(place.is_dir() for place in places)
        began = time.monotonic()

    assert time.monotonic() - began < 30
    assert gone(pid)
    assert not any(place.exists() for place in places)
    assert not vm.is_up()
    with pytest.raises(MachineGoneError):
        vm.run("true")
