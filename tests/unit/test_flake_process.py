"""Whatever ends a nix call, nothing of it goes on: client, builders, and what they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from _flake import Workshop, machine, needs_nix, write_flake

from pytest_nixvm.flake import process
from pytest_nixvm.flake.process import ProgramTimeoutError


def running(mark: str) -> list[int]:
    """The processes with `mark` in their command line; we don't count."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if mark.encode() in line:
                found.append(int(entry.name))
    return found


def _line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until(condition: Callable[[], object], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def mark() -> str:
    """A number of seconds that nobody else sleeps."""
    return f"98765.{os.getpid()}{time.monotonic_ns() % 10**6:06}"


SHELL = "/bin/sh"


def test_output_and_status_are_given_back() -> None:
    lines: list[str] = []
    script = "echo out; echo one >&2; printf two >&2; exit 3"
    ended = process.run([SHELL, "-c", script], timeout=10, on_line=lines.append)
    assert (ended.returncode, ended.stdout) == (3, b"out\n")
    assert lines == ["one", "two"]


def test_much_on_both_streams_does_not_block() -> None:
    count = 300_000
    much = f"yes 2>/dev/null | head -c {count}"
    script = f"{much}; {much} >&2; {much}"
    lines: list[str] = []
    ended = process.run([SHELL, "-c", script], timeout=30, on_line=lines.append)
    assert len(ended.stdout) == 2 * count
    assert sum(len(line) + 1 for line in lines) == count


def test_a_process_that_keeps_the_pipes_open_does_not_hold_us(mark: str) -> None:
    began = time.monotonic()
    process.run([SHELL, "-c", f"sleep {mark} & exit 0"], timeout=60)
    assert time.monotonic() - began < 30
    for pid in running(mark):
        os.kill(pid, signal.SIGKILL)


def test_a_program_that_ignores_sigterm_is_killed_with_its_children(mark: str) -> None:
    script = f"trap '' TERM; setsid sleep {mark} & sleep {mark}; sleep {mark}"
    with pytest.raises(ProgramTimeoutError):
        process.run([SHELL, "-c", script], timeout=0.5, stop=signal.SIGTERM)
    assert until(lambda: not running(mark)), running(mark)


def test_a_surrounding_git_command_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/elsewhere/index")
    ended = process.run(["/usr/bin/env"], timeout=10)
    assert b"GIT_DIR=" not in ended.stdout
    assert b"GIT_INDEX_FILE=" not in ended.stdout
    assert b"GIT_TERMINAL_PROMPT=0\n" in ended.stdout


def slow_flake(tmp_path: Path, mark: str) -> Path:
    more = f'{{ test.build = "sleep {mark} & sleep {mark}; exit 1"; }}'
    return write_flake(tmp_path / "config", machine("vm", tmp_path.name, more), tracked=False)


BUILD = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from _flake import Workshop
shop = Workshop(Path({tmp!r}))
shop.flake(shop.tmp / "config").build("vm")
"""


@needs_nix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_builders_end_with_us(tmp_path: Path, mark: str, number: signal.Signals) -> None:
    slow_flake(tmp_path, mark)
    script = BUILD.format(here=str(Path(__file__).parent), tmp=str(tmp_path))
    us = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        assert until(lambda: len(running(f"sleep\0{mark}")) == 2)
        clients = running(str(tmp_path / "cache/roots"))
        assert clients
        us.send_signal(number)
        us.wait(10)
        assert until(lambda: not running(f"sleep\0{mark}"), 3)
        assert until(lambda: not running(str(tmp_path / "cache/roots")), 3)
    finally:
        us.kill()
        us.wait()
        for pid in running(mark):
            os.kill(pid, signal.SIGKILL)


@needs_nix
def test_an_evaluation_ends_with_us(tmp_path: Path) -> None:
    loop = (
        "let numbers = builtins.genList (n: n) 10000; count = depth: if depth == 0 then 0 else "
        "builtins.foldl' (sum: _: sum + count (depth - 1)) 0 numbers; in count 6"
    )
    body = f"nixosConfigurations.vm.config.system.build.vm = {loop};"
    flake = write_flake(tmp_path / "config", body, tracked=False)
    script = BUILD.format(here=str(Path(__file__).parent), tmp=str(tmp_path))
    us = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        assert until(lambda: any(b"plan" in _line(pid) for pid in running(f"path:{flake}")))
        us.kill()
        us.wait(10)
        assert until(lambda: not running(f"path:{flake}"), 3)
    finally:
        us.kill()
        us.wait()
        for pid in running(f"path:{flake}"):
            os.kill(pid, signal.SIGKILL)


@needs_nix
def test_builders_end_when_the_time_is_over(tmp_path: Path, mark: str) -> None:
    from pytest_nixvm.errors import BuildError

    flake = slow_flake(tmp_path, mark)
    with pytest.raises(BuildError, match="did not end within 2 s"):
        Workshop(tmp_path).flake(flake, build_timeout=2).build("vm")
    assert until(lambda: not running(mark), 3)


@needs_nix
def test_a_build_can_be_tried_again_after_it_was_killed(tmp_path: Path, mark: str) -> None:
    from pytest_nixvm.errors import BuildError

    flag = tmp_path / "flag"
    flag.write_text("")
    more = f'{{ test.build = "if test -e {flag}; then sleep {mark}; fi"; }}'
    flake = write_flake(tmp_path / "config", machine("vm", tmp_path.name, more), tracked=False)
    with pytest.raises(BuildError):
        Workshop(tmp_path).flake(flake, build_timeout=1.5).build("vm")
    flag.unlink()
    assert Workshop(tmp_path).flake(flake).build("vm").start_script.exists()
