"""The shell channel with real bash: on this machine, with sockets for a VM's ports."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from _guest import short_directory, until
from _shell import Guest, gone, guest

from pytest_nixvm.errors import (
    AgentError,
    CommandFailedError,
    CommandTimeoutError,
    GuestPanicError,
    MachineGoneError,
    ShellError,
)
from pytest_nixvm.guest.shell import Shell
from pytest_nixvm.guest.shell_script import compose
from pytest_nixvm.guest.shell_stream import Input, Output

pytestmark = pytest.mark.shell

EVERYTHING = bytes(range(256)) * 1000


@pytest.fixture(params=["cgroup", "mark"])
def machine(request: pytest.FixtureRequest) -> Iterator[Guest]:
    with short_directory() as directory, guest(directory, request.param) as made:
        yield made


@pytest.fixture
def shell(machine: Guest) -> Shell:
    return machine.shell


# --- results ---------------------------------------------------------------------------------


def test_streams_and_status_are_kept_apart(shell: Shell) -> None:
    result = shell.run("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 3)
    assert result.channel == "shell"
    with pytest.raises(CommandFailedError, match="exit status 3"):
        shell.run("exit 3", check=True)


def test_an_argv_meets_no_shell(shell: Shell) -> None:
    assert shell.run(["printf", "%s|", "a  b", "$HOME", "'\"\\", ""]).stdout == "a  b|$HOME|'\"\\||"


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["nixvm-no-such-program"], 127, "not found"),
        (["/etc"], 126, "directory"),
        ("nixvm-no-such-program", 127, "line 1: nixvm-no-such-program"),
        ("true\n\nif", 2, "syntax error"),
        ("kill -TERM $BASHPID", 143, ""),
        ("exec sh -c 'exit 7'", 7, ""),
        ("set -e; false; echo not here", 1, ""),
        ("trap 'echo trapped >&2' EXIT; exit 4", 4, "trapped"),
        ("trap '' TERM; exec 1>&- 2>&- 0<&-; exit 5", 5, ""),
    ],
)
def test_whatever_a_command_does_the_next_one_works(shell, command, status, said) -> None:
    result = shell.run(command)
    assert result.returncode == status
    assert said in result.stderr
    assert shell.run("echo next").stdout == "next\n"


@pytest.mark.parametrize(
    "data", [EVERYTHING, b"", b"\n", b"\0", b"no newline", b"\0\0a end 0\n", b"\xff\n\\ " * 9999]
)
def test_both_ways_are_binary_safe(shell: Shell, data: bytes) -> None:
    result = shell.run("tee /dev/stderr", stdin=data)
    assert result.stdout_bytes == data
    assert result.stderr_bytes == data


def test_text_is_utf_8(shell: Shell) -> None:
    result = shell.run(["sh", "-c", "printf %s 'grün'; cat"], stdin="Öl €")
    assert result.stdout == "grünÖl €"
    assert shell.run("x=ö; echo ${#x}", env={"LC_ALL": "C.UTF-8"}).stdout == "1\n"


def test_megabytes_both_ways_at_once(shell: Shell) -> None:
    data = os.urandom(2**22)
    result = shell.run("tee /dev/stderr", stdin=data, timeout=60)
    assert result.stdout_bytes == data
    assert result.stderr_bytes == data


def test_files_are_streamed(shell: Shell) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    reading, writing = os.pipe()
    feeder = threading.Thread(target=lambda: (os.write(writing, EVERYTHING), os.close(writing)))
    feeder.start()
    with os.fdopen(reading, "rb") as source:
        result = shell.run("tee /dev/stderr", stdin=source, stdout=out, stderr=err)
    feeder.join()
    assert (out.getvalue(), err.getvalue()) == (EVERYTHING, EVERYTHING)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


@pytest.mark.parametrize("command", ["exit 3", "head -c 1 >/dev/null; exit 3", "exec 0<&-; exit 3"])
def test_input_that_nobody_reads_harms_nobody(shell: Shell, command: str) -> None:
    assert shell.run(command, stdin=bytes(5 * 2**20), timeout=60).returncode == 3
    assert shell.run("echo next").stdout == "next\n"


def test_without_input_there_is_none(shell: Shell) -> None:
    assert shell.run("cat; echo end").stdout == "end\n"


# --- surroundings ----------------------------------------------------------------------------


def test_the_outputs_can_be_opened_again(shell: Shell) -> None:
    result = shell.run("echo a >/dev/stderr; echo b | tee /dev/stdout; echo c >/proc/self/fd/1")
    assert (result.stdout, result.stderr) == ("b\nb\nc\n", "a\n")


def test_the_command_sees_nothing_of_ours(shell: Shell) -> None:
    look = "for n in {0..255}; do [[ -e /proc/$BASHPID/fd/$n ]] && echo $n; done"
    assert shell.run(look).stdout.split() == ["0", "1", "2"]
    assert shell.run(look, stdin="").stdout.split() == ["0", "1", "2"]
    seen = shell.run(["env"]).stdout
    assert "nixvm" not in seen.lower().replace("pytest_nixvm_command", "").replace("/nixvm-", "")
    assert shell.run("echo $#,$0,$-,$LC_ALL").stdout.split(",")[:2] == ["0", "bash"]


def test_nothing_of_a_command_reaches_the_next(shell: Shell) -> None:
    shell.run(
        "cd /tmp; x=1; export y=2; f() { :; }; set -f; umask 0; exec 5</dev/null; trap '' INT"
    )
    assert shell.run("echo $PWD $x $y $-; type f; umask").stdout.split()[0] == "/"
    assert shell.run("echo $x$y").stdout == "\n"


def test_environment_and_directory(shell: Shell, tmp_path: Path) -> None:
    env = {"PLAIN": "a b'\"$x\n", "strange.name": "c", "UID": "7"}
    result = shell.run(
        'printf %s "$PLAIN"; printenv strange.name UID; pwd', env=env, cwd=str(tmp_path)
    )
    assert result.stdout == f"a b'\"$x\nc\n7\n{tmp_path}\n"
    assert shell.run(["printenv", "PLAIN", "strange.name"], env=env).stdout == "a b'\"$x\n\nc\n"
    missing = shell.run("echo here", cwd="/nixvm/missing")
    assert (missing.returncode, missing.stdout) == (125, "")
    assert "/nixvm/missing" in missing.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_user(shell: Shell) -> None:
    result = shell.run('id -un; echo "$USER $LOGNAME"; echo err >/dev/stderr', user="nobody")
    assert result.stdout == "nobody\nnobody nobody\n"
    assert result.stderr == "err\n"
    assert shell.run(["printenv", "A"], user="nobody", env={"A": "b"}).stdout == "b\n"
    assert shell.run("true", user="nixvm-nobody").returncode != 0


def test_mistakes_are_found_before_anything_is_run(shell: Shell) -> None:
    for wrong in ([], "a\0b", ["a", "b\0"]):
        with pytest.raises(ValueError, match=r"empty|NUL"):
            shell.run(wrong)
    with pytest.raises(ValueError, match="NUL"):
        shell.run("true", env={"A": "\0"})


# --- what is left behind ---------------------------------------------------------------------


def test_the_end_of_the_command_counts(machine: Guest) -> None:
    shell = machine.shell
    daemon = int(shell.run("sleep 60 >/dev/null 2>&1 & echo $!").stdout)
    try:
        with pytest.raises(CommandTimeoutError):
            shell.run("exec sleep 60", timeout=0.3)
        assert not gone(daemon)
    finally:
        os.kill(daemon, signal.SIGKILL)


@pytest.mark.parametrize("machine", ["cgroup"], indirect=True)
def test_late_output_gets_nowhere(machine: Guest) -> None:
    shell = machine.shell
    late = "while read -rt 0.05 <> <(:); [ $? -gt 128 ]; do echo late; echo late >&2; done"
    daemon = int(shell.run(f"{{ {late}; }} & echo $!").stdout.split()[0])
    for number in range(3):
        result = shell.run(f"read -t 0.2 <> <(:); echo {number}")
        assert (result.stdout, result.stderr) == (f"{number}\n", "")
    with pytest.raises(CommandTimeoutError):
        shell.run("exec sleep 60", timeout=0.3)
    assert not gone(daemon)  # nobody reads what it writes, and it is not ended by that
    os.kill(daemon, signal.SIGKILL)


@pytest.mark.parametrize("machine", ["cgroup"], indirect=True)
def test_what_ends_soon_may_still_speak(machine: Guest) -> None:
    assert machine.shell.run("echo hello > >(cat)").stdout == "hello\n"


# --- ends ------------------------------------------------------------------------------------


def test_a_command_that_takes_too_long_is_killed_with_its_children(shell: Shell) -> None:
    shell.run("true")
    with pytest.raises(CommandTimeoutError, match="killed with all") as caught:
        shell.run(
            "echo $BASHPID; sleep 60 & echo $!; setsid sleep 60 & echo $!; echo e >&2; wait",
            timeout=2,
        )
    pids = [int(word) for word in caught.value.stdout.split()]
    assert len(pids) == 3
    assert caught.value.stderr == "e\n"
    until(lambda: all(gone(pid) for pid in pids), "its children to end")
    assert shell.run("echo next").stdout == "next\n"


def test_all_that_was_written_is_in_the_timeout(shell: Shell) -> None:
    shell.run("true")
    with pytest.raises(CommandTimeoutError) as caught:
        shell.run("head -c 300000 /dev/zero | tr '\\0' x; exec sleep 60", timeout=2)
    assert caught.value.stdout == "x" * 300000


def test_a_timeout_in_the_middle_of_the_input(shell: Shell) -> None:
    with pytest.raises(CommandTimeoutError):
        shell.run("exec sleep 60", stdin=bytes(2**20) + b"\nrun 5 abc\nfalse\n" * 1000, timeout=0.5)
    assert shell.run("cat", stdin="next").stdout == "next"


def test_a_shell_that_dies_is_replaced(machine: Guest) -> None:
    shell = machine.shell
    threading.Timer(0.5, machine.tell).start()
    with pytest.raises(ShellError, match="was ended before") as caught:
        shell.run("echo last words; kill -KILL $$")
    assert caught.value.stdout == "last words\n"
    assert shell.run("echo next").stdout == "next\n"
    with pytest.raises(ShellError, match="was ended before"):
        shell.run("kill -KILL $$")  # and nobody tells
    assert shell.run("echo next").stdout == "next\n"


def test_a_sink_that_takes_no_more_ends_the_command(shell: Shell) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        shell.run("yes", stdout=Full(), timeout=30)
    assert shell.run("echo next").stdout == "next\n"


def test_what_a_person_interrupts_does_not_go_on(shell: Shell, tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def interrupt() -> None:
        until(lambda: pid.exists() and pid.read_text(), "the command", 30)
        os.kill(os.getpid(), signal.SIGINT)

    shell.run("true")
    person = threading.Thread(target=interrupt)
    person.start()
    with pytest.raises(KeyboardInterrupt):
        shell.run(f"echo $BASHPID >{pid}; exec sleep 60")
    person.join()
    assert gone(int(pid.read_text()))
    assert shell.run("echo next").stdout == "next\n"


def test_a_fault_ends_what_runs_and_what_comes(shell: Shell) -> None:
    shell.run("true")
    threading.Timer(0.3, shell.interrupt, [GuestPanicError("the kernel panicked")]).start()
    begin = time.monotonic()
    with pytest.raises(GuestPanicError, match="panicked"):
        shell.run("exec sleep 60")
    with pytest.raises(GuestPanicError, match="panicked"):
        shell.run("true")
    assert time.monotonic() - begin < 30
    shell.revive()
    assert shell.run("echo next").stdout == "next\n"


def test_the_end_of_qemu_ends_what_runs(machine: Guest) -> None:
    machine.shell.run("true")
    threading.Timer(0.3, machine.end).start()
    with pytest.raises(MachineGoneError, match="QEMU has ended"):
        machine.shell.run("exec sleep 5")


def test_a_guest_that_was_started_anew(machine: Guest) -> None:
    first = machine.shell.run("echo $$").stdout
    machine.shell.forget()
    second = machine.shell.run("echo $$").stdout
    assert first != second
    until(lambda: gone(int(first)), "the old shell to end")


def test_a_shell_that_is_killed_while_it_waits(machine: Guest) -> None:
    first = int(machine.shell.run("echo $$").stdout)
    os.kill(first, signal.SIGKILL)
    until(lambda: not machine.is_open(machine.first), "the ports to be closed")
    machine.tell()
    assert int(machine.shell.run("echo $$").stdout) != first


# --- several ---------------------------------------------------------------------------------


def test_threads_share_what_there_is(machine: Guest) -> None:
    shell = machine.shell
    results: dict[int, str] = {}

    def work(number: int) -> None:
        for _ in range(3):
            results[number] = shell.run(f"read -t 0.05 <> <(:); echo {number}").stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: f"{number}\n" for number in range(8)}
    assert len(machine.ports) <= 3
    shell.unplug()
    assert list(machine.ports) == [0]
    assert shell.run("echo next").stdout == "next\n"


def test_waiting_for_a_shell_is_bounded(machine: Guest) -> None:
    machine.most = 1
    machine.shell.run("true")
    thread = threading.Thread(target=machine.shell.run, args=("exec sleep 1.5",))
    thread.start()
    until(lambda: not machine.shell._idle, "the shell to be busy")
    with pytest.raises(CommandTimeoutError, match="all 1 shells of the VM were busy"):
        machine.shell.run("true", timeout=0.2)
    thread.join()


def test_another_shell_helps_where_the_agent_is_dead(machine: Guest) -> None:
    machine.most = 2
    thread = threading.Thread(target=machine.shell.run, args=("exec sleep 1",))
    machine.shell.prepare()
    thread.start()
    until(lambda: not machine.shell._idle, "the shell to be busy")
    machine.shell.run("true")  # now there are two
    thread.join()
    machine.agent_works = False
    with pytest.raises(CommandTimeoutError, match="killed with all"):
        machine.shell.run("exec sleep 60", timeout=0.3)


def test_without_agent_and_shell_the_error_says_so(machine: Guest) -> None:
    machine.agent_works = False
    with pytest.raises(AgentError, match="did not answer"):
        machine.shell.run("true")
    machine.agent_works = True
    assert machine.shell.run("echo next").stdout == "next\n"


def test_a_guest_without_bash_or_ports(machine: Guest) -> None:
    bash, machine.bash = machine.bash, "/bin/sh"
    with pytest.raises(ShellError, match="no bash"):
        machine.shell.run("true")
    machine.bash = bash
    machine.named(machine.ports[0][0], "something else")
    with pytest.raises(ShellError, match=r"no virtio ports named org\.pytest-nixvm\.shell\.0 "):
        machine.shell.run("true")


# --- a clone's -------------------------------------------------------------------------------


def test_a_clone_goes_on_with_the_shell_that_was_frozen(machine: Guest) -> None:
    first = machine.shell.run("echo $$").stdout
    machine.agent_works = False  # no other shell can be started

    clone = machine.clone()

    assert clone.run("echo $$").stdout == first
    assert clone.run("tee /dev/stderr; exit 3", stdin=EVERYTHING).stderr_bytes == EVERYTHING
    assert len(machine.started) == 1
    assert machine.clone().run("echo $$").stdout == first  # a clone's clone


def test_a_clone_s_shell_can_be_told_to_end_what_it_runs(machine: Guest) -> None:
    machine.shell.run("true")
    clone = machine.clone()
    with pytest.raises(CommandTimeoutError, match="killed with all") as caught:
        clone.run("sleep 300 & echo $!; exec sleep 300", timeout=2)
    until(lambda: gone(int(caught.value.stdout)), "what it has started to end")
    assert clone.run("echo next").stdout == "next\n"


def test_what_was_left_in_the_background_before_a_freeze_lives_on(machine: Guest) -> None:
    left = int(machine.shell.run("sleep 300 >/dev/null 2>&1 & echo $!").stdout)
    clone = machine.clone()
    assert clone.run("echo hi").stdout == "hi\n"
    with pytest.raises(CommandTimeoutError):
        clone.run("exec sleep 300", timeout=0.3)
    assert not gone(left)
    os.kill(left, signal.SIGKILL)


def test_only_the_first_shell_is_frozen(machine: Guest) -> None:
    machine.shell.prepare()
    thread = threading.Thread(target=machine.shell.run, args=("exec sleep 0.5",))
    thread.start()
    until(lambda: not machine.shell._idle, "the shell to be busy")
    second = int(machine.shell.run("echo $$").stdout)

    clone = machine.clone()  # when the command has ended

    thread.join()
    assert list(machine.ports) == [0]
    until(lambda: gone(second), "the second shell to end")
    assert clone.run("echo next").stdout == "next\n"


def test_a_clone_whose_shell_is_gone_gets_a_new_one(machine: Guest) -> None:
    first = int(machine.shell.run("echo $$").stdout)
    clone = machine.clone()
    os.kill(first, signal.SIGKILL)
    until(lambda: not machine.is_open(machine.first), "the ports to be closed")
    machine.tell()
    assert int(clone.run("echo $$").stdout) != first


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_mark_is_found_however_it_is_cut(size: int) -> None:
    got: list[bytes] = []
    marks: list[list[str]] = []
    output = Output("abc", got.append, lambda words: bool(marks.append(words)) or len(marks) == 2)
    data = b"one\0abd \0ab\0abc input\ntwo\0\0\0abc end 3 0\nlate"
    for at in range(0, len(data), size):
        output.feed(data[at : at + size])
    assert output.done
    assert b"".join(got) == b"one\0abd \0abtwo\0\0"
    assert marks == [["input"], ["end", "3", "0"]]


def test_what_looked_like_a_mark_is_not_lost() -> None:
    got: list[bytes] = []
    output = Output("abc", got.append, lambda _: True)
    output.feed(b"x\0ab")
    assert b"".join(got) == b"x"
    output.flush()
    assert b"".join(got) == b"x\0ab"


def test_input_stops_behind_a_chunk() -> None:
    source = Input(b"head", bytes(5 * 2**20))
    sent = [bytes(source.take()) for _ in range(3)]
    assert sent[:2] == [b"head", b"2097152\n"]
    source.stop()
    assert bytes(source.take()) == b"0\n"
    assert not source.take()


def test_what_comes_before_a_command_is_on_its_line() -> None:
    text = compose("echo hi\nfalse", env={"A": "b"}, cwd="/x y").decode()
    assert text.count("\n") == 2
    assert text.startswith("export A=b; CDPATH= cd -- '/x y' >/dev/null || exit 125; echo hi\n")
