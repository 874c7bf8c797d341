"""The shell channel on a real VM: virtio ports, cgroups, and what a test may do to a machine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import pytest

from pytest_nixvm.errors import CommandTimeoutError, ShellError

pytestmark = pytest.mark.nixvm("dev-vm")


@pytest.fixture
def shell(vm):
    return vm._on.shell


class Counter:
    """A file that counts the bytes, all of which have to be the same."""

    def __init__(self, byte: bytes) -> None:
        self.count = 0
        self._chunk = byte * 2**18

    def write(self, data: bytes) -> int:
        assert data == self._chunk[: len(data)]
        self.count += len(data)
        return len(data)


def processes(vm, name: str) -> str:
    return vm.run(f"pgrep -x {name} | wc -l").stdout.strip()


def test_results_and_surroundings(shell):
    result = shell.run("echo out; echo err >/dev/stderr; tee /dev/stdout </dev/null; exit 3")
    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 3)
    data = bytes(range(256)) * 5000
    result = shell.run("tee /dev/stderr", stdin=data)
    assert (result.stdout_bytes, result.stderr_bytes) == (data, data)
    assert shell.run(["nixvm-missing"]).returncode == 127
    assert shell.run('pwd; printf %s "$A"', cwd="/etc", env={"A": "'b c"}).stdout == "/etc\n'b c"
    assert shell.run("id -un; echo $HOME; echo x >/dev/stdout", user="alice").stdout == (
        "alice\n/home/alice\nx\n"
    )
    assert "nixvm" not in shell.run("export -p").stdout.lower()


def test_a_hundred_megabytes_on_both_streams(shell):
    out, err = Counter(b"\0"), Counter(b"\0")
    shell.run(
        "head -c 100M /dev/zero & head -c 100M /dev/zero >&2; wait",
        stdout=cast(BinaryIO, out),
        stderr=cast(BinaryIO, err),
        timeout=300,
        check=True,
    )
    assert (out.count, err.count) == (100 * 2**20, 100 * 2**20)


def test_input_that_nobody_reads(shell):
    assert shell.run("head -c 3", stdin=b"abc" * 2**22).stdout == "abc"
    assert shell.run("echo next").stdout == "next\n"


def test_a_timeout_kills_what_the_command_has_started(shell, vm):
    daemon = shell.run("sleep 500 >/dev/null 2>&1 & echo $!").stdout.strip()
    with pytest.raises(CommandTimeoutError, match="killed with all") as caught:
        shell.run("echo so far; tail -f /dev/null & setsid tail -f /dev/null; wait", timeout=5)
    assert caught.value.stdout == "so far\n"
    assert processes(vm, "tail") == "0"
    assert shell.run(f"kill {daemon}").returncode == 0  # an earlier command's lives on


def test_late_output_gets_nowhere(shell):
    shell.run("for i in {1..40}; do echo late; echo late >&2; sleep 0.05; done & true")
    for number in range(5):
        result = shell.run(f"sleep 0.2; echo {number}")
        assert (result.stdout, result.stderr) == (f"{number}\n", "")


def test_a_shell_that_was_killed_is_replaced(shell):
    with pytest.raises(ShellError, match="was ended before") as caught:
        shell.run("echo last words; kill -KILL $$")
    assert caught.value.stdout == "last words\n"
    assert shell.run("echo next").stdout == "next\n"


def test_more_threads_than_shells_and_the_ports_go_again(shell, vm):
    results: list[tuple[int, str]] = []

    def work(number: int) -> None:
        for _ in range(3):
            results.append((number, shell.run(f"sleep 0.1; echo {number}").stdout))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(results) == [(number, f"{number}\n") for number in range(12) for _ in range(3)]
    assert "shell.1.err" in vm.qmp.hmp("info qtree")
    shell.unplug()
    assert "shell.1" not in vm.qmp.hmp("info qtree")
    assert shell.run("ls /dev/vport* | wc -l").stdout == "3\n"


def test_a_new_environment_is_used_at_once(shell):
    shell.run("cp -L /etc/set-environment /tmp/before; true", check=True)
    change = (
        "cp /tmp/before /etc/set-environment.new; "
        "echo 'export NIXVM_NEW=yes' >>/etc/set-environment.new; "
        "mv /etc/set-environment.new /etc/set-environment"
    )
    link = shell.run("readlink /etc/set-environment").stdout.strip()
    try:
        shell.run(change, check=True)
        assert shell.run("echo $NIXVM_NEW").stdout == "yes\n"
    finally:
        back = f"ln -sfT {link}" if link else "cp /tmp/before"
        shell.run(f"{back} /etc/set-environment", check=True)


def test_it_works_when_nothing_else_does(booted: Callable[..., Any]):
    with booted("example", "dev-vm") as vm:
        shell = vm._on.shell
        first = shell.run("echo $$").stdout
        shell.run("systemctl stop sshd; ip link set eth0 down", check=True)
        assert shell.run("echo $$").stdout == first

        shell.run("systemctl daemon-reexec", check=True)
        shell.run("systemctl restart qemu-guest-agent", check=True)
        assert shell.run("echo $$").stdout == first
        shell.run("sleep 50 >/dev/null 2>&1 &")
        assert shell.run("wc -l </sys/fs/cgroup/pytest-nixvm/left/cgroup.procs").stdout != "0\n"

        # The reserve that only root may use is filled as well.
        fill = "while fallocate -l $size /fill.$((n++)) 2>/dev/null; do :; done"
        shell.run(f"for size in 1G 100M 10M 1M 100K 4K; do {fill}; done", timeout=300)
        assert "No space left" in shell.run("echo more >/full").stderr
        with pytest.raises(CommandTimeoutError):
            shell.run("exec sleep 100", timeout=1)  # a new shell is started then
        assert shell.run(["cat"], stdin="next").stdout == "next"
        shell.run("rm /fill.*", check=True)

        shell.run("echo u >/proc/sysrq-trigger; sleep 1", check=True)
        assert "Read-only" in shell.run("echo more >/read-only").stderr
        with pytest.raises(CommandTimeoutError):
            shell.run("exec sleep 100", timeout=1)
        assert shell.run(["cat"], stdin="next").stdout == "next"


def test_after_a_reboot(booted: Callable[..., Any]):
    with booted("example", "dev-vm") as vm:
        before = vm.run("cat /proc/sys/kernel/random/boot_id").stdout
        vm.reboot()
        assert vm.run("cat /proc/sys/kernel/random/boot_id").stdout != before
        assert vm.run("true").channel == "shell"
