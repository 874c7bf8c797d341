"""The waits that run in the guest, run by this machine's own bash."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest

from pytest_nixvm.errors import (
    AgentError,
    CommandTimeoutError,
    MachineError,
    MachineGoneError,
    WaitTimeoutError,
)
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.guest.socket_waits import port_wait, unix_socket_wait
from pytest_nixvm.guest.waits import GuestWait, file_wait, wait_in_guest


def run(script, timeout, *, shell=("bash",), path=None):
    env = {**os.environ, **({"PATH": str(path)} if path else {})}
    done = subprocess.run(
        [*shell, "-c", script], check=False, capture_output=True, timeout=timeout, env=env
    )
    return CommandResult(script, done.returncode, done.stdout, done.stderr, 0.0)


def wait(what, timeout=20, run=run):
    return wait_in_guest(what, run, where="vm", timeout=timeout)


@contextlib.contextmanager
def soon(event):
    """`event` happens during the block, which has to last until then, and no second longer."""
    happened = []

    def do():
        event()
        happened.append(time.monotonic())

    timer = threading.Timer(0.4, do)
    timer.start()
    try:
        yield
        end = time.monotonic()
        assert happened, "it ended before the event"
        assert end - happened[0] < 10  # a loaded machine
    finally:
        timer.join()


# --- the loop -----------------------------------------------------------------------------------


def test_a_guest_without_bash():
    dash = shutil.which("dash")
    if dash is None:
        pytest.skip("needs dash, a shell that is not bash")

    with pytest.raises(MachineError, match="vm can't be waited for: the guest has no bash"):
        wait(file_wait("/"), run=lambda script, timeout: run(script, timeout, shell=(dash,)))


def test_the_loop_starts_nothing_for_its_pauses(tmp_path):
    # No program is to be had, and the wait works all the same.
    bash = shutil.which("bash")

    def alone(script, timeout):
        return run(script, timeout, shell=(bash,), path=tmp_path)

    with soon((tmp_path / "x").touch):
        wait(file_wait(str(tmp_path / "x")), run=alone)


def test_a_guest_that_does_not_end_the_wait_is_left_in_time():
    def stuck(script, timeout):
        raise CommandTimeoutError("stuck", command=script)

    with pytest.raises(WaitTimeoutError, match=r"(?s)Waited 3 s for the file /x on vm.*stuck"):
        wait(file_wait("/x"), 3, run=stuck)


def test_a_look_around_that_fails_does_not_hide_the_wait():
    def cut(script, timeout):
        if "until happened" in script:
            return run(script, timeout)
        raise AgentError("no answer")

    with pytest.raises(WaitTimeoutError, match=r"(?s)the file /nope on vm.*not be seen: no answer"):
        wait(file_wait("/nope"), 0, run=cut)


def test_a_vm_that_ends_ends_the_wait():
    def gone(script, timeout):
        raise MachineGoneError("QEMU has ended")

    with pytest.raises(MachineGoneError):
        wait(file_wait("/nope"), run=gone)


def test_the_look_around_may_be_the_caller_s():
    never = GuestWait("Godot", "happened() { false; }")

    with pytest.raises(WaitTimeoutError, match=r"Waited 0 s for Godot on vm, in vain\.\na tree"):
        wait_in_guest(never, run, where="vm", timeout=0, saw=lambda: "a tree")


# --- files --------------------------------------------------------------------------------------


def test_a_file_that_comes(tmp_path):
    with soon((tmp_path / "here").touch):
        wait(file_wait(str(tmp_path / "here")))


@pytest.mark.parametrize("name", ["$HOME", "~", "/et?", "/usr/*", "/{nope,etc}", "'/etc'"])
def test_names_are_shell_text(name):
    wait(file_wait(name), 0)


def test_a_name_with_blanks(tmp_path):
    (tmp_path / "a b").touch()

    wait(file_wait(f"'{tmp_path}/a b'"), 0)
    with pytest.raises(MachineError, match=r"2 words to the shell: put it in quotes"):
        wait(file_wait(f"{tmp_path}/a b"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "the name is empty"),
        ("$NOT_SET_AT_ALL", r"waited for: NOT_SET_AT_ALL: unbound variable\.$"),
        ("'/etc", "waited for: unexpected EOF"),
    ],
)
def test_names_that_mean_nothing_are_refused_at_once(name, says):
    with pytest.raises(MachineError, match=says) as caught:
        wait(file_wait(name))
    assert not isinstance(caught.value, WaitTimeoutError)


def missing(name):
    with pytest.raises(WaitTimeoutError) as caught:
        wait(file_wait(str(name)), 0)
    return str(caught.value)


def test_a_file_that_is_missing_shows_its_directory(tmp_path):
    (tmp_path / "almost").touch()

    text = missing(tmp_path / "right")

    assert text.startswith(f"Waited 0 s for the file {tmp_path}/right on vm, in vain.\n")
    assert f"Its directory {tmp_path} holds, newest first:" in text
    assert "almost" in text


def test_a_directory_that_is_missing_as_well(tmp_path):
    (tmp_path / "there").touch()

    text = missing(tmp_path / "not" / "there" / "x")

    assert f"The nearest one, {tmp_path}, holds, newest first:" in text
    assert "there\n" in f"{text}\n"


def test_the_root_is_the_last_directory():
    assert "Its directory / holds, newest first:" in missing("/nope")
    assert "The nearest one, /, holds, newest first:" in missing("/nope/nope")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()

    assert f"{tmp_path}/file is not a directory:" in missing(tmp_path / "file" / "x")


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to("/nope")

    assert "is a symbolic link to what does not exist:" in missing(tmp_path / "link")
    assert "-> /nope" in missing(tmp_path / "link")


def test_a_directory_with_very_many_files(tmp_path):
    for number in range(500):
        (tmp_path / f"file-{number:03}").touch()

    text = missing(tmp_path / "x")

    assert text.endswith("lines more]")
    assert len(text.splitlines()) < 50
    assert f"Its directory {tmp_path} holds, newest first:" in text


# --- ports --------------------------------------------------------------------------------------


@pytest.fixture
def port():
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_port_that_opens(port):
    servers = []

    with soon(lambda: servers.append(socket.create_server(("127.0.0.1", port)))):
        wait(port_wait(port, "localhost"))

    servers[0].close()


def test_a_port_that_closes_is_not_called_again_and_again():
    server = socket.create_server(("127.0.0.1", 0), backlog=100)
    server.setblocking(False)
    calls = []

    def close():
        with contextlib.suppress(BlockingIOError):
            while True:
                calls.append(server.accept())
        server.close()

    with soon(close):
        wait(port_wait(server.getsockname()[1], "127.0.0.1", closed=True))

    assert 1 <= len(calls) <= 3  # it is called again when it seems to be closed


def test_a_port_that_is_closed(port):
    wait(port_wait(port, "localhost", closed=True), 0)


def test_a_port_that_stays_closed_shows_who_listens(port):
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        with pytest.raises(WaitTimeoutError) as caught:
            wait(port_wait(port, "127.0.0.1"), 0)

    text = str(caught.value)
    assert f"Nothing answers on 127.0.0.1 port {port}: Connection refused." in text
    assert f"127.0.0.1:{number}" in text


def test_who_listens_is_known_without_ss(port, tmp_path):
    for program in ("bash", "timeout", "cat"):
        (tmp_path / program).symlink_to(shutil.which(program))
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        with pytest.raises(WaitTimeoutError) as caught:
            wait(port_wait(port, "127.0.0.1"), 0, lambda s, t: run(s, t, path=tmp_path))

    assert "(/proc/net/tcp)" in str(caught.value)
    assert f"\n127.0.0.1:{number}\n" in f"{caught.value}\n"


def test_a_port_that_stays_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        with pytest.raises(WaitTimeoutError, match=f"Something answers on localhost port {number}"):
            wait(port_wait(number, "localhost", closed=True), 0.2)


def test_an_address_that_nobody_knows():
    with pytest.raises(WaitTimeoutError) as caught:
        wait(port_wait(80, "no-such-host.invalid"), 0)

    assert "no-such-host.invalid port 80: " in str(caught.value)
    assert "listens in the guest" not in str(caught.value)


@pytest.mark.parametrize("number", [0, -1, 65536])
def test_what_is_no_port(number):
    with pytest.raises(ValueError, match="no TCP port"):
        port_wait(number, "localhost")


def test_an_address_is_no_shell_text(tmp_path):
    with pytest.raises(WaitTimeoutError):
        wait(port_wait(80, f"$(touch {tmp_path}/x)"), 0)
    assert not list(tmp_path.iterdir())


# --- unix sockets -------------------------------------------------------------------------------


@pytest.fixture
def unix():
    made = []

    def make(kind=socket.SOCK_STREAM):
        made.append(socket.socket(socket.AF_UNIX, kind))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_socket_that_is_listened_on(unix, tmp_path):
    server = unix()
    server.bind(str(tmp_path / "s"))  # bound is not enough

    with soon(server.listen):
        wait(unix_socket_wait(str(tmp_path / "s")))


def test_a_socket_by_another_path(unix, tmp_path):
    server = unix()
    server.bind(str(tmp_path / "s"))
    server.listen()
    (tmp_path / "run").symlink_to(tmp_path)

    wait(unix_socket_wait(f"{tmp_path}/run/s"), 0)


def test_a_datagram_socket(unix, tmp_path):
    path = str(tmp_path / "s")

    with soon(lambda: unix(socket.SOCK_DGRAM).bind(path)):
        wait(unix_socket_wait(path, datagram=True))

    with pytest.raises(WaitTimeoutError, match="it is a datagram socket"):
        wait(unix_socket_wait(path), 0)


def test_an_abstract_socket(unix, tmp_path):
    name = f"nixvm-{os.getpid()}"
    server = unix()

    with soon(lambda: (server.bind(f"\0{name}"), server.listen())):
        wait(unix_socket_wait(f"@{name}"))


def test_a_socket_whose_server_has_gone(unix, tmp_path):
    server = unix()
    server.bind(str(tmp_path / "s"))
    server.listen()
    server.close()

    with pytest.raises(WaitTimeoutError, match=f"{tmp_path}/s is a socket, but nobody listens"):
        wait(unix_socket_wait(str(tmp_path / "s")), 0)


def test_what_is_no_socket_and_what_is_not_there(unix, tmp_path):
    other = unix()
    other.bind(str(tmp_path / "other"))
    other.listen()
    (tmp_path / "file").touch()

    with pytest.raises(WaitTimeoutError, match=f"{tmp_path}/file is not a socket:"):
        wait(unix_socket_wait(str(tmp_path / "file")), 0)
    with pytest.raises(WaitTimeoutError, match=rf"(?s)There is no {tmp_path}/no.*{tmp_path}/other"):
        wait(unix_socket_wait(str(tmp_path / "no")), 0)
