"""What a whole session records of the systems that it tests: real nix, no VM."""

from __future__ import annotations

import pytest
from _flake import needs_nix
from _project import Project, host, said

from pytest_nixvm.tested import Record
from pytest_nixvm.tested import Tested as Records  # or pytest takes it for a test

pytestmark = needs_nix

# The report says that the machine was used, as it does where one is started.
CONFTEST = """
import pytest

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.nixvm_machines = ["web"] if report.when == "call" else []
    return report
"""

TEST = """
import time
from pathlib import Path
from pytest_nixvm.run import RUN

def test_it(request):
    request.config.stash[RUN].fleet.build("web")
    flake = Path({flake!r})
    flake.write_text(flake.read_text().replace({old!r}, {new!r}))
    time.sleep(1.1)  # a digest may be a second old
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(pytester)
    monkeypatch.setenv("XDG_STATE_HOME", str(project.directory / "state"))
    project.commit(host("web", "version 1"))
    project.write(CONFTEST, "conftest.py")
    return project


def record(project: Project, new: str, *words: str) -> list[Record]:
    project.write(
        TEST.format(flake=str(project.repository / "flake.nix"), old="version 1", new=new)
    )
    done = project.run(*words, apart=True)
    assert done.ret == 0, said(done)
    return Records(project.directory / "state/pytest-nixvm/tested").records()


@pytest.mark.parametrize("words", [(), ("-n", "1")])
def test_system_that_came_after_the_vm_was_not_tested(project: Project, words: tuple[str]) -> None:
    """It is asked for when a test has told what it used: behind the edit."""
    if words:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    assert record(project, "version 2", *words) == []


@pytest.mark.parametrize("words", [(), ("-n", "1")])
def test_system_of_the_vm_is_recorded(project: Project, words: tuple[str]) -> None:
    if words:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    [found] = record(project, "version 1", *words)
    assert (found.machine, found.verdict.passed) == ("web", 1)


FAILS = """
import os
import pytest

@pytest.fixture
def broken():
    {how}

def test_it(broken, vm): pass
"""


@pytest.mark.parametrize(
    ("how", "words"), [("assert False", ()), ("os._exit(3)", ("-n", "1"))], ids=["fails", "crashes"]
)
def test_failure_before_the_vm_is_there_counts(
    project: Project, how: str, words: tuple[str, ...]
) -> None:
    if words:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (project.directory / "conftest.py").unlink()
    project.write(FAILS.format(how=how))
    done = project.run(*words, apart=True)
    assert done.ret == 1, said(done)
    [found] = Records(project.directory / "state/pytest-nixvm/tested").records()
    assert found.verdict.failed == ("test_it.py::test_it[web]",)
