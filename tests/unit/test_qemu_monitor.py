"""QMP against a peer that does what a real QEMU can't be made to do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import Runstate

from pytest_nixvm.errors import MachineGoneError, QmpError
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.qemu.supervisor import Process, Supervisor

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 10, "minor": 2, "micro": 1}, "package": ""},
        "capabilities": [],
    }
}


class Peer:
    """Speaks like QEMU: greets, negotiates, answers `query-status`; the rest is the test's."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.text = ""

    def write(self, text: str) -> None:
        self.socket.sendall(text.encode())

    def send(self, message: dict[str, Any]) -> None:
        self.write(json.dumps(message) + "\n")

    def receive(self) -> dict[str, Any]:
        # One after the other, with nothing between them: the protocol has no lines.
        while True:
            with contextlib.suppress(ValueError):
                message, end = json.JSONDecoder().raw_decode(self.text)
                self.text = self.text[end:].lstrip()
                assert isinstance(message, dict)
                return message
            data = self.socket.recv(4096)
            if not data:
                raise EOFError
            self.text += data.decode()

    def answer(self, **reply: Any) -> dict[str, Any]:
        request = self.receive()
        if "id" in request:
            reply["id"] = request["id"]
        self.send(reply)
        return request

    def come_up(self) -> None:
        self.send(GREETING)
        assert self.answer(**{"return": {}})["execute"] == "qmp_capabilities"
        assert self.answer(**{"return": {}})["execute"] == "query-status"

    def event(self, name: str, **data: Any) -> None:
        stamp = {"seconds": 1700000000, "microseconds": 500000}
        self.send({"event": name, "data": data, "timestamp": stamp})

    def close(self) -> None:
        self.socket.close()


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.close()


@pytest.fixture
def process(supervisor: Supervisor, tmp_path: Path) -> Iterator[Process]:
    process = supervisor.spawn(["/bin/sleep", "300"], env={}, cwd=tmp_path, log=tmp_path / "log")
    yield process
    process.kill()


@pytest.fixture
def io(caplog: pytest.LogCaptureFixture) -> Iterator[IoThread]:
    """An I/O thread of which nothing is left, and about which nobody has complained."""
    io = IoThread()
    yield io
    io.close()
    gc.collect()
    records = [*caplog.get_records("setup"), *caplog.get_records("call"), *caplog.records]
    assert [r.getMessage() for r in records if r.levelno >= logging.WARNING] == []


@pytest.fixture
def monitor(io: IoThread, tmp_path: Path) -> Iterator[Monitor]:
    monitor = Monitor(io, tmp_path / "qmp", name="dev-vm")
    yield monitor
    monitor.close()


def connected(monitor: Monitor, process: Process, path: Path) -> Peer:
    peer = Peer(path)
    thread = threading.Thread(target=peer.come_up)
    thread.start()
    monitor.connect(process, timeout=10)
    thread.join()
    return peer


@pytest.fixture
def peer(monitor: Monitor, process: Process, tmp_path: Path) -> Iterator[Peer]:
    peer = connected(monitor, process, tmp_path / "qmp")
    yield peer
    peer.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


# --- connecting ---


def test_connecting(monitor: Monitor, peer: Peer, tmp_path: Path) -> None:
    assert monitor.connected
    assert monitor.version == (10, 2, 1)
    assert monitor.pid == os.getpid()  # the peer's
    assert not (tmp_path / "qmp").exists()  # nobody else is to connect


def test_a_process_that_ends_before_it_connects(
    io: IoThread, monitor: Monitor, process: Process, pool: ThreadPoolExecutor
) -> None:
    connecting = pool.submit(monitor.connect, process, 30)
    began = time.monotonic()
    process.kill()
    with pytest.raises(MachineGoneError, match="ended before its monitor answered"):
        connecting.result(10)
    assert time.monotonic() - began < 10


def test_a_process_that_never_connects(monitor: Monitor, process: Process) -> None:
    with pytest.raises(QmpError, match=r"did not answer within 0\.1 s"):
        monitor.connect(process, 0.1)


def test_a_peer_that_greets_and_falls_silent(
    monitor: Monitor, process: Process, tmp_path: Path
) -> None:
    # QEMU greets before it has built the machine.
    peer = Peer(tmp_path / "qmp")
    peer.send(GREETING)
    with pytest.raises(QmpError, match=r"did not answer within 0\.2 s"):
        monitor.connect(process, 0.2)
    peer.close()


def test_a_peer_that_greets_and_dies(
    monitor: Monitor, process: Process, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    peer = Peer(tmp_path / "qmp")
    peer.send(GREETING)
    connecting = pool.submit(monitor.connect, process, 30)
    peer.receive()
    peer.close()
    process.kill()
    with pytest.raises(MachineGoneError, match="QEMU ended before its monitor answered"):
        connecting.result(10)


@pytest.mark.parametrize("when", ["before the first command", "while that runs"])
def test_a_peer_that_dies_when_it_has_come_up(
    monitor: Monitor,
    process: Process,
    tmp_path: Path,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    client = monitor._client
    establish = client._establish_session

    async def and_end() -> None:
        await establish()
        while client.runstate == Runstate.RUNNING:  # until the peer's end is seen
            await asyncio.sleep(0.01)

    if when == "before the first command":
        monkeypatch.setattr(client, "_establish_session", and_end)
    peer = Peer(tmp_path / "qmp")
    peer.send(GREETING)
    connecting = pool.submit(monitor.connect, process, 30)
    peer.answer(**{"return": {}})
    if when == "while that runs":
        assert peer.receive()["execute"] == "query-status"
    peer.close()
    with pytest.raises(MachineGoneError, match="QEMU closed its monitor while it started"):
        connecting.result(20)


@pytest.mark.parametrize("text", ["SSH-2.0-OpenSSH\n", "{}\n", '{"QMP": 1}\n'])
def test_a_peer_that_speaks_something_else(
    monitor: Monitor, process: Process, tmp_path: Path, text: str
) -> None:
    peer = Peer(tmp_path / "qmp")
    peer.write(text)
    with pytest.raises(QmpError, match="does not speak QMP"):
        monitor.connect(process, 10)
    peer.close()


# --- commands ---


def test_a_command(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor) -> None:
    result = pool.submit(monitor.execute, "device_add", {"driver": "x"})
    request = peer.answer(**{"return": {"a": [1]}})
    assert (request["execute"], request["arguments"]) == ("device_add", {"driver": "x"})
    assert result.result(10) == {"a": [1]}


def test_an_error(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor) -> None:
    result = pool.submit(monitor.execute, "foo")
    peer.answer(error={"class": "CommandNotFound", "desc": "The command foo has not been found"})
    with pytest.raises(QmpError, match="dev-vm: the QMP command 'foo' failed") as caught:
        result.result(10)
    assert caught.value.error_class == "CommandNotFound"
    assert caught.value.description == "The command foo has not been found"


def test_no_answer_in_time_and_one_that_comes_late(
    monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor
) -> None:
    with pytest.raises(QmpError, match=r"'savevm' within 0\.1 s") as caught:
        monitor.execute("savevm", timeout=0.1)
    assert caught.value.error_class == "Timeout"
    peer.answer(**{"return": "too late"})
    result = pool.submit(monitor.execute, "query-kvm")
    peer.answer(**{"return": "in time"})
    assert result.result(10) == "in time"


def test_several_threads(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor) -> None:
    results = {n: pool.submit(monitor.execute, "echo", {"n": n}) for n in range(4)}
    requests = [peer.receive() for _ in results]
    for request in reversed(requests):
        peer.send({"return": request["arguments"]["n"], "id": request["id"]})
    assert {n: result.result(10) for n, result in results.items()} == {n: n for n in range(4)}


def test_the_end_of_qemu_ends_calls_under_way(
    monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor
) -> None:
    monitor.describe_end = lambda: "It fell down the stairs."
    calls = [pool.submit(monitor.execute, "savevm", timeout=60) for _ in range(2)]
    waiting = pool.submit(monitor.wait_event, "SHUTDOWN", timeout=60)
    for _ in calls:
        peer.receive()
    began = time.monotonic()
    peer.close()
    for call in (*calls, waiting):
        with pytest.raises(MachineGoneError, match=r"not running\. It fell down the stairs"):
            call.result(10)
    assert time.monotonic() - began < 10
    assert not monitor.connected
    with pytest.raises(MachineGoneError, match="'query-status'"):
        monitor.execute("query-status")


def test_nonsense_ends_the_connection_not_the_test_run(
    monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor
) -> None:
    call = pool.submit(monitor.execute, "query-status", timeout=60)
    peer.receive()
    peer.write("}{ this is no JSON\n")
    with pytest.raises(MachineGoneError):
        call.result(10)


def test_close_ends_calls_under_way(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor) -> None:
    call = pool.submit(monitor.execute, "savevm", timeout=60)
    peer.receive()
    monitor.close()
    monitor.close()
    with pytest.raises(MachineGoneError, match="ended by the tests"):
        call.result(10)
    assert peer.socket.recv(1) == b""  # the peer sees the end


def test_the_end_of_the_io_thread(io: IoThread, monitor: Monitor, peer: Peer) -> None:
    io.close()
    with pytest.raises(MachineGoneError):
        monitor.execute("query-status")
    monitor.close()


@pytest.mark.parametrize(
    "text",
    [
        "unknown command: 'foo'\r\n",
        "Error: Snapshot 'x' does not exist in one or more devices\r\n",
        "unrecognized netdev id 'nope'\r\n",
        "could not set up host forwarding rule 'tcp:127.0.0.1:22-:22'\r\n",
        "invalid host forwarding rule 'x'\r\n",
        "host forwarding rule for tcp:127.0.0.1:7 not found\r\n",
        "Device 'hh' not found\r\n",
        'unexpected end of expression\r\nTry "help print" for more information\r\n',
    ],
)
def test_hmp_errors_come_as_text(
    monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor, text: str
) -> None:
    result = pool.submit(monitor.hmp, "some line")
    assert peer.answer(**{"return": text})["arguments"] == {"command-line": "some line"}
    with pytest.raises(QmpError, match="monitor command 'some line' failed") as caught:
        result.result(10)
    assert caught.value.description == text.strip().replace("\r\n", "\n")


@pytest.mark.parametrize(
    "text", ["", "VM status: running\r\n", "drive1 (#block1): x\r\n    Attached to: error\r\n"]
)
def test_hmp_text(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor, text: str) -> None:
    result = pool.submit(monitor.hmp, "info x")
    peer.answer(**{"return": text})
    assert result.result(10) == text.replace("\r\n", "\n")


# --- events ---


def synchronise(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor) -> None:
    """Return when the monitor has read everything that the peer has sent."""
    result = pool.submit(monitor.execute, "query-name")
    peer.answer(**{"return": {}})
    result.result(10)


def test_events_are_kept_in_order(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor) -> None:
    seen: list[str] = []
    remove = monitor.on_event(lambda event: seen.append(event.name))
    monitor.on_event(lambda event: seen.append(event.data.get("reason", "-")))
    peer.event("RESET", guest=True)
    peer.event("SHUTDOWN", reason="guest-shutdown")
    synchronise(monitor, peer, pool)
    remove()
    peer.event("STOP")
    synchronise(monitor, peer, pool)
    assert seen == ["RESET", "-", "SHUTDOWN", "guest-shutdown", "-"]
    assert [event.name for event in monitor.events()] == ["RESET", "SHUTDOWN", "STOP"]
    (shutdown,) = monitor.events("SHUTDOWN")
    assert (shutdown.sequence, shutdown.timestamp) == (2, 1700000000.5)
    assert [event.name for event in monitor.events(since=2)] == ["STOP"]


def test_a_callback_that_fails_is_logged_and_harms_nobody(
    io: IoThread,
    monitor: Monitor,
    peer: Peer,
    pool: ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor.on_event(lambda _event: 1 / 0)
    peer.event("RESET")
    synchronise(monitor, peer, pool)
    assert "a callback for the QMP event RESET failed" in caplog.text
    caplog.clear()


def test_waiting_for_an_event(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor) -> None:
    peer.event("RESET")
    synchronise(monitor, peer, pool)
    mark = monitor.mark()
    with pytest.raises(QmpError, match=r"no RESET event within 0\.1 s; no event came"):
        monitor.wait_event("RESET", timeout=0.1)
    peer.event("STOP")
    peer.event("RESUME")
    found = pool.submit(monitor.wait_event, {"RESUME", "RESET"}, timeout=10, since=mark)
    assert found.result(10).name == "RESUME"
    with pytest.raises(QmpError, match=r"came instead: STOP, RESUME"):
        monitor.wait_event("RESET", timeout=0, since=mark)
    assert monitor.wait_event("RESET", timeout=0, since=0).sequence == 1


def test_an_event_before_the_end_is_found_after_it(
    monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor
) -> None:
    mark = monitor.mark()
    peer.event("SHUTDOWN", reason="guest-shutdown")
    peer.close()
    assert monitor.wait_event("SHUTDOWN", timeout=10, since=mark).name == "SHUTDOWN"
    with pytest.raises(MachineGoneError, match="waiting for RESET"):
        monitor.wait_event("RESET", timeout=10, since=mark)


def test_the_history_is_bounded(monitor: Monitor, peer: Peer, pool: ThreadPoolExecutor) -> None:
    for number in range(5000):
        peer.event("RTC_CHANGE", offset=number)
    synchronise(monitor, peer, pool)
    events = monitor.events()
    assert 1000 <= len(events) < 5000
    assert events[-1].data == {"offset": 4999}
    assert monitor.mark() == 5000
    assert monitor._client.events.empty()  # the library keeps none


def test_two_hundred_monitors_leave_nothing(io: IoThread, process: Process, tmp_path: Path) -> None:
    def count() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    before = count()
    for number in range(200):
        monitor = Monitor(io, tmp_path / "q")
        peer = connected(monitor, process, tmp_path / "q")
        if number % 2:
            peer.close()
        monitor.close()
        peer.close()
    assert count() == before
    assert not (tmp_path / "q").exists()
