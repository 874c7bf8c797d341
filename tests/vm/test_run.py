"""`nixvm run`, `ssh` and `console`, as their user has them: a VM, and the next run on its disk."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pexpect
import pytest

NIXVM = (sys.executable, "-m", "pytest_nixvm.cli")
WITHIN = 300  # seconds for a build and a boot
PROMPT = r"alice@desk:~\][$]"


class Desk:
    """A flake's machine, and the commands with the places that they keep things in."""

    def __init__(self, flake: Path, arguments: list[str], runtime: Path, tmp: Path, port: int):
        self.shared, self.state, self.runtime = tmp / "shared", tmp / "state", runtime
        self.shared.mkdir()
        self.shared.joinpath("from-host").write_text("of the host\n")
        self.flake = flake
        self.options = ["--flake", str(flake)]
        self.options += [word.replace("--nixvm-", "--") for word in arguments]
        self.port = port
        self.env = {
            **os.environ,
            "XDG_STATE_HOME": str(self.state),
            "XDG_RUNTIME_DIR": str(runtime),
        }

    def nixvm(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*NIXVM, *words],
            cwd=self.flake,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def ssh(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.nixvm("ssh", "desk", *words)

    def run(self, *words: str) -> Run:
        return Run(self, words)

    def disks(self) -> list[Path]:
        return sorted((self.state / "pytest-nixvm" / "disks").glob("*.qcow2"))

    def entries(self) -> list[Path]:
        return sorted((self.runtime / "pytest-nixvm" / "running").glob("*.json"))

    def left(self) -> list[Path]:
        """What a run has in the runtime directory: sockets, keys."""
        return sorted(self.runtime.glob("nixvm-*"))


class Run:
    """One `nixvm run`, from when the VM is ready to be used."""

    def __init__(self, desk: Desk, words: tuple[str, ...]):
        self.process = subprocess.Popen(
            [*NIXVM, "run", "desk", *desk.options, *words],
            env=desk.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        guard = threading.Timer(WITHIN, self.process.kill)
        guard.start()
        try:
            while "Ctrl-C powers it down." not in self.said:
                line = self.process.stdout.readline()
                self.said += line
                assert line, self.said
        finally:
            guard.cancel()

    def end(self, number: int) -> int:
        """Send it a signal and return how it ended."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        try:
            rest, _ = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        self.said += rest
        return self.process.returncode


def qemu_of(run: Run) -> list[int]:
    """The QEMUs below a process, its supervisor's child."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = (status.parent / "cmdline").read_bytes()
            parent = int(status.read_text().split("PPid:")[1].split()[0])
            above = Path(f"/proc/{parent}/status").read_text()
            grandparent = int(above.split("PPid:")[1].split()[0])
        except (OSError, ValueError, IndexError):
            continue
        if b"qemu-system" in text.split(b"\0")[0] and grandparent == run.process.pid:
            found.append(int(status.parent.name))
    return found


@pytest.fixture(scope="module")
def desk(flake_copy, arguments_of, tmp_path_factory, free_port):
    flake = flake_copy("run")
    tmp = tmp_path_factory.mktemp("desk")
    with tempfile.TemporaryDirectory(prefix="run-") as runtime:  # short enough for sockets
        yield Desk(flake, arguments_of(flake), Path(runtime), tmp, free_port())


@pytest.fixture(scope="module")
def first(desk):
    run = desk.run("-p", f"{desk.port}:8080", "--share", f"{desk.shared}:/mnt/both")
    yield run
    run.process.kill()


def test_what_runs_is_told(desk, first):
    (disk,) = desk.disks()
    for text in (
        "desk runs, without a window.",
        f"its disk is kept: {disk}",
        f"127.0.0.1:{desk.port} is its port 8080",
        f"{desk.shared} is its /mnt/both",
    ):
        assert text in first.said
    listed = json.loads(desk.nixvm("list", *desk.options, "--json").stdout)
    assert [each["running"] for each in listed] == [True]


def test_commands_run_over_ssh_and_their_status_is_passed_on(desk, first):
    done = desk.ssh("hostname; cat /mnt/both/from-host; echo of the guest > /mnt/both/from-guest")
    assert (done.returncode, done.stdout, done.stderr) == (0, "desk\nof the host\n", "")
    assert (desk.shared / "from-guest").read_text() == "of the guest\n"
    assert desk.ssh("touch /root/kept; sync; exit 7").returncode == 7
    other = desk.nixvm("ssh", "--user", "alice", "desk", "id", "-un")
    assert (other.stdout, other.returncode) == ("alice\n", 0)
    nobody = desk.nixvm("ssh", "--user", "carol", "desk", "true")
    assert nobody.returncode == 1
    assert nobody.stderr == "nixvm: There is no SSH to desk: there is no user 'carol' on it.\n"


def test_port_is_forwarded_on_loopback(desk, first):
    with socket.create_connection(("127.0.0.1", desk.port), 30) as client:
        assert client.makefile().read() == "good day\n"


def test_console_is_a_terminal_that_one_can_leave(desk, first):
    command = [*NIXVM, "console", "desk"]
    terminal = pexpect.spawn(
        command[0], command[1:], cwd=desk.flake, env=desk.env, encoding="utf-8", timeout=60
    )
    try:
        terminal.expect("leaves it")
        terminal.send("\r")
        terminal.expect("desk login: ")
        terminal.send("alice\r")
        terminal.expect("Password: ")
        terminal.send("opensesame\r")
        terminal.expect(PROMPT)
        terminal.send("sleep 1000\r")
        terminal.expect("sleep 1000")
        terminal.send("\x03")  # the guest's, not the command's
        terminal.expect(PROMPT)
        terminal.send("exit\r")
        terminal.expect("desk login: ")
        terminal.send("\x1d")
        terminal.expect("desk: left.")
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close()
    assert terminal.exitstatus == 0
    assert first.process.poll() is None


def test_second_run_of_it_is_refused(desk, first):
    done = desk.nixvm("run", "desk", *desk.options)
    assert done.returncode == 2
    assert f"is in use: desk is run by process {first.process.pid}" in done.stderr


def test_control_c_powers_it_down_and_its_disk_is_kept(desk, first):
    assert first.end(signal.SIGINT) == 0, first.said
    assert "desk powers down. Ctrl-C again cuts its power." in first.said
    assert first.said.endswith("desk is off.\n")
    assert (desk.entries(), desk.left(), len(desk.disks())) == ([], [], 1)
    done = desk.ssh("true")
    assert (done.returncode, "desk does not run" in done.stderr) == (2, True)

    text = desk.flake.joinpath("flake.nix").read_text()
    text = text.replace("memorySize = 768;", "memorySize = 768; diskSize = 2048;")
    desk.flake.joinpath("flake.nix").write_text(text)
    second = desk.run("--memory", "640", "--cores", "1", "--share", f"{desk.shared}:/srv:ro")
    try:
        assert "has 1024 MiB, not the 2048 MiB of virtualisation.diskSize" in second.said
        done = desk.ssh("ls /root/kept; nproc; awk '/MemTotal/ {print $2}' /proc/meminfo")
        kept, cores, memory = done.stdout.split()
        assert (kept, cores) == ("/root/kept", "1")
        assert 500 < int(memory) / 1024 < 640
        assert "Read-only" in desk.ssh("touch /srv/new; mount -o remount,rw /srv").stderr
        assert desk.ssh("mount -o remount,rw /srv; touch /srv/new").returncode != 0
        assert not (desk.shared / "new").exists()
        # The key of the first run is of no use any more, and gone.
        assert desk.ssh("cat ~/.ssh/authorized_keys").stdout.count("pytest-nixvm") == 1

        (qemu,) = qemu_of(second)
        second.end(signal.SIGKILL)  # nothing outlives it
        deadline = time.monotonic() + 60
        while Path(f"/proc/{qemu}").exists() or desk.entries() or desk.left():
            assert time.monotonic() < deadline, (qemu, desk.entries(), desk.left())
            time.sleep(0.05)
        assert len(desk.disks()) == 1
    finally:
        second.process.kill()
