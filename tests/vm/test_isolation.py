"""What tests share and what they do not, and the templates that are kept between runs.

The tests run in this order, on one cache: what one has left there, the next one finds.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

import pytest
from test_leftovers import Session

from pytest_nixvm.store import Store

FILES = {
    "test_breaks.py": """
        import pytest
        pytestmark = pytest.mark.nixvm("test-vm")

        def test_breaks(vm):
            vm.succeed("systemctl stop sshd && rm -rf /etc /home /root")
            vm.crash()

        @pytest.mark.parametrize("number", range(3))
        def test_is_whole(vm, number):
            vm.succeed("systemctl is-active sshd && test -s /etc/passwd && ! test -e /var/mine")
            vm.succeed("touch /var/mine")
    """,
    "test_by_marker.py": """
        import pytest
        pytestmark = pytest.mark.nixvm("test-vm", isolation="module")

        def test_leaves(vm):
            vm.succeed("echo module > /var/left")

        def test_finds(vm):
            assert vm.succeed("cat /var/left") == "module\\n"

        @pytest.mark.nixvm(isolation="session")
        def test_of_the_session(vm):
            vm.fail("test -e /var/left")
            vm.succeed("echo session > /var/left")
    """,
    "test_by_marker_too.py": """
        import pytest
        pytestmark = pytest.mark.nixvm("test-vm")

        @pytest.mark.nixvm(isolation="session")
        def test_of_the_session(vm):
            assert vm.succeed("cat /var/left") == "session\\n"

        @pytest.mark.nixvm(isolation="module")
        def test_of_another_module(vm):
            vm.fail("test -e /var/left")
    """,
    "test_by_option.py": """
        import pytest
        pytestmark = pytest.mark.nixvm("test-vm")

        def test_leaves(vm):
            vm.succeed("echo option > /var/left")

        def test_finds(vm):
            assert vm.succeed("cat /var/left") == "option\\n"
    """,
    "test_by_option_too.py": """
        import pytest

        @pytest.mark.nixvm("test-vm")
        def test_of_another_module(vm):
            assert vm.succeed("cat /var/left") == "option\\n"
    """,
    "test_prepared.py": """
        import pytest_nixvm

        @pytest_nixvm.template("test-vm")
        def prepared(vm):
            with open("prepared", "a") as file:
                file.write("x")
            vm.succeed("echo prepared > /var/left")

        def test_prepared(prepared):
            assert prepared.succeed("cat /var/left") == "prepared\\n"
    """,
    "test_huge.py": """
        import pytest

        @pytest.mark.nixvm("test-vm", memory=2**26)
        def test_huge(vm):
            pass
    """,
}


class Runs:
    """Makes pytest runs in one directory after the other, all with one cache."""

    def __init__(self, base: Path, arguments: list[str], flake: Path) -> None:
        self.base, self.arguments, self.flake = base, arguments, flake
        self.cache = base / "cache"
        self.store = Store(self.cache / "templates")
        self.prepared = base / "prepared"
        self.sessions: list[Session] = []

    def launch(self, *words: str) -> Session:
        directory = self.base / str(len(self.sessions))
        directory.mkdir()
        session = Session(directory, self.arguments, self.flake)
        session.cache = self.cache
        (directory / "prepared").symlink_to(self.prepared)
        for name, text in FILES.items():
            (directory / name).write_text("\n".join(line[8:] for line in text.splitlines()))
        self.sessions.append(session)
        session.launch(f"--nixvm-cache={self.cache}", *words)
        return session

    def __call__(self, *words: str, status: int = 0) -> str:
        return finish(self.launch(*words), status)

    def complete(self) -> set[str]:
        return {info.key for info in self.store.entries() if info.complete}


def finish(session: Session, status: int = 0) -> str:
    assert session.process.wait(240) == status, session.output()
    return session.output()


@pytest.fixture(scope="module")
def runs(arguments, flake_copy):
    with tempfile.TemporaryDirectory(prefix="iso-") as base:  # tmp_path is too deep for sockets
        runs = Runs(Path(base), arguments, flake_copy("example"))
        yield runs
        for session in runs.sessions:
            session.end()


def test_killed_while_the_template_boots(runs):
    session = runs.launch("test_breaks.py")
    session.wait_until(lambda: any("nixvm-ram" in line for line in session.left()))
    session.process.kill()
    session.process.wait(30)

    session.assert_nothing_left()
    assert runs.complete() == set()


def test_two_runs_at_once_and_two_workers_share_one_boot(runs):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    workers = runs.launch("-n", "2", "test_breaks.py")
    alone = runs.launch("test_by_marker.py", "test_by_marker_too.py")
    outputs = [finish(workers), finish(alone)]

    assert "4 passed" in outputs[0]
    assert "test-vm: 4 clones" in outputs[0]
    assert "5 passed" in outputs[1]
    assert "test-vm: 3 clones" in outputs[1]  # of two modules, and of the session
    assert "".join(outputs).count("booted in") == 1, outputs
    assert len(runs.complete()) == 1


def test_the_second_run_boots_nothing(runs):
    output = runs("test_breaks.py")

    assert "4 passed" in output
    assert "test-vm: 4 clones" in output
    assert "Booting" not in output
    assert "booted in" not in output


@pytest.mark.parametrize("file", ["state", "overlay-0"])
def test_killed_while_freezing(runs, file):
    before = runs.complete()
    session = runs.launch("test_prepared.py")

    def begun():
        return [
            path
            for path in runs.store.directory.glob(f"*/{file}")
            if path.parent.name not in before
        ]

    until = time.monotonic() + 60
    while not begun():
        assert session.process.poll() is None, session.output()
        assert time.monotonic() < until, session.output()
    session.process.kill()
    session.process.wait(30)

    session.assert_nothing_left()
    assert runs.complete() == before


def test_a_damaged_template_is_made_anew(runs):
    before = runs.complete()
    times = len(runs.prepared.read_text())  # each attempt of the tests above
    runs("test_prepared.py")
    assert len(runs.prepared.read_text()) == times + 1
    (key,) = runs.complete() - before

    ram = runs.store.directory / key / "ram"
    ram.chmod(0o600)
    with ram.open("r+b") as file:
        at = os.lseek(file.fileno(), 0, os.SEEK_DATA) + 4321
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), at)

    output = runs("test_prepared.py")
    (told,) = set(re.findall(r"test-vm: its template was damaged \((.*?)\)", output))
    assert "ram" in told
    assert len(runs.prepared.read_text()) == times + 2
    output = runs("test_prepared.py")
    assert "damaged" not in output
    assert len(runs.prepared.read_text()) == times + 2


def test_isolation_by_option(runs):
    session = runs.launch("--nixvm-isolation=session", "test_by_option.py", "test_by_option_too.py")
    module = runs.launch("--nixvm-isolation=module", "test_by_option.py")
    outputs = [finish(session), finish(module)]

    assert "3 passed" in outputs[0]
    assert "2 passed" in outputs[1]
    for output in outputs:
        assert output.count("booted in") == 1
        assert "clone" not in output


def test_too_little_memory(runs):
    output = runs("test_huge.py", status=1)

    assert "There is not enough memory: test-vm needs" in output
    assert "Traceback" not in output
