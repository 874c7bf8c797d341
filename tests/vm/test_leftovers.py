"""Whatever ends pytest, nothing is left: no process, no socket, no disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WITHIN = 20.0  # seconds; a fraction of one where nothing else runs

TEST_FILE = """
import os, pathlib, time
import pytest

pytestmark = pytest.mark.nixvm("test-vm")

def note(vm):
    pathlib.Path("ready.tmp").write_text(f"{os.getpid()} {vm.qmp.pid}")
    pathlib.Path("ready.tmp").rename("ready")

def test_passes(vm):
    note(vm)

def test_fails(vm):
    note(vm)
    assert False

def test_stays(vm, ssh, serial):
    note(vm)
    time.sleep(600)
"""


class Session:
    """A pytest in a process of its own, in an empty directory; with a cache of these tests'."""

    def __init__(
        self, directory: Path, arguments: list[str], flake: Path, cache: Path | None = None
    ) -> None:
        self.directory = directory
        self.temporary = directory / "tmp"
        self.runtime = directory / "run"
        self.cache = cache or directory / "cache"
        for place in (self.temporary, self.runtime):
            place.mkdir(mode=0o700)
        (directory / "test_it.py").write_text(TEST_FILE)
        (directory / "pytest.ini").write_text("[pytest]\n")
        self.command = [
            sys.executable, "-m", "pytest", f"--nixvm-flake={flake}", f"--nixvm-cache={self.cache}",
            "--nixvm-memory=512", *arguments,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start pytest."""
        environment = {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "XDG_RUNTIME_DIR": str(self.runtime),
        }
        with (self.directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command, *arguments],
                cwd=self.directory,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.process

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what pytest does, as long as it runs, two minutes at most."""
        until = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < until, self.output()
            time.sleep(0.02)

    def start(self, *arguments: str) -> tuple[int, int]:
        """Start pytest; return the pids of the process that has the VM, and of QEMU, when ready."""
        self.launch(*arguments)
        ready = self.directory / "ready"
        self.wait_until(ready.exists)
        tester, qemu = ready.read_text().split()
        return int(tester), int(qemu)

    def output(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def left(self) -> list[str]:
        """What there still is of the session."""
        left = [
            f"{directory}/{name}"
            for place in (self.temporary, self.runtime, self.cache / "scratch")
            for directory, below, files in os.walk(place)  # what vanishes meanwhile is no error
            for name in (*below, *files)
            # pytest's own temporary directories are pytest's
            if "pytest-of-" not in f"{directory}/{name}"
        ]
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.directory) in line:
                left.append(line)
        return left

    def assert_nothing_left(self) -> None:
        until = time.monotonic() + WITHIN
        while left := self.left():
            assert time.monotonic() < until, f"left behind: {left}\n{self.output()}"
            time.sleep(0.05)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def flake(flake_copy: Callable[[str], Path]) -> Path:
    return flake_copy("example")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def session(arguments: list[str], flake: Path, cache: Path) -> Iterator[Session]:
    # tmp_path is too deep for sockets
    with tempfile.TemporaryDirectory(prefix="left-") as directory:
        session = Session(Path(directory), arguments, flake, cache)
        yield session
        session.end()


@pytest.mark.parametrize("which", ["passes", "fails"])
def test_a_normal_end(session, which):
    session.start("-k", which)
    assert session.process.wait(90) == (0 if which == "passes" else 1), session.output()
    session.assert_nothing_left()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda n: n.name
)
def test_a_signal(session, number):
    session.start("-k", "stays")
    os.kill(session.process.pid, number)
    session.process.wait(90)
    session.assert_nothing_left()


def test_ctrl_c_twice(session):
    """As the terminal sends it: to the whole foreground process group."""
    session.start("-k", "stays")
    os.killpg(session.process.pid, signal.SIGINT)
    time.sleep(0.05)  # a person's second try, somewhere in the teardown
    os.killpg(session.process.pid, signal.SIGINT)
    session.process.wait(90)
    session.assert_nothing_left()


def test_killed_while_booting(session):
    process = session.launch("-k", "passes", "--nixvm-isolation=module")
    session.wait_until(lambda: any("qemu-system" in line for line in session.left()))
    process.kill()
    process.wait(90)
    session.assert_nothing_left()


def test_pytest_timeout_by_thread(session):
    pytest.importorskip("pytest_timeout", reason="pytest-timeout is not installed")
    options = ["--timeout=3", "--timeout-method=thread", "-o", "timeout_func_only=true"]
    session.start("-k", "stays", *options)
    session.process.wait(90)
    session.assert_nothing_left()


def test_an_xdist_worker_is_killed(session):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    worker, qemu = session.start("-k", "stays", "-n", "1", "--max-worker-restart=0")
    assert worker != session.process.pid
    os.kill(worker, signal.SIGKILL)
    session.process.wait(90)
    assert not Path(f"/proc/{qemu}").exists()
    session.assert_nothing_left()


def test_the_user_s_directory_is_as_it_was(session, flake):
    session.start("-k", "passes")
    session.process.wait(90)
    status = subprocess.run(
        ["git", "-C", flake, "status", "--porcelain", "--ignored"], capture_output=True, text=True
    )
    assert "??" not in status.stdout
    assert "!!" not in status.stdout
    mine = {"test_it.py", "pytest.ini", "ready", "log", "tmp", "run", "cache"}
    pytest_s_own = {".pytest_cache", "__pycache__"}
    assert {path.name for path in session.directory.iterdir()} <= mine | pytest_s_own
