"""The list of running VMs, kept disks, and what is asked over a socket: no VM."""

from __future__ import annotations

import json
import os
import queue
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from _guest import short_directory, until

from pytest_nixvm import running
from pytest_nixvm.control import Control, ask
from pytest_nixvm.disks import KeptDisk, backing_file
from pytest_nixvm.errors import MachineError, MachineGoneError, SettingsError


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def entry(name: str = "dev-vm", flake: str = "git+file:///a", **more) -> running.Running:
    values = {
        "pid": os.getpid(),
        "began": running.began(os.getpid()),
        "control": Path("/run/control"),
        "disk": None,
        "console_log": Path("/tmp/console.log"),
        **more,
    }
    return running.Running(name=name, flake=flake, **values)


@pytest.fixture
def other():
    """Another process of ours that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


# --- the list -----------------------------------------------------------------------------------


def test_entry_is_read_as_it_was_written():
    written = entry(disk=Path("/state/dev-vm.qcow2"), forwards=((8080, 80),))
    running.write(written)
    assert running.every() == [written]
    assert running.running_names() == ["dev-vm"]
    assert running.holder(Path("/state/dev-vm.qcow2")) == written


def test_list_is_private(runtime):
    path = running.write(entry())
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_process_that_has_ended_is_no_longer_in_the_list(other):
    path = running.write(entry(pid=other.pid, began=running.began(other.pid)))
    assert running.running_names() == ["dev-vm"]
    other.kill()  # a zombie until it is waited for, and ended all the same
    until(lambda: not running.running_names(), "the entry's end")
    assert not path.exists()


def test_number_that_another_process_has_got_since_is_not_taken_for_it(other):
    running.write(entry(pid=other.pid, began=running.began(os.getpid())))
    assert running.running_names() == []


def test_file_that_is_no_entry_does_no_harm():
    running.write(entry())
    for number, text in enumerate(["", "[]", "{}", '{"format": 1}', '{"format": 99}']):
        (running.directory() / f"{number}.json").write_text(text)
    assert running.running_names() == ["dev-vm"]


def test_names_are_those_of_one_flake(other):
    running.write(entry("a", "git+file:///a"))
    running.write(entry("b", "git+file:///b", pid=other.pid, began=running.began(other.pid)))
    assert running.running_names() == ["a", "b"]
    assert running.running_names("git+file:///b") == ["b"]


def test_same_name_in_two_flakes_is_told_apart(other):
    running.write(entry(flake="git+file:///a"))
    one = running.find("dev-vm", "git+file:///elsewhere")
    assert one.flake == "git+file:///a"  # the only one there is
    with pytest.raises(SettingsError, match=r"of git\+file:///b does not run, but that of"):
        running.find("dev-vm", "git+file:///b", strict=True)
    running.write(entry(flake="git+file:///b", pid=other.pid, began=running.began(other.pid)))
    assert running.find("dev-vm", "git+file:///b").flake == "git+file:///b"
    with pytest.raises(SettingsError, match=r"more than once .* say which with --flake"):
        running.find("dev-vm", None)


def test_what_does_not_run_is_said_with_what_does():
    with pytest.raises(SettingsError, match=r"`nixvm run web`\. Running: nothing"):
        running.find("web", None)
    running.write(entry())
    with pytest.raises(SettingsError, match="Running: dev-vm"):
        running.find("web", None)


def test_directory_that_others_may_write_to_is_refused(runtime):
    running.directory().parent.chmod(0o777)
    with pytest.raises(SettingsError, match="only you may write to"):
        running.write(entry())
    assert running.running_names() == []


def test_directory_above_that_others_may_write_to_is_refused(runtime, monkeypatch):
    # As platformdirs gives it; newer ones take no such XDG_RUNTIME_DIR.
    place = runtime / "pytest-nixvm"
    monkeypatch.setattr(running.platformdirs, "user_runtime_path", lambda _: place)
    runtime.chmod(0o777)
    with pytest.raises(SettingsError, match="only you may write to"):
        running.directory()
    runtime.chmod(0o1777)  # as /tmp: others can't replace what is ours
    running.directory()


def test_link_in_the_place_of_the_directory_is_refused(runtime):
    (runtime / "elsewhere").mkdir()
    (runtime / "pytest-nixvm").symlink_to(runtime / "elsewhere")
    with pytest.raises(SettingsError, match="only you may write to"):
        running.directory()


# --- disks --------------------------------------------------------------------------------------


def test_two_flakes_share_no_disk():
    with KeptDisk("dev-vm", "git+file:///a#x") as one, KeptDisk("dev-vm", "git+file:///b#x") as two:
        assert one.path != two.path
        assert one.path.name.startswith("dev-vm-")


def test_disk_in_use_says_by_whom():
    with KeptDisk("dev-vm", "a") as disk:
        with pytest.raises(SettingsError, match="is in use by another process"):
            KeptDisk("dev-vm", "a").__enter__()
        running.write(entry(disk=disk.path))
        with pytest.raises(SettingsError, match=f"is run by process {os.getpid()}"):
            KeptDisk("dev-vm", "a").__enter__()
    with KeptDisk("dev-vm", "a"):
        pass


def test_disk_is_kept_and_removed_on_demand():
    with KeptDisk("dev-vm", "a") as disk:
        assert not disk.exists
        assert disk.remove() is False
        disk.begin()
        disk.path.write_bytes(b"disk")
        Path(disk.environment()["NIX_EFI_VARS"]).write_bytes(b"variables")
        Path(f"{disk.path}-1").write_bytes(b"an OVA's second disk")
        disk.is_made()
        assert disk.path.stat().st_mode & 0o777 == 0o600
    with KeptDisk("dev-vm", "a") as disk:
        assert disk.environment()["NIX_DISK_IMAGE"] == str(disk.path)
        assert disk.path.read_bytes() == b"disk"
        assert disk.remove() is True
        assert not Path(disk.environment()["NIX_EFI_VARS"]).exists()
        assert not Path(f"{disk.path}-1").exists()


def test_disk_that_was_only_half_made_is_made_anew():
    with KeptDisk("dev-vm", "a") as disk:
        disk.begin()
        disk.path.write_bytes(b"half")  # and then it was killed
    with KeptDisk("dev-vm", "a") as disk:
        assert not disk.exists


def test_disk_over_an_image_that_is_gone_is_said(tmp_path):
    with KeptDisk("dev-vm", "a") as disk:
        name = b"/nix/store/gone/nixos.qcow2"
        header = b"QFI\xfb" + struct.pack(">IQI", 3, 104, len(name))
        disk.path.write_bytes(header.ljust(104, b"\0") + name)
        assert backing_file(disk.path) == Path(name.decode())
    with pytest.raises(SettingsError, match=r"no longer in the store\. --fresh begins"):
        KeptDisk("dev-vm", "a").__enter__()
    with KeptDisk("dev-vm", "a", fresh=True) as disk:
        assert disk.remove()


def test_disk_that_stands_alone_has_nothing_below(tmp_path):
    for text in (b"", b"raw" * 100, b"QFI\xfb" + struct.pack(">IQI", 3, 0, 0)):
        (tmp_path / "disk").write_bytes(text)
        assert backing_file(tmp_path / "disk") is None


def test_place_that_can_not_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"can't be kept in .*: Not a directory"):
        KeptDisk("dev-vm", "a", tmp_path / "file" / "disks").__enter__()
    with pytest.raises(SettingsError, match="a comma in its path"):
        KeptDisk("dev-vm", "a", tmp_path / "a,b").__enter__()


# --- the socket ---------------------------------------------------------------------------------


class Console:
    """Stands for the serial console: what is typed comes back in capitals."""

    def __init__(self):
        self.closed = False
        self.taps = []
        self.sent = queue.Queue()

    def last_line(self):
        return "login: "

    def tap(self, callback):
        self.taps.append(callback)
        return lambda: self.taps.remove(callback)

    def send(self, data):
        if self.closed:
            raise MachineGoneError("closed")
        for tap in tuple(self.taps):
            tap(data.upper())

    def end(self):
        self.closed = True
        for tap in tuple(self.taps):
            tap(b"")


class Host:
    def __init__(self):
        self.console = Console()
        self.asked = []

    def log_in(self, user):
        self.asked.append(user)
        if user == "nobody":
            raise MachineError("There is no SSH: nobody may.")
        return ["ssh", f"{user or 'root'}@127.0.0.1"]

    def serial_console(self):
        return self.console


@pytest.fixture
def host():
    with short_directory() as directory:
        host = Host()
        host.path = directory / "control"
        control = Control(host.path, host)
        yield host
        control.close()


def test_ssh_command_is_asked_for(host):
    connection, answer = ask("dev-vm", host.path, {"op": "ssh", "user": "alice"})
    connection.close()
    assert answer["argv"] == ["ssh", "alice@127.0.0.1"]
    assert host.asked == ["alice"]


def test_refusal_is_told(host):
    with pytest.raises(MachineError, match=r"There is no SSH: nobody may\."):
        ask("dev-vm", host.path, {"op": "ssh", "user": "nobody"})


def receive(connection: socket.socket, until: bytes) -> bytes:
    got = b""
    connection.settimeout(5)
    while not got.endswith(until) and (data := connection.recv(100)):
        got += data
    return got


def test_console_goes_both_ways_for_several_at_once(host):
    one, _ = ask("dev-vm", host.path, {"op": "console"})
    two, _ = ask("dev-vm", host.path, {"op": "console"})
    with one, two:
        assert receive(one, b"login: ") == receive(two, b"login: ") == b"login: "
        until(lambda: len(host.console.taps) == 2, "both to listen")
        one.sendall(b"alice")
        assert receive(one, b"ALICE") == receive(two, b"ALICE") == b"ALICE"
    until(lambda: not host.console.taps, "both to have left")


def test_end_of_the_vm_ends_the_console(host):
    connection, _ = ask("dev-vm", host.path, {"op": "console"})
    with connection:
        receive(connection, b"login: ")
        until(lambda: host.console.taps, "it to listen")
        host.console.end()
        assert receive(connection, b"never") == b""


def test_client_that_reads_nothing_holds_nobody_up(host):
    slow, _ = ask("dev-vm", host.path, {"op": "console"})
    quick, _ = ask("dev-vm", host.path, {"op": "console"})
    with slow, quick:
        until(lambda: len(host.console.taps) == 2, "both to listen")
        drain = threading.Thread(target=receive, args=(quick, b"END"))
        drain.start()
        for _ in range(6000):  # more than the socket and the queue take
            for tap in tuple(host.console.taps):
                tap(b"x" * 400)
        for tap in tuple(host.console.taps):
            tap(b"END")
        drain.join(10)
        assert not drain.is_alive()


@pytest.mark.parametrize("line", [b"{}\n", b"no json\n", b'{"op": "dance"}\n', b"[]\n"])
def test_other_requests_are_refused(host, line):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(host.path))
        connection.sendall(line)
        assert "error" in json.loads(receive(connection, b"\n"))


def test_vm_that_is_gone_is_one_message(host):
    with pytest.raises(MachineGoneError, match="dev-vm has ended"):
        ask("dev-vm", host.path.with_name("none"), {"op": "ssh"})
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(host.path.with_name("silent")))
    silent.listen()
    threading.Timer(0.1, silent.close).start()
    with pytest.raises(MachineGoneError, match="dev-vm has ended"):
        ask("dev-vm", host.path.with_name("silent"), {"op": "ssh"})
