"""The serial console: a socket as QEMU's in front of a real shell, and a log-in like getty's."""

from __future__ import annotations

import io as python_io
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from _guest import Terminal, io_thread, program, short_directory, until

from pytest_nixvm.errors import (
    CommandFailedError,
    CommandTimeoutError,
    MachineGoneError,
    SerialError,
    WaitTimeoutError,
)
from pytest_nixvm.guest.console import Cleaner
from pytest_nixvm.guest.serial import Console, Serial
from pytest_nixvm.qemu.loop import IoThread

# getty and login as far as a console shows them: three users, one with a password, one locked.
LOGIN = r"""
import getpass, os, sys, time
while True:
    sys.stdout.write("\n\n<<< Welcome to a test (x86_64) - ttyS0 >>>\n\n")
    user = ""
    while not user:
        sys.stdout.write("dev-vm login: "); sys.stdout.flush()
        user = sys.stdin.readline().strip()
    if user != "root":
        given = getpass.getpass("Password: ")
        if (user, given) != ("alice", "secret"):
            time.sleep(0.3)
            sys.stdout.write("\nLogin incorrect\n")
            continue
    sys.stdout.write("Last login: yesterday\n"); sys.stdout.flush()
    if os.fork() == 0:
        name = user
        os.environ["PATH"] = os.environ["FAKE"] + ":" + os.environ["PATH"]
        os.environ["WHO"] = name
        os.execvp(os.environ["SHELL_UNDER_TEST"], [os.environ["SHELL_UNDER_TEST"], *sys.argv[1:]])
    os.wait()
"""
PS1 = r"\n\[\033[1;31m\][\[\e]0;\u@\h: \w\a\]\u@\h:\w]\\$\[\033[0m\] "  # NixOS's


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """These shells answer at once; a guest under TCG takes its time."""
    monkeypatch.setattr("pytest_nixvm.guest.serial.QUIET", 0.1)
    monkeypatch.setattr("pytest_nixvm.guest.serial.NUDGE", 0.3)


@pytest.fixture(scope="module")
def io() -> Iterator[IoThread]:
    with io_thread() as io:
        yield io


class Guest:
    """A terminal with its console and serial face."""

    def __init__(self, io: IoThread, directory: Path, argv: list[str], **env: str) -> None:
        fake = directory / "bin"
        fake.mkdir()
        (fake / "id").write_text('#!/bin/sh\necho "${WHO:-root}"\n')
        (fake / "id").chmod(0o755)
        settings = {"PS1": PS1, "FAKE": str(fake), "SHELL_UNDER_TEST": program("bash"), **env}
        self.terminal = Terminal(directory, argv, settings)
        self.console = Console(io, self.terminal.socket, self.terminal.log)
        self.console.connect(5)
        self.serial = Serial(self.console)

    def close(self) -> None:
        self.console.close()
        self.terminal.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
def getty(io: IoThread, directory: Path) -> Iterator[Guest]:
    (directory / "login.py").write_text(LOGIN)
    argv = [sys.executable, "-u", str(directory / "login.py"), "--norc", "-i"]
    guest = Guest(io, directory, argv)
    yield guest
    guest.close()


# --- what is shown --------------------------------------------------------------------------------


def test_escape_sequences_are_taken_out_wherever_a_chunk_ends() -> None:
    text = "\x1b[0;32mOK\x1b[0m Stärted\x1b]0;title\x07 x\r\r\n\x1b(Bnext\rline\x00\r\x1b[4C!\r\n"
    raw = text.encode()
    clean = "OK Stärted x\nnext\nline!\n"
    for cut in range(len(raw)):
        cleaner = Cleaner()
        assert cleaner.feed(raw[:cut]) + cleaner.feed(raw[cut:]) == clean
    cleaner = Cleaner()
    assert "".join(cleaner.feed(bytes([byte])) for byte in raw) == clean


class Feed:
    """A console into which a test writes."""

    def __init__(self, io: IoThread, directory: Path) -> None:
        import socket

        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(directory / "feed"))
        self.server.listen(1)
        self.console = Console(io, directory / "feed", directory / "log")
        self.console.connect(5)
        self.client, _ = self.server.accept()

    def show(self, text: str) -> None:
        self.client.sendall(text.encode())


@pytest.fixture
def feed(io: IoThread, directory: Path) -> Iterator[Feed]:
    feed = Feed(io, directory)
    yield feed
    feed.console.close()
    feed.client.close()
    feed.server.close()


def test_what_was_shown_before_is_found(feed: Feed) -> None:
    feed.show("Booting\r\nWelcome to NixOS\r\n")
    assert feed.console.wait_for(r"^Welcome to (\w+)$", 5).group(1) == "NixOS"
    mark = feed.console.mark()
    with pytest.raises(WaitTimeoutError, match=r"'Welcome' on the serial console(?s:.*)to NixOS"):
        feed.console.wait_for("Welcome", 0.05, since=mark)
    assert feed.console.text(mark) == ""
    feed.show("later")
    feed.console.wait_for("later", 5, since=mark)
    assert feed.console.text(mark) == "later"
    assert feed.console.tail(2) == "[1 lines before this]\nWelcome to NixOS\nlater"
    assert feed.console.last_line() == "later"


def test_a_pattern_that_arrives_in_pieces_wakes_the_waiter(feed: Feed) -> None:
    found: list[re.Match[str]] = []
    waiter = threading.Thread(
        target=lambda: found.append(feed.console.wait_for(r"^ready: (\d+)$\n", 10))
    )
    waiter.start()
    feed.show("not ready: 1 x\r\n")
    for piece in ("rea", "dy: \x1b[1m4", "2\x1b[0m", "\r", "\n"):
        feed.show(piece)
        time.sleep(0.002)  # only to make separate chunks likely
    waiter.join(5)
    assert found[0].group(1) == "42"


def test_a_line_start_is_one_only_at_a_line(feed: Feed) -> None:
    """A search that goes on in the middle of a line must not take that for a line's start."""
    found: list[re.Match[str]] = []
    waiter = threading.Thread(
        target=lambda: found.append(feed.console.wait_for(r"^x+yes$\n|^over", 10))
    )
    waiter.start()
    feed.show("not " + "x" * 40_000)
    feed.console.wait_for("x{16000}", 5)
    feed.show("yes\r\nover")
    waiter.join(5)
    assert found[0].group() == "over"


def test_much_output_is_taken_and_searched_in_time(feed: Feed) -> None:
    total = 8 * 1024 * 1024
    line = ("x" * 98 + "\r\n").encode()
    sender = threading.Thread(target=feed.client.sendall, args=(line * (total // 100) + b"end",))
    sender.start()
    start = time.monotonic()
    feed.console.wait_for("end$", 60)
    # Half a second; minutes if every chunk had everything searched again.
    assert time.monotonic() - start < 20
    sender.join()


def test_listeners_hear_of_output_and_of_the_end(feed: Feed) -> None:
    heard: list[str] = []
    undo = feed.console.on_output(lambda: heard.append(feed.console.text()))
    feed.show("one")
    until(lambda: heard and heard[-1] == "one", "the first call")
    undo()
    feed.show("two")
    feed.console.wait_for("two", 5)
    ended = threading.Event()

    def notice() -> None:
        if feed.console.closed:
            ended.set()

    feed.console.on_output(notice)
    feed.client.close()
    assert ended.wait(5)
    assert "onetwo" not in heard


def test_the_end_of_qemu_ends_a_wait(io: IoThread, feed: Feed) -> None:
    ending = threading.Timer(0.05, feed.client.close)
    ending.start()
    with pytest.raises(MachineGoneError, match="closed before it showed 'never'"):
        feed.console.wait_for("never", 30)
    with pytest.raises(MachineGoneError):
        io.run(feed.console.shown("never"), 5)
    with pytest.raises(MachineGoneError):
        feed.console.send(b"x")


def test_a_late_comer_reads_the_log(io: IoThread, directory: Path) -> None:
    (directory / "log").write_bytes(b"before\r\n")
    feed = Feed(io, directory)
    feed.show("after\r\n")
    feed.console.wait_for("after\n", 5)
    assert feed.console.text() == "before\nafter\n"
    feed.console.close()


def test_no_socket(io: IoThread, directory: Path) -> None:
    with pytest.raises(MachineGoneError, match="is not there"):
        Console(io, directory / "none", directory / "log").connect(0.05)


# --- pexpect ------------------------------------------------------------------------------------


def test_spawn_is_a_pexpect_object(feed: Feed) -> None:
    feed.show("old\r\ndev-vm login: ")
    feed.console.wait_for("login: ", 5)
    spawn = Serial(feed.console).spawn
    # The prompt that is on the screen counts, what scrolled by does not.
    assert spawn.expect(["old", "login: "], timeout=5) == 1
    record = python_io.StringIO()
    spawn.logfile_read = record
    assert spawn.sendline("alice") == 6
    assert feed.client.recv(100) == b"alice\r"
    spawn.sendcontrol("c")
    assert feed.client.recv(100) == b"\x03"
    feed.show("Wörld\r\nnext")
    spawn.expect("W(.*)d\r\n", timeout=5)
    assert isinstance(spawn.match, re.Match)
    assert spawn.match.group(1) == "örl"
    with pytest.raises(pexpect.TIMEOUT):
        spawn.expect("never", timeout=0.05)
    assert spawn.isalive()
    feed.client.close()
    spawn.expect(pexpect.EOF, timeout=5)
    assert str(spawn.before).endswith("next")
    assert not spawn.isalive()
    assert record.getvalue() == "Wörld\r\nnext"
    with pytest.raises(MachineGoneError):
        spawn.sendline("x")


# --- log-in -------------------------------------------------------------------------------------


def test_login_with_and_without_password(getty: Guest) -> None:
    serial = getty.serial
    serial.login("alice", "secret", timeout=15)
    assert serial.user == "alice"
    assert serial.run("id -un").stdout == "alice\n"
    serial.login("alice", "secret", timeout=15)  # already there
    serial.login("root", timeout=15)  # somebody else: out and in again
    assert serial.run("id -un").stdout == "root\n"
    serial.logout()
    assert serial.user is None
    assert serial.console.last_line() == "dev-vm login: "
    with pytest.raises(SerialError, match=r"serial\.login\(\) first"):
        serial.run("true")


def test_a_wrong_password(getty: Guest) -> None:
    with pytest.raises(SerialError, match=r"refused to log alice in with(?s:.*)incorrect"):
        getty.serial.login("alice", "wrong", timeout=15)
    getty.serial.login("alice", "secret", timeout=15)  # and it is usable afterwards


def test_a_password_that_was_not_given(getty: Guest) -> None:
    with pytest.raises(SerialError, match="asks for alice's password, and none was given"):
        getty.serial.login("alice", timeout=15)
    getty.serial.login("root", timeout=15)


def test_no_prompt_at_all(feed: Feed) -> None:
    feed.show("Booting the kernel...\r\n")
    with pytest.raises(WaitTimeoutError, match=r"a shell on the serial console(?s:.*)Booting the"):
        Serial(feed.console).login("root", timeout=0.3)


def test_a_console_that_logs_in_by_itself(io: IoThread, directory: Path) -> None:
    loop = f"export PATH={directory}/bin:$PATH; while :; do bash --norc -i; done"
    guest = Guest(io, directory, [program("bash"), "-c", loop], WHO="alice")
    try:
        guest.serial.login("alice", timeout=15)
        assert guest.serial.run("echo hi").stdout == "hi\n"
        with pytest.raises(SerialError, match="logs alice in by itself: no log-in as root"):
            guest.serial.login("root", timeout=15)
    finally:
        guest.close()


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("sh", "a prompt; like no other "), ("bash", PS1), ("zsh", "%m%# "), ("fish", "")],
)
def test_shells_of_all_kinds(io: IoThread, directory: Path, name: str, prompt: str) -> None:
    fake = f"PATH={directory}/bin:$PATH PS1='{prompt}'"
    guest = Guest(io, directory, ["/bin/sh", "-c", f"{fake} exec {program(name)} -i"])
    try:
        guest.serial.login("root", timeout=20)
        result = guest.serial.run("x='a  b'; echo \"$x\"; false")
        assert (result.stdout, result.returncode) == ("a  b\n", 1)
    finally:
        guest.close()


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logged_in(io: IoThread) -> Iterator[Guest]:
    with short_directory() as directory:
        fake = f"PATH={directory}/bin:$PATH"
        guest = Guest(io, directory, ["/bin/sh", "-c", f"{fake} exec bash --norc -i"])
        guest.serial.login("root", timeout=15)
        yield guest
        guest.close()


def test_a_commands_output_and_status(logged_in: Guest) -> None:
    serial = logged_in.serial
    result = serial.run("echo out; echo err >&2; (exit 7)")
    assert (result.stdout, result.returncode) == ("out\nerr\n", 7)
    assert result.channel == "serial"
    assert serial.run(["printf", "%s|", "a b", "$x", "'"]).stdout == "a b|$x|'|"
    assert serial.run("printf 'no newline'").stdout == "no newline"
    assert serial.run("true").stdout == ""
    assert serial.run("cd /; var=kept").ok
    assert serial.run("pwd; echo $var").stdout == "/\nkept\n"
    assert serial.run("test -t 0 && test -t 1").ok
    with pytest.raises(CommandFailedError, match="exit status 1"):
        serial.run("false", check=True)


def test_whatever_a_terminal_would_act_on(logged_in: Guest) -> None:
    serial = logged_in.serial
    text = "a\tb !x \x03 ü \\n 'q' \"d\"\nsecond # line"
    assert serial.run(["printf", "%s", text]).stdout == text.replace("\x03", "")
    assert serial.run("cat <<END\nfrom here\nEND\n").stdout == "from here\n"
    assert serial.run("echo 'open").returncode != 0  # a syntax error stays its own
    long = "x" * 9000  # more than a terminal takes in a line
    assert serial.run(f"v={long}; echo ${{#v}}").stdout == "9000\n"
    assert serial.run("seq 20000").stdout == "".join(f"{n}\n" for n in range(1, 20001))
    assert serial.run("printf 'x%.0s' $(seq 500)").stdout == "x" * 500  # nothing wraps


def test_messages_of_the_kernel_in_between(logged_in: Guest) -> None:
    serial, terminal = logged_in.serial, logged_in.terminal
    gate = terminal.socket.parent / "gate"
    os.mkfifo(gate)
    results: list[str] = []
    # Both marks and the output are cut by messages.
    command = f"printf 'half'; cat {gate}; echo ' done'"
    run = threading.Thread(target=lambda: results.append(serial.run(command).stdout))
    since = serial.console.mark()
    run.start()
    serial.console.wait_for("half", 5, since)
    terminal.inject(b"[   12.345678] eth0: link is up\r\n")
    serial.console.wait_for("link is up", 5, since)
    gate.write_text(" and half")
    run.join(5)
    assert results == ["half and half done\n"]
    dmesg = serial.run("echo '[    1.000000] a line of dmesg'")
    assert dmesg.stdout == "[    1.000000] a line of dmesg\n"


def test_a_message_in_the_middle_of_our_own_mark(io: IoThread, feed: Feed) -> None:
    serial = Serial(feed.console)
    serial._user = "root"
    result: list[object] = []
    run = threading.Thread(target=lambda: result.append(serial.run("echo x")))
    run.start()
    typed = feed.client.recv(1000).decode()
    token = re.search(r"begin\\n' (\w+)", typed).group(1)  # type: ignore[union-attr]
    feed.show(f"\r\nnixvm-{token}-begin\r\nx\r\n\r\nnixvm-{token[:3]}[   99.000001] oops\r\n")
    feed.show(f"{token[3:]}-end-0\r\nnixvm$ ")
    run.join(5)
    assert result[0].stdout == "x\n"  # type: ignore[attr-defined]


def test_what_takes_too_long_is_interrupted(logged_in: Guest) -> None:
    with pytest.raises(CommandTimeoutError, match=r"within 2 s.*Control-C ended it") as caught:
        logged_in.serial.run("echo begun; sleep 100", timeout=2)
    assert caught.value.stdout == "begun\n"
    assert logged_in.serial.run("echo well").stdout == "well\n"


def test_a_command_that_ends_the_shell(getty: Guest) -> None:
    getty.serial.login("root", timeout=15)
    with pytest.raises(SerialError, match="ended the shell"):
        getty.serial.run("exit", timeout=20)
    assert getty.serial.user is None


def test_the_machine_ends_during_a_command(io: IoThread, directory: Path) -> None:
    fake = f"PATH={directory}/bin:$PATH"
    guest = Guest(io, directory, ["/bin/sh", "-c", f"{fake} exec bash --norc -i"])
    guest.serial.login("root", timeout=15)
    with pytest.raises(MachineGoneError, match="closed during"):
        guest.serial.run("kill -9 $$", timeout=20)
    guest.close()
