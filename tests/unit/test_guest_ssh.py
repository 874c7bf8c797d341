"""SSH against a real sshd on loopback."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest
from _guest import Sshd, program

from pytest_nixvm.errors import ChannelError, CommandFailedError, CommandTimeoutError, SshError
from pytest_nixvm.guest.keys import KeyPair
from pytest_nixvm.guest.ssh import Ssh

MEGABYTE = 1024 * 1024


def connection(server: Sshd, **changes: object) -> Ssh:
    return Ssh(
        access=server.access(**changes),
        keys=server.keys,
        port=server.port,
        directory=server.directory,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    sshd = Sshd(tmp_path_factory.mktemp("sshd"))
    sshd.start()
    yield sshd
    sshd.stop()


@pytest.fixture(scope="module")
def ssh(server: Sshd) -> Iterator[Ssh]:
    connected = connection(server)
    yield connected
    connected.close()


def alive(text: str) -> bool:
    return subprocess.run(["pgrep", "-f", "--", text], capture_output=True).returncode == 0


def test_streams_and_status_are_kept_apart(ssh: Ssh) -> None:
    result = ssh.run("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.returncode) == ("out\n", "err\n", 3)
    assert result.channel == "ssh"


def test_an_argv_reaches_the_program_as_it_is(ssh: Ssh) -> None:
    words = ["a b", "$HOME", "'", '"', "*", "", "new\nline", "\\", "ä", "!x"]
    assert ssh.run(["printf", "%s\\0", *words]).stdout.split("\0")[:-1] == words


def test_environment(ssh: Ssh) -> None:
    value = "it's $HOME\nand `more`"
    assert ssh.run(["printenv", "NIXVM_T"], env={"NIXVM_T": value}).stdout == value + "\n"
    assert ssh.run('printf %s "$NIXVM_T"', env={"NIXVM_T": value}).stdout == value
    with pytest.raises(ValueError, match="x; rm -rf"):
        ssh.run("true", env={"x; rm -rf": "1"})


def test_stdin_is_binary_and_of_any_size(ssh: Ssh) -> None:
    data = bytes(range(256)) * 40_000  # more than any buffer on the way
    result = ssh.run(["tee", "/dev/stderr"], stdin=data)
    assert result.stdout_bytes == data
    assert result.stderr_bytes == data
    assert ssh.run(["cat"], stdin="ä").stdout == "ä"
    assert ssh.run(["cat"]).stdout == ""  # no stdin is an empty one, not a hang


def test_stdin_that_is_not_read_does_no_harm(ssh: Ssh) -> None:
    assert ssh.run(["true"], stdin=b"x" * 20 * MEGABYTE).ok


def test_hundred_megabytes_on_both_streams_at_once(ssh: Ssh) -> None:
    result = ssh.run(
        "head -c 104857600 /dev/zero >&2 & head -c 104857600 /dev/zero; wait", timeout=60
    )
    assert len(result.stdout_bytes) == len(result.stderr_bytes) == 100 * MEGABYTE


def test_the_end_by_a_signal_reads_as_in_a_shell(ssh: Ssh) -> None:
    assert ssh.run("kill -TERM $$").returncode == 128 + 15
    assert ssh.run(["sh", "-c", "kill -9 $$"]).returncode == 128 + 9


def test_check_raises_with_status_and_output(ssh: Ssh) -> None:
    with pytest.raises(CommandFailedError, match="exit status 2") as caught:
        ssh.run("echo why >&2; exit 2", check=True)
    assert caught.value.stderr == "why\n"


def test_a_program_that_is_not_there(ssh: Ssh) -> None:
    result = ssh.run(["no-such-program"])
    assert result.returncode == 127
    assert "no-such-program" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        "echo begun; sleep 4711.1",
        "echo begun; (setsid sleep 4711.1 &); while :; do :; done",  # a shell that starts nothing
        ["sh", "-c", "echo begun; env -i sleep 4711.1"],
    ],
)
def test_what_takes_too_long_is_killed_with_its_children(
    ssh: Ssh, command: str | list[str]
) -> None:
    ssh.run("true")
    start = time.monotonic()
    with pytest.raises(CommandTimeoutError, match=r"within 2 s.*It was killed") as caught:
        ssh.run(command, timeout=2)
    assert time.monotonic() - start < 30
    assert caught.value.stdout == "begun\n"
    assert not alive("sleep 4711.1")
    assert ssh.run(["echo", "well"]).stdout == "well\n"


def test_a_child_that_keeps_the_output_open_is_explained(ssh: Ssh) -> None:
    with pytest.raises(CommandTimeoutError, match=r"exit status 5, but something.*redirect"):
        ssh.run("sleep 4711.2 & exit 5", timeout=2)
    assert not alive("sleep 4711.2")


def test_twenty_threads_share_one_login(server: Sshd) -> None:
    ssh = connection(server)
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(ssh.run(f"sleep 0.05; echo {n}").stdout))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(map(int, results)) == list(range(20))
    transport = ssh.client.get_transport()
    assert transport is not None
    log = (server.directory / "log").read_text()
    assert isinstance(transport.sock, socket.socket)
    port = transport.sock.getsockname()[1]
    assert log.count(f"port {port} ssh2") == 1
    ssh.close()


def test_few_sessions_are_waited_for(tmp_path: Path) -> None:
    server = Sshd(tmp_path, "MaxSessions 2")
    server.start()
    try:
        ssh = connection(server, max_sessions=2)
        threads = [threading.Thread(target=ssh.run, args=("sleep 0.1",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        # One session is kept for this:
        with pytest.raises(CommandTimeoutError, match="It was killed"):
            ssh.run("sleep 4711.3", timeout=0.2)
        ssh.close()
    finally:
        server.stop()


def test_another_host_key_is_refused(server: Sshd, tmp_path: Path) -> None:
    other = KeyPair.generate(tmp_path).public_line
    ssh = connection(server, host_keys=(other,))
    with pytest.raises(SshError, match="not the one that its agent reported"):
        ssh.run("true")


def test_a_machine_without_a_known_host_key_is_refused(server: Sshd) -> None:
    ssh = connection(server, host_keys=())
    with pytest.raises(SshError, match="not found in known_hosts"):
        ssh.run("true")


def test_another_key_is_refused(server: Sshd, tmp_path: Path) -> None:
    ssh = Ssh(
        access=server.access(),
        keys=KeyPair.generate(tmp_path),
        port=server.port,
        directory=tmp_path,
    )
    with pytest.raises(SshError, match="refused the session's key"):
        ssh.run("true")


def test_a_port_behind_which_nobody_is(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """What QEMU does when the guest does not listen: it accepts, and then nothing comes."""
    monkeypatch.setattr("pytest_nixvm.guest.ssh.LOGIN_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ssh = Ssh(
            access=server.access(),
            keys=server.keys,
            port=silent.getsockname()[1],
            directory=server.directory,
        )
        with pytest.raises(SshError, match="no sshd answers behind it"):
            ssh.run("true")


def test_sshd_killed_in_the_middle_of_a_command_then_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Sshd(tmp_path)
    server.start()
    started = tmp_path / "started"
    arrived = threading.Event()
    receive = paramiko.Channel.recv

    def noticed(channel: paramiko.Channel, size: int) -> bytes:
        data = receive(channel, size)
        if data:
            arrived.set()
        return data

    def kill() -> None:
        arrived.wait(20)
        server.stop()

    monkeypatch.setattr(paramiko.Channel, "recv", noticed)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        ssh = connection(server)
        with pytest.raises(SshError, match=r"broke during(?s:.*)stdout until then:\n *half"):
            ssh.run(f"echo $$ >{started}; echo half; exec sleep 4711.4", timeout=30)
        killer.join()
        server.start()
        # The next command logs in again by itself.
        assert ssh.run(["echo", "back"]).stdout == "back\n"
        ssh.close()
    finally:
        server.stop()
        if started.exists():
            os.kill(int(started.read_text()), 9)  # nobody else does: that is what sshd is like


def test_a_connection_that_died_unnoticed_is_replaced(server: Sshd) -> None:
    ssh = connection(server)
    transport = ssh.client.get_transport()
    assert transport is not None
    # The state after a reboot: the transport believes it is connected.
    transport.sock.shutdown(2)
    assert ssh.run(["echo", "again"]).stdout == "again\n"
    ssh.close()


def test_the_command_line_works_as_it_is_printed(ssh: Ssh) -> None:
    program("ssh")
    line = ssh.command_line + " 'echo $((40 + 2))'"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=10)
    assert (done.stdout, done.returncode) == ("42\n", 0)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_both_ways(ssh: Ssh, tmp_path: Path) -> None:
    source = tmp_path / "source file"
    source.write_bytes(os.urandom(3 * MEGABYTE))
    source.chmod(0o750)
    there = tmp_path / "there"
    there.mkdir()
    ssh.put(source, str(there / "copy"))
    ssh.put(source, f"{there}/")
    ssh.get(str(there / "copy"), tmp_path / "back")
    for copy in (there / "copy", there / "source file", tmp_path / "back"):
        assert digest(copy) == digest(source)
        assert copy.stat().st_mode & 0o7777 == 0o750
    with pytest.raises(ChannelError, match="/no/such"):
        ssh.get("/no/such", tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        ssh.put(tmp_path / "not here", "/tmp/x")


def test_trees_both_ways(ssh: Ssh, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub dir").mkdir(parents=True)
    (tree / "sub dir" / "file").write_text("text")
    (tree / "link").symlink_to("sub dir/file")
    ssh.put(tree, str(tmp_path / "there"))
    ssh.get(str(tmp_path / "there"), tmp_path / "back")
    assert (tmp_path / "back" / "link").read_text() == "text"
    assert (tmp_path / "back" / "link").is_symlink()


def test_files_without_sftp(tmp_path: Path) -> None:
    server = Sshd(tmp_path)
    lines = server.config.read_text().splitlines()
    server.config.write_text(
        "\n".join(line for line in lines if not line.startswith("Subsystem")) + "\n"
    )
    server.start()
    try:
        ssh = connection(server)
        source = tmp_path / "it's"
        source.write_bytes(os.urandom(3 * MEGABYTE))
        source.chmod(0o700)
        (tmp_path / "there").mkdir()
        ssh.put(source, str(tmp_path / "there"))
        ssh.get(str(tmp_path / "there" / "it's"), tmp_path / "back")
        assert digest(tmp_path / "there" / "it's") == digest(tmp_path / "back") == digest(source)
        assert (tmp_path / "there" / "it's").stat().st_mode & 0o777 == 0o700
        with pytest.raises(ChannelError, match="the guest has no /no/such"):
            ssh.get("/no/such", tmp_path / "x")
        assert not (tmp_path / "x").exists()
        ssh.close()
    finally:
        server.stop()
