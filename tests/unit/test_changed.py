"""--nixvm-changed: only machines whose system differs from that of a revision."""

from __future__ import annotations

import shutil

import pytest
from _flake import FLAKE, git, needs_nix
from _project import Project, host, said

pytestmark = needs_nix

TESTS = """
import pytest

def test_any(vm): pass

@pytest.mark.nixvm("web")
def test_web(vm): pass

@pytest.mark.nixvm("web", "db")
def test_both(machines): pass

@pytest.mark.nixvm("web", "mail")
def test_neither(machines): pass

def test_plain(): pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    """Make a project whose last commit has changed db, and added cache."""
    made = Project(pytester)
    made.write(TESTS)
    made.commit(host("web"), host("db"), host("mail"))
    made.commit(host("web"), host("db", "2"), host("mail"), host("cache"))
    return made


def test_tests_of_unchanged_machines_are_left_out(project: Project):
    assert sorted(project.collected("--nixvm-changed=HEAD~1")) == [
        "test_any[cache]",
        "test_any[db]",
        "test_both",  # one of its machines has changed
        "test_plain",
    ]


def test_what_was_left_out_is_said(project: Project):
    text = said(project.run("--collect-only", "--nixvm-changed=HEAD~1"))

    assert "nixvm: unchanged since HEAD~1, left out: mail, web" in text
    assert "collected 8 items / 4 deselected / 4 selected" in text
    assert project.built() == []


def test_nothing_is_built_for_a_machine_that_is_unchanged(project: Project):
    # The body of test_any never runs: there is no kernel in these machines to boot.
    done = project.run("--nixvm-changed=HEAD~1", "-k", "any", "--setup-only")
    text = said(done)
    assert "Building db" in text or project.built()
    assert not [name for name in project.built() if "web" in name or "mail" in name]


def test_where_nothing_has_changed_the_run_is_a_success(project: Project):
    project.write("def test_any(vm): pass\n")
    done = project.run("--nixvm-changed=HEAD")

    assert done.ret == 0
    assert "left out: cache, db, mail, web" in said(done)
    assert project.built() == []
    done = project.run("--nixvm-changed=HEAD", "--nixvm-check")
    assert done.ret == 0
    assert "left out: cache, db, mail, web" in said(done)


def test_without_a_test_it_is_pytest_s_own_status(project: Project):
    project.write("")
    assert project.run("--nixvm-changed=HEAD").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_checks_are_collected_for_changed_machines_only(project: Project):
    project.write("")
    ids = project.collected("--nixvm-changed=HEAD~1", "--nixvm-check")
    machines = {each.split("::")[1] for each in ids if each.startswith("nixvm::")}
    assert machines == {"db", "cache"}


def test_a_check_of_an_unchanged_machine_is_left_out_when_it_is_named(project: Project):
    done = project.run("--collect-only", "--nixvm-changed=HEAD~1", "nixvm::web", "nixvm::db::boots")
    text = said(done)
    assert done.ret == 0
    assert "nixvm::web::" not in text
    assert "left out: mail, web" in text
    assert project.run("--nixvm-changed=HEAD~1", "nixvm::web::boots").ret == 0
    assert "Did you mean nixvm::db" in project.mistake("--nixvm-changed=HEAD~1", "nixvm::dv::boots")


def test_a_selection_by_name_comes_first(project: Project):
    words = ("--nixvm-changed=HEAD~1", "--nixvm-machine=[wd]*")
    assert sorted(project.collected(*words)) == ["test_any[db]", "test_both", "test_plain"]
    assert "left out: web\n" in said(project.run("--collect-only", *words))


def test_what_is_not_committed_counts(project: Project):
    project.edit(host("web", "3"), host("db", "2"), host("mail"), host("cache"))
    assert "test_web[web]" in project.collected("--nixvm-changed=HEAD")
    assert "test_any[db]" not in project.collected("--nixvm-changed=HEAD")


def test_a_machine_that_can_t_be_evaluated_is_not_left_out(project: Project):
    broken = host("web", "", '{ test.build = throw "broken"; }')
    project.edit(broken, host("db", "2"), host("mail"))
    assert "test_web[web]" in project.collected("--nixvm-changed=HEAD")


def test_an_unknown_revision(project: Project):
    message = project.mistake("--nixvm-changed=mian")
    assert "has no revision mian. Did you mean main?" in message
    assert message.count("has no revision") == 1


def test_a_revision_that_can_t_be_evaluated(project: Project):
    (project.repository / "flake.nix").write_text(FLAKE.format(body="nixosConfigurations = 1 +;"))
    git(project.repository, "commit", "-q", "-a", "-m", "broken")
    project.edit(host("web"))
    message = project.mistake("--nixvm-changed=HEAD")
    assert "syntax error" in message
    assert "--nixvm-changed=HEAD" in message


def test_without_a_repository(project: Project):
    shutil.rmtree(project.repository / ".git")
    assert "is not in a git repository" in project.mistake("--nixvm-changed=HEAD~1")


def test_with_workers(project: Project):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    project.write("import pytest\ndef test_any(vm): pass\ndef test_plain(): pass\n")
    done = project.run("--nixvm-changed=HEAD", "-n", "2", "-v", apart=True)
    text = said(done)
    assert done.ret == 0
    assert done.parseoutcomes() == {"passed": 1}
    assert "left out: cache, db, mail, web" in text
    assert project.built() == []

    project.write("def test_any(vm): pass\n")
    done = project.run("--nixvm-changed=HEAD", "-n", "2", apart=True)
    assert done.ret == 0, said(done)
    assert "left out: cache, db, mail, web" in said(done)

    assert "Did you mean main?" in project.mistake("--nixvm-changed=mian", "-n", "2", apart=True)
