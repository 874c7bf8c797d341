"""A command in the guest, by each way there is."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import testinfra
from labgrid import Target
from labgrid.driver import SSHDriver
from labgrid.resource import NetworkService

from benchmarks.machines import fleet, fork_time
from benchmarks.side_by_side import Contender, measure, show
from pytest_nixvm import Machine
from pytest_nixvm.qemu.ports import BUS

GOAL_SSH, GOAL_HVC0 = 3.0, 1.0


def main(rounds: int, arguments: list[str]) -> None:
    """Measure and print."""
    with fleet(arguments) as machines, ExitStack() as stack:
        vm = machines.start("dev-vm")
        ours = Contender("vm.run", lambda: vm.run("true", check=True), "a shell on a virtio port")
        driver, bare = stack.enter_context(_hvc0(vm))
        rivals = [
            Contender("hvc0, NixOS test driver's way", driver),
            Contender("Testinfra, paramiko", _testinfra_paramiko(vm)),
            Contender("Testinfra, OpenSSH", _testinfra_openssh(vm), "ControlMaster"),
            Contender("labgrid SSHDriver", _labgrid(vm), "ControlMaster"),
        ]
        others = [
            Contender("vm.ssh.run", lambda: vm.ssh.run("true", check=True), "one connection"),
            Contender("hvc0, in the shell itself", bare, "no fork, no stderr: `true; echo $?`"),
            Contender("vm.agent.exec", lambda: vm.agent.exec(["true"], check=True)),
        ]
        echo = Contender(
            "bare round trip", stack.enter_context(_echo(vm)), "a line, echoed by bash"
        )
        every = [ours, *rivals, *others, echo]
        measure(every, rounds)
        fork = fork_time(vm)
        limit = echo.median + fork
        show(f"The command `true`, medians of {rounds}", every, ours, limit)
        print(f"limit: bare round trip {echo.median * 1e3:.1f} + fork {fork * 1e3:.1f} ms")
        best = min(each.median for each in rivals[1:])
        print(f"best SSH / vm.run: {best / ours.median:.1f} (goal: {GOAL_SSH:g} or more)")
        hvc0 = rivals[0].median / ours.median
        print(f"hvc0 / vm.run: {hvc0:.1f} (goal: {GOAL_HVC0:g} or more)")


def _testinfra_paramiko(vm: Machine) -> Callable[[], object]:
    config = vm.output / "ssh_config"
    config.write_text(
        f"Host bench\n  HostName 127.0.0.1\n  Port {vm.ssh.port}\n  User root\n"
        f"  IdentityFile {_key(vm)}\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
    )
    host = testinfra.get_host("paramiko://bench", ssh_config=str(config))
    return lambda: host.run_test("true")


def _testinfra_openssh(vm: Machine) -> Callable[[], object]:
    config = vm.output / "ssh_config"
    master = vm.spec.sockets / "bench-master"
    with config.open("a") as file:
        file.write(f"  ControlMaster auto\n  ControlPath {master}\n  ControlPersist 120\n")
    host = testinfra.get_host("ssh://bench", ssh_config=str(config))
    return lambda: host.run_test("true")


def _labgrid(vm: Machine) -> Callable[[], object]:
    target = Target("bench")
    NetworkService(target, "net", address="127.0.0.1", username="root", port=vm.ssh.port)
    driver = SSHDriver(target, "ssh", keyfile=str(_key(vm)))
    target.activate(driver)
    return lambda: driver.run_check("true")


def _key(vm: Machine) -> Path:
    words = vm.ssh.command_line.split()
    return Path(words[words.index("-i") + 1])


@contextmanager
def _hvc0(vm: Machine) -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
    """A root shell on a virtio console: the driver's way to run a command in it, and the least.

    Sources: nixos/modules/testing/test-instrumentation.nix (backdoor.service) and QemuMachine's
    _execute in nixos/lib/test-driver.
    """
    with _port(vm, "virtconsole", "hvc") as connection:
        vm.run("udevadm settle")
        vm.agent.start(
            "exec </dev/hvc0 >/dev/hvc0 2>/dev/ttyS0; stty -F /dev/hvc0 raw -echo; "
            "echo Spawning; PS1= exec /usr/bin/env bash --norc"
        )
        connection.settimeout(30)
        _line(connection)

        def run() -> None:
            connection.send(
                b"timeout 900 bash -c 'set -euo pipefail; true' | (base64 -w 0; echo)\n"
            )
            _line(connection)
            connection.send(b"echo ${PIPESTATUS[0]}\n")
            if int(_line(connection)) != 0:
                raise RuntimeError("true failed on hvc0")

        def bare() -> None:
            connection.send(b"true; echo $?\n")
            _line(connection)

        yield run, bare


@contextmanager
def _echo(vm: Machine) -> Iterator[Callable[[], object]]:
    """The least that bash can do on such a port: read a line and write it back."""
    with _port(vm, "virtserialport", "org.pytest-nixvm.echo") as connection:
        vm.run("udevadm settle")
        vm.agent.start(
            "exec 3<>/dev/virtio-ports/org.pytest-nixvm.echo; "
            "while IFS= read -r line <&3; do printf '%s\\n' \"$line\" >&3; done"
        )
        connection.settimeout(30)

        def run() -> None:
            connection.send(b"x\n")
            _line(connection)

        yield run


@contextmanager
def _port(vm: Machine, driver: str, name: str) -> Iterator[socket.socket]:
    path = vm.spec.sockets / f"bench-{driver}"
    address = {"type": "unix", "data": {"path": str(path)}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    vm.qmp.execute("chardev-add", {"id": path.name, "backend": backend})
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        port = {"driver": driver, "bus": BUS, "id": f"{path.name}-port", "chardev": path.name}
        vm.qmp.execute("device_add", {**port, "name": name})
        yield connection


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(4096)
    return line
