"""A clone's clock and its random numbers: guests whose clocks are off, slow or can't be set."""

from __future__ import annotations

import base64
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _guest import FakeAgent, io_thread, short_directory

from pytest_nixvm.errors import AgentError
from pytest_nixvm.guest import waking
from pytest_nixvm.guest.agent import _SETUP, Agent
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.qemu.loop import IoThread

HOURS = 5 * 3600.0


@pytest.fixture(scope="module")
def io() -> Iterator[IoThread]:
    with io_thread() as io:
        yield io


@pytest.fixture
def fake() -> Iterator[FakeAgent]:
    with short_directory() as directory:
        fake = FakeAgent(directory / "agent", guest_ping={})
        yield fake
        fake.close()


class Guest:
    """A guest with a clock: its agent, and a bash that finds a `date` of our own."""

    def __init__(self, fake: FakeAgent, io: IoThread, directory: Path, *, off: float) -> None:
        self.agent = Agent(io, fake.path)
        self.fake = fake
        self.agent_sets = self.date_sets = True
        self.slow = 0.0  # seconds that the agent takes to read or set the clock, then to answer
        self._off = directory / "off"
        self._off.write_text(str(off))
        self._works = directory / "works"
        self._date = directory / "bin" / "date"
        self._date.parent.mkdir()
        self._date.write_text(f"""#!/bin/sh
now=$(PATH=/run/current-system/sw/bin:/usr/bin:/bin date +%s.%N)
case $1 in
  -s) test -e {self._works} && awk "BEGIN {{ printf \\"%.6f\\", ${{2#@}} - $now }}" >{self._off} ;;
  *) awk "BEGIN {{ printf \\"%.6f\\\\n\\", $now + $(cat {self._off}) }}" ;;
esac
""")
        self._date.chmod(0o755)
        fake.answers.update(
            {
                "guest-get-time": self._get,
                "guest-set-time": self._set,
                "guest-exec": self._exec,
                "guest-exec-status": lambda _: {"exited": True, "exitcode": 0},
            }
        )

    @property
    def off(self) -> float:
        return float(self._off.read_text())

    def _get(self, _: object) -> int:
        time.sleep(self.slow)
        now = time.time() + self.off
        time.sleep(self.slow)
        return int(now * 1e9)

    def _set(self, request: dict[str, dict[str, int]]) -> object:
        time.sleep(self.slow)
        if not self.agent_sets:
            return RuntimeError("not currently supported")
        self._off.write_text(str(request["arguments"]["time"] / 1e9 - time.time()))
        return {}

    def _exec(self, request: dict[str, dict[str, list[str]]]) -> object:
        if self.date_sets:
            self._off.write_text(str(float(request["arguments"]["arg"][-1][1:]) - time.time()))
        return {"pid": 1}

    def shell(self, command: Command) -> CommandResult:
        """What the guest's shell does; EPOCHREALTIME would be this machine's clock."""
        self._works.unlink(missing_ok=True)
        if self.date_sets:
            self._works.touch()
        words = ["bash", "-c", f"unset EPOCHREALTIME; {command}"]
        done = subprocess.run(
            words if isinstance(command, str) else [self._date, *command[1:]],
            env={"PATH": f"{self._date.parent}:{os.environ['PATH']}"},
            capture_output=True,
            check=False,
        )
        return CommandResult(command, done.returncode, done.stdout, done.stderr, 0.0)


@pytest.fixture
def guest(fake: FakeAgent, io: IoThread, tmp_path: Path) -> Guest:
    return Guest(fake, io, tmp_path, off=-HOURS)


# --- the clock ----------------------------------------------------------------------------------


def test_a_clock_that_is_off_by_hours_is_set_with_the_agent(guest: Guest) -> None:
    waking.Clock(guest.agent, None).set()
    assert abs(guest.off) < 10


def test_a_clock_that_is_off_by_hours_is_set_with_the_shell_alone(guest: Guest) -> None:
    clock = waking.Clock(guest.agent, guest.shell)
    clock.set()
    assert abs(guest.off) < 10
    assert guest.fake.requests == []
    clock.set()
    assert abs(guest.off) < 10


def test_a_clock_that_is_ahead_goes_back(guest: Guest, tmp_path: Path) -> None:
    (tmp_path / "off").write_text(str(HOURS))
    waking.Clock(guest.agent, guest.shell).set()
    assert abs(guest.off) < 10


def test_the_agent_sets_what_the_shell_can_not(guest: Guest) -> None:
    guest.date_sets = False
    waking.Clock(guest.agent, guest.shell).set()
    assert abs(guest.off) < 10


def test_what_a_shell_has_set_late_is_not_believed(guest: Guest) -> None:
    """Its answers take so long that nobody knows when within that time it was set, or read."""

    def slow(command: Command) -> CommandResult:
        done = guest.shell(command)
        time.sleep(2 * waking.CLOCK_TOLERANCE)
        return done

    waking.Clock(guest.agent, slow).set()
    assert guest.fake.requests != []
    assert abs(guest.off) < 10


def test_a_shell_that_says_no_time_is_not_believed(guest: Guest) -> None:
    def lies(command: Command) -> CommandResult:
        return CommandResult(command, int(not isinstance(command, str)), b"no\n", b"", 0.0)

    waking.Clock(guest.agent, lies).set()
    assert abs(guest.off) < 10


@pytest.mark.parametrize("shell", [True, False])
def test_a_clock_that_can_not_be_set_is_an_error(guest: Guest, shell: bool) -> None:
    guest.agent_sets = guest.date_sets = False
    clock = waking.Clock(guest.agent, guest.shell if shell else None)
    with pytest.raises(AgentError, match=r"-18000\.\d s off.*not currently supported"):
        clock.set()


def test_half_a_second_that_stays_is_an_error_after_the_timeout(
    guest: Guest, tmp_path: Path
) -> None:
    guest.agent_sets = guest.date_sets = False
    (tmp_path / "off").write_text("0.5")
    with pytest.raises(AgentError, match=r"clock is \+0\.5\d s off, and can't be set better"):
        waking.Clock(guest.agent, guest.shell).set(timeout=0.5)


def test_an_agent_that_answers_slowly_is_good_enough(guest: Guest) -> None:
    guest.slow = 0.05
    waking.Clock(guest.agent, None).set()
    assert abs(guest.off) < 10


# --- random numbers -----------------------------------------------------------------------------


def with_programs(fake: FakeAgent, *names: str) -> list[bytes]:
    """Let the agent run what it is told to in sh, with only these programs; return the inputs."""
    inputs: list[bytes] = []
    directory = fake.path.parent / "bin"
    directory.mkdir()
    for name in names:
        (directory / name).write_text("#!/bin/sh\nexec /bin/cat >/dev/null\n")
        (directory / name).chmod(0o755)
    ended: dict[str, Any] = {}

    def run(request: dict[str, Any]) -> object:
        # Without what a log-in sets: this machine's PATH.
        text = request["arguments"]["arg"][-1].removeprefix(_SETUP)
        inputs.append(base64.b64decode(request["arguments"].get("input-data", "")))
        done = subprocess.run(
            ["/bin/sh", "-c", text.replace("/sys/bus", f"{directory.parent}/bus")],
            input=inputs[-1],
            capture_output=True,
            env={"PATH": str(directory)},
            check=False,
        )
        ended.update(
            {
                "exited": True,
                "exitcode": done.returncode,
                "out-data": base64.b64encode(done.stdout).decode(),
                "err-data": base64.b64encode(done.stderr).decode(),
            }
        )
        return {"pid": 1}

    fake.answers.update(
        {
            "guest-exec": run,
            "guest-exec-status": lambda _: ended,
            "guest-file-open": RuntimeError("No such file"),
        }
    )
    return inputs


@pytest.mark.parametrize(
    ("device", "programs", "found"),
    [
        ("", (), waking.NONE),
        ("", ("python3",), waking.IOCTL),
        ("", ("perl", "python3"), waking.IOCTL),
        ("acpi/drivers/vmgenid/QEMUVGID:00", ("perl",), waking.VMGENID),
        ("platform/drivers/vmgenid/QEMUVGID:00", (), waking.VMGENID),
        ("acpi/drivers/vmgenid", (), waking.NONE),  # the driver, and no device
    ],
)
def test_what_gives_a_clone_its_own_random_numbers(
    io: IoThread, fake: FakeAgent, device: str, programs: tuple[str, ...], found: str
) -> None:
    with_programs(fake, *programs)
    (fake.path.parent / "bus" / device).mkdir(parents=True)
    assert waking.entropy_source(Agent(io, fake.path)) == found


@pytest.mark.parametrize("program", ["perl", "python3"])
def test_each_reseeding_brings_other_bytes(io: IoThread, fake: FakeAgent, program: str) -> None:
    inputs = with_programs(fake, program)
    agent = Agent(io, fake.path)
    waking.reseed(agent)
    waking.reseed(agent)
    assert [len(each) for each in inputs] == [64, 64]
    assert inputs[0] != inputs[1]


def test_a_guest_that_can_not_be_reseeded_is_an_error(io: IoThread, fake: FakeAgent) -> None:
    with_programs(fake)
    with pytest.raises(AgentError, match=r"can't be reseeded: .*not found"):
        waking.reseed(Agent(io, fake.path))
