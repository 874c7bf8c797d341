"""The guest agent: QEMU's own where it does this machine no harm, a scripted one for the rest."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from _guest import FakeAgent, io_thread, real_agent, short_directory, until

from pytest_nixvm.errors import (
    AgentError,
    CommandError,
    CommandFailedError,
    CommandTimeoutError,
    MachineGoneError,
)
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.qemu.loop import IoThread


@pytest.fixture(scope="module")
def io() -> Iterator[IoThread]:
    with io_thread() as io:
        yield io


@pytest.fixture(scope="module")
def agent(io: IoThread) -> Iterator[Agent]:
    with short_directory() as directory, real_agent(directory) as socket:
        agent = Agent(io, socket)
        agent.wait_ready(5)
        yield agent
        agent.close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAgent]:
    with short_directory() as directory:
        fake = FakeAgent(directory / "agent", guest_ping={})
        yield fake
        fake.close()


# --- the real one ---------------------------------------------------------------------------------


def test_it_says_what_it_is(agent: Agent) -> None:
    agent.ping()
    info = agent.info()
    assert info.version[0].isdigit()
    assert "guest-exec" in info.commands
    assert agent.hostname() == os.uname().nodename
    assert agent.os_info()["kernel-release"] == os.uname().release
    assert "lo" in {each["name"] for each in agent.network_interfaces()}
    assert isinstance(agent.users(), list)
    assert abs(agent.time() - time.time()) < 10


def test_a_command_keeps_streams_status_and_bytes(agent: Agent) -> None:
    data = bytes(range(256)) * 4000
    result = agent.exec(["sh", "-c", "cat; echo err >&2; exit 7"], stdin=data)
    assert (result.stdout_bytes, result.stderr, result.returncode) == (data, "err\n", 7)
    assert result.channel == "agent"
    assert agent.exec(["cat"], stdin="ä").stdout == "ä"
    assert agent.exec(["cat"]).stdout == ""


def test_an_argv_reaches_the_program_as_it_is(agent: Agent) -> None:
    words = ["a b", "$HOME", "'", '"', "*", "", "new\nline", "\\", "ä"]
    assert agent.exec(["printf", "%s\\0", *words]).stdout.split("\0")[:-1] == words


def test_programs_are_found_although_the_agent_has_no_path(agent: Agent) -> None:
    # real_agent runs it with PATH=/nowhere, as a service of NixOS has next to nothing.
    assert agent.exec(["printenv", "PATH"]).stdout.startswith("/run/wrappers/bin:")
    assert agent.exec(["printenv", "PATH"], env={"PATH": "/usr/bin"}).stdout == "/usr/bin\n"
    assert agent.exec(["printenv", "A"], env={"A": "1 2"}).stdout == "1 2\n"


def test_a_string_is_run_by_a_shell(agent: Agent) -> None:
    result = agent.exec("x=$(echo a b | wc -w); echo $x $#; false | true; exit 4")
    assert (result.stdout, result.returncode) == ("2 0\n", 4)
    assert agent.exec("set -euo pipefail\nfalse | true\necho not reached").returncode == 1
    broken = agent.exec("echo 'open")
    assert broken.returncode != 0
    assert broken.stderr


def test_what_can_not_be_started_reads_as_in_a_shell(agent: Agent, tmp_path: Path) -> None:
    for argv in (["no-such-program"], ["/no/such/program"]):
        result = agent.exec(argv)
        assert result.returncode == 127
        assert "no" in result.stderr
    file = tmp_path / "file"
    file.write_text("")
    assert agent.exec([str(file)]).returncode == 126


def test_a_signal_is_128_and_its_number(agent: Agent) -> None:
    assert agent.exec("kill -TERM $$").returncode == 143


def test_check(agent: Agent) -> None:
    with pytest.raises(CommandFailedError, match="exit status 3") as caught:
        agent.exec("echo why; exit 3", check=True)
    assert caught.value.stdout == "why\n"


@pytest.mark.parametrize(
    "command",
    ["echo begun; sleep 4712.1", "echo begun; (setsid sleep 4712.1 &); while :; do :; done"],
)
def test_what_takes_too_long_is_killed_with_its_children(agent: Agent, command: str) -> None:
    with pytest.raises(CommandTimeoutError, match=r"within 2 s\. It was killed") as caught:
        agent.exec(command, timeout=2)
    assert caught.value.stdout == "begun\n"
    assert subprocess.run(["pgrep", "-f", "sleep 4712.1"], check=False).returncode == 1


def test_output_that_the_agent_drops_is_not_lost_silently(agent: Agent) -> None:
    with pytest.raises(CommandError, match="more than the guest agent keeps"):
        agent.exec(["head", "-c", str(17 * 1024 * 1024), "/dev/zero"])


def test_too_much_stdin_is_refused_before_it_is_sent(agent: Agent) -> None:
    with pytest.raises(ValueError, match="guest agent takes"):
        agent.exec(["cat"], stdin=b"x" * (16 * 1024 * 1024 + 1))


def test_a_command_in_the_background(agent: Agent, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    started = agent.start(["sh", "-c", f"cat {gate}; exit 5"])
    assert started.poll() is None
    gate.write_text("through")
    result = started.wait(5)
    assert (result.stdout, result.returncode) == ("through", 5)
    assert started.poll() == result  # asking again is allowed
    endless = agent.start(["sleep", "4712.2"])
    endless.kill()
    assert endless.wait(5).returncode == 137


def test_files(agent: Agent, tmp_path: Path) -> None:
    data = os.urandom(3 * 1024 * 1024 + 7)
    path = tmp_path / "a file"
    agent.write_file(str(path), data, 0o640)
    assert path.stat().st_mode & 0o777 == 0o640
    assert agent.read_file(str(path)) == path.read_bytes() == data
    agent.write_file(str(path), b"")
    assert agent.read_file(str(path)) == b""
    assert agent.exists(str(path))
    assert not agent.exists(str(tmp_path / "none"))
    with pytest.raises(AgentError, match="No such file") as caught:
        agent.read_file(str(tmp_path / "none"))
    assert caught.value.error_class == "GenericError"
    assert agent.read_file("/proc/sys/kernel/random/boot_id")[-1:] == b"\n"


def test_threads_do_not_wait_for_each_other(agent: Agent, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    results: list[str] = []
    first = threading.Thread(target=lambda: results.append(agent.exec(["cat", str(gate)]).stdout))
    first.start()
    # Ends only if both run at once: each end of the pipe waits for the other.
    agent.exec(["sh", "-c", f"echo through > {gate}"], timeout=20, check=True)
    first.join(10)
    assert results == ["through\n"]


def test_raw_commands_and_their_errors(agent: Agent) -> None:
    assert agent.execute("guest-get-timezone")["offset"] is not None
    with pytest.raises(AgentError, match="guest-nonsense") as caught:
        agent.execute("guest-nonsense")
    assert caught.value.error_class == "CommandNotFound"


# --- the scripted one -----------------------------------------------------------------------------


def test_ready_waits_for_an_agent_that_answers_late(io: IoThread, fake: FakeAgent) -> None:
    """Before the guest has booted QEMU accepts, and what is sent waits."""
    fake.answers["guest-sync"] = lambda request: None
    agent = Agent(io, fake.path)
    done = threading.Event()

    def wait() -> None:
        agent.wait_ready(10)
        done.set()

    threading.Thread(target=wait).start()
    until(lambda: fake.requests, "the request")
    assert not done.is_set()
    # Noise of an older connection, half a line included, and then the answer.
    request = fake.requests[0]
    number = request["arguments"]["id"]
    fake.say(b'n"}\n{"return": 5, "id": "old"}\n')
    fake.say(f'{{"return": {number}, "id": "{request["id"]}"}}\n'.encode())
    assert done.wait(5)


def test_ready_asks_again_when_a_reboot_has_swallowed_the_question(
    io: IoThread, fake: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_nixvm.guest.agent.ASK_AGAIN", 0.1)

    def answer(request: dict[str, object]) -> object:
        return None if len(fake.requests) == 1 else request["arguments"]["id"]  # type: ignore[index]

    fake.answers["guest-sync"] = answer
    Agent(io, fake.path).wait_ready(10)
    assert len(fake.requests) == 2


def test_ready_is_bounded_and_can_be_given_up(io: IoThread, fake: FakeAgent) -> None:
    fake.answers["guest-sync"] = lambda request: None
    agent = Agent(io, fake.path)
    with pytest.raises(AgentError, match=r"Waited 0\.1 s for the guest agent to answer"):
        agent.wait_ready(0.1)
    seen = len(fake.requests)

    def give_up() -> None:
        until(lambda: len(fake.requests) > seen, "the wait")
        agent.cancel()

    cancel = threading.Thread(target=give_up)
    cancel.start()
    with pytest.raises(AgentError, match="given up"):
        agent.wait_ready(30)
    cancel.join()


def test_a_late_answer_is_nobodys(io: IoThread, fake: FakeAgent) -> None:
    fake.answers["guest-get-time"] = None
    agent = Agent(io, fake.path)
    with pytest.raises(AgentError, match=r"did not answer guest-get-time within 0\.1 s") as caught:
        agent.execute("guest-get-time", timeout=0.1)
    assert caught.value.error_class == "Timeout"
    fake.say(f'{{"return": 1, "id": "{fake.requests[-1]["id"]}"}}\n'.encode())
    fake.answers["guest-get-time"] = 2
    assert agent.execute("guest-get-time") == 2


def test_an_answer_in_pieces(io: IoThread, fake: FakeAgent) -> None:
    fake.answers["guest-ping"] = None
    agent = Agent(io, fake.path)
    result: list[object] = []
    asking = threading.Thread(target=lambda: result.append(agent.execute("guest-ping")))
    asking.start()
    until(lambda: fake.requests, "the request")
    for byte in f'{{"return": {{"a": "b"}}, "id": "{fake.requests[0]["id"]}"}}\n'.encode():
        fake.say(bytes([byte]))
    asking.join(5)
    assert result == [{"a": "b"}]


def test_the_end_of_qemu_ends_calls_at_once(io: IoThread, fake: FakeAgent) -> None:
    fake.answers["guest-ping"] = None
    agent = Agent(io, fake.path)

    def end() -> None:
        until(lambda: fake.requests, "the request")
        fake.hang_up()

    hang_up = threading.Thread(target=end)
    hang_up.start()
    start = time.monotonic()
    with pytest.raises(MachineGoneError, match="QEMU has ended"):
        agent.ping(timeout=60)
    assert time.monotonic() - start < 30
    hang_up.join()
    with pytest.raises(MachineGoneError):
        agent.ping(timeout=30)


def test_no_socket(io: IoThread, tmp_path: Path) -> None:
    with pytest.raises(MachineGoneError, match="No such file"):
        Agent(io, tmp_path / "none").connect()


def test_shutdown(io: IoThread, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = {"pid": 5}
    fake.answers["guest-exec-status"] = {"exited": True, "exitcode": 0}
    agent = Agent(io, fake.path)
    agent.shutdown()
    assert fake.requests[0]["arguments"]["arg"][-3:] == ["systemctl", "--no-block", "poweroff"]
    fake.answers["guest-exec-status"] = {"exited": True, "exitcode": 1, "err-data": "bm8="}
    with pytest.raises(AgentError, match="systemctl reboot failed: no"):
        agent.shutdown("reboot")
    fake.answers["guest-exec-status"] = lambda _: fake.hang_up()  # gone before it could tell
    agent.shutdown("halt")


def test_shutdown_where_there_is_no_systemctl(io: IoThread, fake: FakeAgent) -> None:
    fake.answers["guest-exec"] = {"pid": 5}
    fake.answers["guest-exec-status"] = {"exited": True, "exitcode": 127}
    Agent(io, fake.path).shutdown("reboot")
    until(lambda: len(fake.requests) == 3, "the request")  # which is not answered
    assert fake.requests[2]["execute"] == "guest-shutdown"
    assert fake.requests[2]["arguments"] == {"mode": "reboot"}


def test_an_ssh_key_is_added(io: IoThread, fake: FakeAgent) -> None:
    fake.answers["guest-ssh-add-authorized-keys"] = {}
    Agent(io, fake.path).add_ssh_key("alice", "ssh-ed25519 AAAA x")
    assert fake.requests[0]["arguments"] == {"username": "alice", "keys": ["ssh-ed25519 AAAA x"]}


class Clock:
    """A guest's clock for a FakeAgent: `works` is whether set-time does what it says."""

    def __init__(self, fake: FakeAgent, *, works: bool, answer: object, date: bool) -> None:
        self.offset = -1000.0
        self.works, self.answer, self.date = works, answer, date
        self.programs: list[list[str]] = []
        fake.answers.update(
            {
                "guest-get-time": lambda _: int((time.time() + self.offset) * 1e9),
                "guest-set-time": self._set,
                "guest-exec": self._exec,
                "guest-exec-status": {"exited": True, "exitcode": 0 if date else 1},
            }
        )

    def _set(self, request: dict[str, dict[str, int]]) -> object:
        if self.works:
            self.offset = request["arguments"]["time"] / 1e9 - time.time()
        return self.answer

    def _exec(self, request: dict[str, dict[str, list[str]]]) -> object:
        self.programs.append(request["arguments"]["arg"])
        if self.date:
            self.offset = float(request["arguments"]["arg"][-1].lstrip("@")) - time.time()
        return {"pid": 1}


def test_setting_the_clock(io: IoThread, fake: FakeAgent) -> None:
    clock = Clock(fake, works=True, answer={}, date=False)
    Agent(io, fake.path).set_time()
    assert abs(clock.offset) < 10
    Agent(io, fake.path).set_time(1_000_000_000)
    assert abs(clock.offset + time.time() - 1_000_000_000) < 10
    assert clock.programs == []


def test_setting_the_clock_without_hwclock(io: IoThread, fake: FakeAgent) -> None:
    """Newer agents set the clock and report an error all the same."""
    clock = Clock(fake, works=True, answer=RuntimeError("hwclock failed"), date=False)
    Agent(io, fake.path).set_time()
    assert clock.programs == []


def test_setting_the_clock_when_the_agent_refuses(io: IoThread, fake: FakeAgent) -> None:
    clock = Clock(fake, works=False, answer=RuntimeError("not currently supported"), date=True)
    Agent(io, fake.path).set_time()
    assert abs(clock.offset) < 10
    assert clock.programs[0][-3:-1] == ["date", "-s"]


def test_a_clock_that_can_not_be_set_is_an_error(io: IoThread, fake: FakeAgent) -> None:
    Clock(fake, works=False, answer=RuntimeError("not currently supported"), date=False)
    with pytest.raises(AgentError, match=r"-1000\.. s off.*not currently supported"):
        Agent(io, fake.path).set_time()
