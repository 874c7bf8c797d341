"""The checks as a user meets them: no test file, ids, options of pytest, ini file, conftest.py."""

from __future__ import annotations

import pytest
from _flake import needs_nix
from _project import Project, host, said

from pytest_nixvm.checks import BUILT_IN

pytestmark = needs_nix

LOOKS = [check.name for check in BUILT_IN if not check.change]
CHANGES = [check.name for check in BUILT_IN if check.change]

OWN = """
from pytest_nixvm import Check

def right(checked):
    "Right."

def wrong(checked):
    "Wrong."
    assert checked.name == "somebody else"

def pytest_nixvm_checks(machine):
    return [Check(f.__name__, f, shared=False) for f in (right, wrong)]
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    """Make a directory without a test, and a flake of two machines."""
    made = Project(pytester)
    made.commit(host("web"), host("db"))
    return made


# --- collection ----------------------------------------------------------------------------------


def test_a_flake_is_all_it_takes(project: Project):
    (project.directory / "pytest.ini").unlink()
    done = project.run("--collect-only", "--nixvm-check")
    text = said(done)

    assert done.ret == 0
    assert f"collected {2 * len(LOOKS)} items" in text
    assert text.count("<CheckItem ") == 2 * len(LOOKS)
    assert "<MachineChecks db>" in text
    assert project.built() == []


def test_with_a_deployed_generation_the_change_is_checked_too(project: Project):
    ids = project.collected("--nixvm-check", "--nixvm-machine=db", "--nixvm-from=HEAD")
    assert ids == [f"nixvm::db::{name}" for name in LOOKS + CHANGES]
    assert project.built() == []


def test_what_was_not_selected_is_counted(project: Project):
    def counts(*words: str) -> str:
        done = project.run("--collect-only", "--nixvm-check", *words)
        return next(line for line in said(done).splitlines() if line.startswith("collected "))

    every = 2 * len(LOOKS)
    assert (
        counts("-k", "db and boots")
        == f"collected {every} items / {every - 1} deselected / 1 selected"
    )
    assert (
        counts("-m", "not nixvm_check")
        == f"collected {every} items / {every} deselected / 0 selected"
    )
    assert (
        counts("--deselect", "nixvm::db")
        == f"collected {every} items / {every // 2} deselected / {every // 2} selected"
    )
    # Of a machine that is not selected there are none.
    assert counts("--nixvm-machine=db") == f"collected {every // 2} items"


def test_checks_and_tests_are_collected_side_by_side(project: Project):
    project.write("def test_plain(): pass\ndef test_vm(vm): pass\n")
    ids = project.collected("--nixvm-check", "-k", "plain or db")
    assert ids == ["test_plain", "test_vm[db]", *(f"nixvm::db::{name}" for name in LOOKS)]
    assert project.collected("-m", "nixvm_check", "--nixvm-check", "--nixvm-machine=db") == ids[2:]


def test_ids_are_arguments(project: Project):
    project.write("def test_plain(): pass\n")
    both = project.collected("nixvm::db::boots", "nixvm::web::boots")
    assert sorted(both) == ["nixvm::db::boots", "nixvm::web::boots"]
    assert project.collected("nixvm::db::boots", "test_it.py") == ["test_plain", "nixvm::db::boots"]
    assert project.collected("nixvm::db::boots", "test_it.py::test_plain") == [
        "test_plain",
        "nixvm::db::boots",
    ]
    assert len(project.collected("nixvm")) == 2 * len(LOOKS)
    assert project.collected("nixvm::db", "-k", "boots") == ["nixvm::db::boots"]


def test_a_directory_that_is_called_nixvm_is_a_directory(project: Project):
    (project.directory / "nixvm").mkdir()
    project.write("def test_plain(): pass\n", "nixvm/test_it.py")
    assert project.collected("nixvm") == ["test_plain"]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("nixvm::web::nonsense", "There is no check nixvm::web::nonsense. "),
        ("nixvm::web::bots", "Did you mean nixvm::web::boots?"),
        ("nixvm::wbe", "There are checks of: nixvm::db, nixvm::web."),
        ("nixvm::web::switch", "which --nixvm-from=REF names"),
    ],
)
def test_an_id_that_names_no_check(project: Project, argument: str, says: str):
    message = project.mistake(argument)
    assert says in message
    assert project.built() == []


def test_without_a_flake(project: Project):
    assert "No flake to test" in project.mistake("--nixvm-check", flake=None)
    assert "No flake to test" in project.mistake("nixvm::web::boots", flake=None)


def test_a_revision_that_is_none(project: Project):
    message = project.mistake("--nixvm-check", "--nixvm-from=mian")
    assert message.count("Did you mean main?") == 1


# --- turned off ----------------------------------------------------------------------------------


def test_off_in_the_ini_file(project: Project):
    project.write(OWN, "conftest.py")
    project.ini("nixvm_check_off =", "  web: wrong: it is a toy", "  d*: *: the database: is new")
    done = project.run("nixvm::web::right", "nixvm::web::wrong", "nixvm::db")
    text = said(done)

    assert done.ret == 0
    assert done.parseoutcomes() == {"passed": 1, "skipped": 1 + len(LOOKS) + 2}
    assert "web::wrong is turned off: it is a toy" in text
    assert "db::boots is turned off: the database: is new" in text


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("web: boots", "'web: boots' should be MACHINE: CHECK: REASON"),
        ("web: boots:", "should be MACHINE: CHECK: REASON"),
        ("wbe: boots: no", "no machine of the flake is called 'wbe'. Did you mean 'web'?"),
        ("web: boot: no", "there is no check 'boot'. Did you mean 'boots'?"),
    ],
)
def test_a_bad_entry(project: Project, entry: str, says: str):
    project.ini("nixvm_check_off =", f"  {entry}")
    message = project.mistake("--nixvm-check")
    assert says in message
    assert message.startswith("ERROR: nixvm_check_off: ")


def test_an_entry_for_a_machine_that_is_not_selected_is_none_of_its_business(project: Project):
    project.ini("nixvm_check_off =", "  web: boots: no")
    assert len(project.collected("--nixvm-check", "--nixvm-machine=db")) == len(LOOKS)
    # Nor is one for a check that only a deployed generation brings.
    project.ini("  web: switch: no")
    assert len(project.collected("--nixvm-check", "--nixvm-machine=db")) == len(LOOKS)


def test_off_by_a_marker_of_the_conftest(project: Project):
    project.write(
        OWN
        + """
import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid == "nixvm::web::wrong":
            item.add_marker(pytest.mark.skip(reason="no cellar there"))
        if item.nodeid == "nixvm::db::wrong":
            item.add_marker(pytest.mark.xfail(reason="being mended", strict=True))
""",
        "conftest.py",
    )
    done = project.run("-k", "right or wrong", "--nixvm-check", "-rsx")
    text = said(done)
    assert done.ret == 0
    assert done.parseoutcomes().items() >= {"passed": 2, "skipped": 1, "xfailed": 1}.items()
    assert "no cellar there" in text
    assert "being mended" in text


# --- hooks ---------------------------------------------------------------------------------------


def test_checks_of_the_hook_have_ids_and_verdicts(project: Project):
    project.write(OWN, "conftest.py")
    done = project.run("--nixvm-check", "-k", "right or wrong", "-rf")
    text = said(done)
    assert done.parseoutcomes() == {"passed": 2, "failed": 2, "deselected": 2 * len(LOOKS)}
    assert "FAILED nixvm::db::wrong - " in text


def test_what_failed_is_run_again(project: Project):
    project.write(OWN, "conftest.py")
    again = ("-p", "cacheprovider", "--nixvm-check", "--nixvm-machine=db")
    project.run(*again, "-k", "right or wrong")
    assert project.collected(*again, "--lf") == ["nixvm::db::wrong"]


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("[print]", "returned [<built-in function print>]; it should return a list of"),
        ("Check('mine', print)", "two checks called"),
        ("[Check('mine', print), Check('mine', print)]", "there are two checks called 'mine'"),
        ("[Check('my check', print)]", "'my check' can't be a check's name"),
        ("7", "returned 7"),
    ],
)
def test_what_is_no_check(project: Project, returned: str, says: str):
    project.write(
        "from pytest_nixvm.checks import Check\n"
        f"def pytest_nixvm_checks(machine): return {returned}\n",
        "conftest.py",
    )
    if returned.startswith("Check("):  # one, without a list: it is clear what is meant
        assert "nixvm::web::mine" in project.collected("--nixvm-check")
    else:
        assert says in project.mistake("--nixvm-check")


SECRETS = """
from pytest_nixvm import Secret

def pytest_nixvm_secrets(machine):
    return {returned}
"""

SCRIPTS = (
    "{ system.activationScripts = { }; virtualisation.vmVariant.system.activationScripts = { }; }"
)


def test_secrets_of_the_hook_reach_the_build(project: Project):
    project.commit(host("web", "1", SCRIPTS), host("db"))
    secret = 'Secret("wifi", "/run/keys/wifi", owner="root", group="root", mode="0400")'
    project.write(
        SECRETS.format(returned=f"[{secret}] if machine == 'web' else None"), "conftest.py"
    )
    project.write(
        "def test_secrets(nixvm):\n"
        "    web, db = nixvm.build('web'), nixvm.build('db')\n"
        "    assert [(s.name, s.path) for s in web.secrets] == [('wifi', '/run/keys/wifi')]\n"
        "    assert db.secrets == ()\n"
    )
    done = project.run("-k", "secrets")
    assert done.parseoutcomes() == {"passed": 1}, said(done)


@pytest.mark.parametrize("returned", ["['wifi']", "7", "'wifi'"])
def test_what_is_no_secret(project: Project, returned: str):
    project.write(SECRETS.format(returned=returned), "conftest.py")
    project.write("def test_vm(vm): pass\n")
    message = project.mistake("--nixvm-machine=web")
    assert f"pytest_nixvm_secrets('web') returned {returned}; it should return a list" in message


# --- xdist ---------------------------------------------------------------------------------------


def test_workers_collect_the_same(project: Project):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    project.write(OWN, "conftest.py")
    done = project.run("--nixvm-check", "-k", "right or wrong", "-n", "2", apart=True)
    assert done.parseoutcomes() == {"passed": 2, "failed": 2}, said(done)
    done = project.run("nixvm::web::right", "-n", "2", apart=True)
    assert done.parseoutcomes() == {"passed": 1}, said(done)
    project.ini("nixvm_check_off =", "  web: wrong: it is a toy")
    done = project.run("nixvm::web::wrong", "-n", "2", apart=True)
    assert done.parseoutcomes() == {"skipped": 1}, said(done)


def test_workers_mistakes_are_told_once(project: Project):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    assert "There is no check" in project.mistake("nixvm::web::nonsense", "-n", "2", apart=True)
    project.ini("nixvm_check_off =", "  web: boots")
    assert "should be MACHINE" in project.mistake("--nixvm-check", "-n", "2", apart=True)


def test_a_machine_that_can_t_be_built_does_not_stop_the_others_with_workers(project: Project):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    project.write(OWN, "conftest.py")
    project.commit(host("web"), host("db", "1", '{ test.build = "echo out of flour; exit 3"; }'))
    done = project.run("nixvm::web::right", "nixvm::db::right", "-n", "2", apart=True)
    assert done.parseoutcomes() == {"passed": 1, "errors": 1}, said(done)
    assert "out of flour" in said(done)
