"""`nixvm run`, `ssh` and `console`: what is said of bad input, and what QEMU and ssh are told."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import socket
import struct
import termios
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from _flake import OPTIONS, machine, needs_nix, write_flake

from pytest_nixvm import running, wishes
from pytest_nixvm.catalogue import Catalogue
from pytest_nixvm.cli import console as console_command
from pytest_nixvm.cli import main
from pytest_nixvm.cli import run as run_command
from pytest_nixvm.cli import ssh as ssh_command
from pytest_nixvm.control import Control
from pytest_nixvm.disks import KeptDisk
from pytest_nixvm.errors import SettingsError
from pytest_nixvm.flake.reference import locate


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def nixvm(capsys):
    """Return a function that runs `nixvm`: status, stdout, stderr."""

    def nixvm(*words: str) -> tuple[int, str, str]:
        status = main([*words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return nixvm


def listening() -> socket.socket:
    taken = socket.create_server(("127.0.0.1", 0))
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return taken


# --- what is wished for -------------------------------------------------------------------------


def test_ports_are_read():
    assert wishes.forwards(["8080:80", "2222"]) == (
        wishes.Forward(8080, 80),
        wishes.Forward(2222, 2222),
    )


@pytest.mark.parametrize(
    "text", ["", ":", "80:", ":80", "a:b", "0:80", "80:65536", "1:2:3", "-1:80", " 1:2", "١:2"]
)
def test_port_that_is_none_is_refused(text):
    with pytest.raises(SettingsError, match="should be HOST:GUEST"):
        wishes.forwards([text])


def test_port_that_is_taken_is_named_with_who_has_it():
    with listening() as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match="another process listens there"):
            wishes.check_free(wishes.forwards([f"{port}:80"]))
        entry = running.Running(
            "web", "flake", os.getpid(), running.began(os.getpid()), Path("c"), None, Path("l"),
            ((port, 80),),
        )  # fmt: skip
        running.write(entry)
        with pytest.raises(SettingsError, match=f"web, run by process {os.getpid()}, listens"):
            wishes.check_free(wishes.forwards([f"{port}:80"]))
    wishes.check_free(wishes.forwards([f"{port}:80"]))


def test_port_is_forwarded_once():
    with pytest.raises(SettingsError, match="forwarded twice"):
        wishes.forwards(["8080:80", "8080:81"])
    assert len(wishes.forwards(["8080:80", "8080:80"])) == 1


def test_shares_are_read(tmp_path):
    (tmp_path / "a,b").mkdir()
    shares = wishes.shares(["a,b", "a,b:/srv/x/:ro"])
    assert shares == (
        wishes.Share(tmp_path / "a,b", "/mnt/a,b"),
        wishes.Share(tmp_path / "a,b", "/srv/x", readonly=True),
    )
    words = wishes.share_arguments(shares)
    assert f"path={tmp_path}/a,,b," in words[1]
    assert ["readonly=on" in words[at] for at in (1, 5)] == [False, True]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "should be DIR"),
        ("none", "there is no directory"),
        ("file", "file is no directory"),
        ("~nobody-of-that-name/x", "there is no directory"),
        ("x" * 5000, "there is no directory"),
        (".:relative", "an absolute path other than /"),
        (".:/", "an absolute path other than /"),
        (".://", "an absolute path other than /"),
    ],
)
def test_share_that_can_not_be_is_refused(tmp_path, text, why):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=why):
        wishes.shares([text])


def test_two_shares_have_two_places(tmp_path):
    with pytest.raises(SettingsError, match="two directories are to be at /mnt/x"):
        wishes.shares([".:/mnt/x", "/tmp:/mnt/x/"])


# --- the window ---------------------------------------------------------------------------------

HEADLESS, GRAPHIC = "exec qemu -m 1 -nographic \\\n", "exec qemu -m 1 \\\n"


@pytest.fixture
def qemu(tmp_path):
    def make(displays: str) -> Path:
        path = tmp_path / "qemu-system-x86_64"
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' 'Available display backend types:' {displays}")
        path.chmod(0o755)
        return path

    return make


def test_machine_decides_whether_there_is_a_window(qemu, monkeypatch):
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    program = qemu("none sdl gtk")
    assert wishes.screen(program, None, HEADLESS) == wishes.Screen(False)
    assert wishes.screen(program, None, GRAPHIC) == wishes.Screen(True, ("-display", "gtk"))
    assert wishes.screen(program, False, GRAPHIC) == wishes.Screen(False)
    assert wishes.screen(program, True, HEADLESS).arguments == (
        *("-display", "gtk"),
        *("-machine", "graphics=on"),
    )


def test_window_that_can_not_be_is_done_without_and_said(qemu, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    screen = wishes.screen(qemu("gtk"), None, GRAPHIC)
    assert not screen.window
    assert "No window: neither DISPLAY nor WAYLAND_DISPLAY" in screen.note
    monkeypatch.setenv("DISPLAY", ":0")
    assert "was built without gtk and sdl" in wishes.screen(qemu("curses"), None, GRAPHIC).note


def test_window_that_was_asked_for_is_not_done_without(qemu, monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    with pytest.raises(SettingsError, match=r"--window: .* was built without gtk and sdl"):
        wishes.screen(qemu("curses"), True, GRAPHIC)


# --- nixvm run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "http:80"],
        ["--share", "/none"],
        ["--memory", "much"],
        ["--cores", "0"],
        ["--window", "--nothing"],
    ],
)
def test_bad_option_is_one_line_before_anything_is_evaluated(nixvm, words):
    status, out, err = nixvm("run", "dev-vm", *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words[0] in err or words[-1] in err


@pytest.fixture
def run(tmp_path, nixvm):
    flake = write_flake(tmp_path / "config", machine("dev-vm", "dev-vm"))
    more = [word for option in OPTIONS for word in ("--nix-option", *option)]
    options = ["--flake", str(flake), "--cache", str(tmp_path / "cache"), *more]

    def run(name: str, *words: str) -> tuple[int, str, str]:
        return nixvm("run", name, *options, *words)

    run.options = options
    return run


@needs_nix
def test_machine_that_is_none_is_said_with_those_there_are(run):
    status, _, err = run("dev-wm")
    assert status == 2
    assert "has no machine 'dev-wm'" in err
    assert "dev-vm" in err


@needs_nix
def test_start_script_that_can_not_be_run_is_one_message(run, tmp_path):
    # The one of this flake can't be executed.
    status, out, err = run("dev-vm")
    assert (status, out) == (1, "")
    assert "can't be started: Permission denied" in err
    assert running.running_names() == []
    assert not list((tmp_path / "run").glob("nixvm-*"))


@needs_nix
def test_machine_that_is_run_already_is_said_before_it_is_built(run, tmp_path):
    flake, _ = locate("config", tmp_path)
    with KeptDisk("dev-vm", f"{flake}#nixosConfigurations.dev-vm"):
        status, out, err = run("dev-vm")
    assert (status, out) == (2, "")
    assert "is in use by another process" in err
    assert "Building" not in err


@needs_nix
def test_window_without_a_desktop_is_said_before_it_is_built(run, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    status, out, err = run("dev-vm", "--window")
    assert (status, out) == (2, "")
    assert "--window: neither DISPLAY nor WAYLAND_DISPLAY" in err
    assert "Building" not in err


@needs_nix
def test_window_that_qemu_has_not_leaves_the_old_disk_its_image(run, monkeypatch):
    held = []
    build = Catalogue.build
    monkeypatch.setattr(Catalogue, "build", lambda *of: replace(build(*of), image="qcow2"))
    monkeypatch.setattr(run_command, "hold_image", lambda *_, **__: held.append(1))
    monkeypatch.setattr("pytest_nixvm.use.find_qemu", lambda _: Path("/nowhere/qemu"))
    monkeypatch.setenv("DISPLAY", ":0")
    status, out, err = run("dev-vm", "--window", "--fresh")
    assert (status, out, held) == (2, "", []), err
    assert "was built without gtk and sdl" in err


@pytest.mark.parametrize(
    "made",
    [
        'createEmptyFilesystemImage "$NIX_DISK_IMAGE" "4096M"',
        'qemu-img create \\\n  -f qcow2 \\\n  "$NIX_DISK_IMAGE" \\\n  "4096M"',
    ],
)
def test_disk_of_another_size_than_is_configured_is_told(tmp_path, made):
    script = tmp_path / "bin" / "run-dev-vm-vm"
    script.parent.mkdir()
    script.write_text(f"{made}\n")
    build = SimpleNamespace(name="dev-vm", image=None, start_script=script)
    with KeptDisk("dev-vm", "a") as disk:
        assert list(run_command.out_of_date(disk, build)) == []
        for mebibytes, notes in ((4096, 0), (1024, 1)):
            size = mebibytes << 20
            disk.path.write_bytes(b"QFI\xfb" + struct.pack(">IQIIQ", 3, 0, 0, 16, size))
            told = list(run_command.out_of_date(disk, build))
            assert len(told) == notes
    assert "has 1024 MiB, not the 4096 MiB of virtualisation.diskSize. --fresh" in told[0]


@needs_nix
def test_list_shows_what_runs_of_this_flake(run, nixvm, tmp_path):
    here, _ = locate("config", tmp_path)
    for flake, shown in (("git+file:///another", "yes"), (here, "running")):
        running.write(
            running.Running(
                "dev-vm", flake, os.getpid(), running.began(os.getpid()), Path("c"), None, Path("l")
            )
        )
        out = nixvm("list", *run.options)[1]
        assert out.splitlines()[1].split()[3] == shown


class Ending:
    """A VM in use: Control-C, and then it is powered down."""

    name = "dev-vm"

    def __init__(self):
        self.done = []

    def wait(self):
        raise KeyboardInterrupt

    def power_down(self):
        self.done.append("power down")


def test_terminal_that_is_closed_still_has_the_guest_power_off(monkeypatch):
    def hung_up(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(run_command.click, "echo", hung_up)
    use = Ending()
    assert run_command._wait(use, "dev-vm runs.") == 0
    assert use.done == ["power down"]
    notes = run_command._Notes()
    notes.show()
    notes.add("said while it shuts down")


def test_control_c_right_behind_the_boot_powers_it_down(monkeypatch):
    said = []

    def interrupted(text: str, **_: object) -> None:
        said.append(text)
        if len(said) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_command.click, "echo", interrupted)
    use = Ending()
    assert run_command._wait(use, "dev-vm runs.") == 0
    assert use.done == ["power down"]


def test_who_does_not_wait_for_the_boot_is_told_where_its_console_is(tmp_path, capsys):
    use = Ending()
    use.start = use.wait
    for log, said in ((None, ""), (tmp_path / "log", f"shown: {tmp_path}/log\n")):
        use.console_log = log
        with pytest.raises(KeyboardInterrupt):
            run_command._start(use)
        assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("nohup", [False, True])
def test_closed_terminal_ends_it_unless_nohup_has_said_otherwise(nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with run_command._signals():
            if nohup:
                os.kill(os.getpid(), signal.SIGHUP)
            else:
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGHUP)
                os.kill(os.getpid(), signal.SIGHUP)  # told twice, it cuts no power
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if nohup else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


# --- nixvm ssh and console ----------------------------------------------------------------------


class Host:
    """Stands for a VM that runs."""

    def __init__(self):
        self.users = []
        self.console = Console()

    def log_in(self, user):
        self.users.append(user)
        return ["ssh", "-p", "2222", "root@127.0.0.1"]

    def serial_console(self):
        return self.console


class Console:
    closed = False

    def __init__(self):
        self.taps = []

    def last_line(self):
        return "login: "

    def tap(self, callback):
        self.taps.append(callback)
        return lambda: self.taps.remove(callback)

    def send(self, data):
        self.taps[0](b"<" + data + b">")


@pytest.fixture
def host(tmp_path):
    host, path = Host(), tmp_path / "run" / "control"
    control = Control(path, host)
    running.write(
        running.Running(
            "dev-vm", "flake", os.getpid(), running.began(os.getpid()), path, None,
            Path("/runs/console.log"),
        )
    )  # fmt: skip
    yield host
    control.close()


@pytest.mark.parametrize("name", ["ssh", "console"])
def test_vm_that_does_not_run_is_one_line(nixvm, name):
    status, out, err = nixvm(name, "dev-vm")
    assert (status, out) == (2, "")
    assert err == (
        "nixvm: dev-vm does not run: start it with `nixvm run dev-vm`. Running: nothing.\n"
    )


@pytest.mark.parametrize("name", ["ssh", "console"])
def test_flake_that_is_named_has_to_be_its_own(nixvm, host, name, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "flake.nix").write_text("{ }")
    status, _, err = nixvm(name, "--flake", "other", "dev-vm")
    assert status == 2
    assert "does not run, but that of flake does" in err


def test_ssh_is_given_the_command_as_it_is(nixvm, host, monkeypatch):
    became = []
    monkeypatch.setattr(ssh_command, "_become", became.append)
    monkeypatch.setattr(ssh_command.shutil, "which", lambda _: "/bin/ssh")
    assert nixvm("ssh", "-l", "alice", "-t", "dev-vm", "ls", "-l", "--user", "x")[0] == 0
    assert host.users == ["alice"]
    argv = became[0]
    assert argv[0] == "/bin/ssh"
    assert "-t" in argv
    assert argv[-5:] == ["root@127.0.0.1", "ls", "-l", "--user", "x"]


def test_option_that_ssh_has_and_we_have_not_is_said(nixvm, host):
    status, out, err = nixvm("ssh", "-p", "22", "dev-vm")
    assert (status, out) == (2, "")
    assert err.startswith("nixvm: No such option")
    assert "-p" in err


def test_ssh_command_is_printed_for_other_programs(nixvm, host):
    status, out, _ = nixvm("ssh", "--print", "dev-vm")
    assert (status, shlex.split(out)) == (0, ["ssh", "-p", "2222", "root@127.0.0.1"])


def test_no_ssh_is_one_line(nixvm, host, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    status, _, err = nixvm("ssh", "dev-vm")
    assert status == 2
    assert "`ssh` is not on PATH" in err


def test_console_needs_a_terminal(nixvm, host):
    status, _, err = nixvm("console", "dev-vm")
    assert status == 2
    assert "is for a terminal" in err
    assert "/runs/console.log" in err


@pytest.mark.parametrize("end", ["leave", "terminated"])
def test_terminal_is_as_before_behind_the_console(host, end):
    main_end, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    connection, other = socket.socketpair()
    handler = signal.getsignal(signal.SIGTERM)

    def talk() -> None:
        other.sendall(b"login: ")
        got = b""
        while b"login: " not in got:
            got += os.read(main_end, 100)
        os.write(main_end, b"\x03alice")  # Control-C is the guest's
        assert other.recv(100) == b"\x03alice"
        if end == "leave":
            os.write(main_end, b"\x1d")
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    speaker = threading.Thread(target=talk)
    speaker.start()
    if end == "leave":
        with console_command._raw(terminal):
            assert console_command._relay(connection, terminal, terminal) is True
    else:
        with pytest.raises(SystemExit) as ended, console_command._raw(terminal):
            console_command._relay(connection, terminal, terminal)
        assert ended.value.code == 128 + signal.SIGTERM
    speaker.join(5)
    assert termios.tcgetattr(terminal) == before
    assert signal.getsignal(signal.SIGTERM) == handler
    for each in (main_end, terminal):
        os.close(each)


def test_end_of_the_vm_ends_the_console():
    main_end, terminal = pty.openpty()
    connection, other = socket.socketpair()
    other.close()
    assert console_command._relay(connection, terminal, terminal) is False
    for each in (main_end, terminal):
        os.close(each)


def test_names_of_running_vms_are_completed(host):
    assert [each.value for each in ssh_command.complete_running(None, None, "dev")] == ["dev-vm"]
    assert ssh_command.complete_running(None, None, "x") == []
