"""Checks as pytest items, on real nix and tiny flakes: which there are, and what they say."""

from __future__ import annotations

import pytest
from _flake import OPTIONS, machine, needs_nix, write_flake

from pytest_nixvm.check_items import parse_off, take_arguments
from pytest_nixvm.checks import BUILT_IN
from pytest_nixvm.errors import SettingsError

pytestmark = needs_nix

READ_ONLY = [check.name for check in BUILT_IN if not check.change]

OWN = """
import pytest
from pytest_nixvm.checks import Check, DoesNotApply
from pytest_nixvm.errors import CheckFailedError

def right(checked):
    "Right."
    checked.warn("good to know")

def wrong(checked):
    "Wrong."
    assert checked.name == "somebody else"

def told(checked):
    "Told."
    raise CheckFailedError("The cellar is flooded.\\nOption: services.pump.enable")

def absent(checked):
    "Absent."
    raise DoesNotApply("no cellar")

def pytest_nixvm_checks(machine):
    if machine == "web":
        return [Check(f.__name__, f, shared=False) for f in (right, wrong, told, absent)]
    return []
"""


@pytest.fixture
def checks(pytester: pytest.Pytester):
    """Run pytest in a directory without a test, beside a flake of three machines."""
    body = machine("web", "web-host") + machine("db", "db-host")
    body += machine("broken", "broken-host", '{ test.build = "echo no such compiler; exit 1"; }')
    body += 'nixosConfigurations.pi = nixosSystem { modules = [ ]; system = "aarch64-linux"; };'
    write_flake(pytester.path / "flake", body)
    (pytester.path / "conftest.py").write_text(OWN)
    (pytester.path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -ra\n")

    def run(*words: str, apart: bool = False) -> pytest.RunResult:
        command = ["-p", "no:cacheprovider", "--nixvm-cache=cache", "--nixvm-accel=tcg"]
        command.append("--nixvm-flake=flake")
        for name, value in OPTIONS:
            command += ["--nixvm-nix-option", name, value]
        if apart:
            return pytester.runpytest_subprocess(*command, *words, timeout=120)
        return pytester.runpytest_inprocess(*command, *words)

    return run


def collected(done: pytest.RunResult) -> list[str]:
    return [line for line in done.outlines if line.startswith("nixvm::")]


def test_each_machine_has_each_check(checks):
    ids = collected(checks("--collect-only", "-q", "--nixvm-check"))
    assert [each for each in ids if "::db::" in each] == [f"nixvm::db::{n}" for n in READ_ONLY]
    assert "nixvm::web::told" in ids
    assert "nixvm::web::switch" not in ids


def test_what_a_check_looks_at_is_shown_on_request(checks):
    shown = str(checks("--collect-only", "-v", "--nixvm-check", "-k", "db and boots").stdout)
    assert "The machine boots: " in shown


def test_without_the_option_there_are_none(checks):
    assert collected(checks("--collect-only", "-q")) == []


def test_checks_are_selected_as_tests_are(checks):
    def names(*words: str) -> list[str]:
        return collected(checks("--collect-only", "-q", "--nixvm-check", *words))

    assert names("-k", "boots and db") == ["nixvm::db::boots"]
    assert names("--nixvm-machine=db", "-m", "nixvm_check") == [
        f"nixvm::db::{name}" for name in READ_ONLY
    ]
    assert names("-m", "not nixvm_check") == []
    assert "nixvm::db::boots" not in names("--deselect", "nixvm::db::boots")


def test_checks_are_named_on_the_command_line(checks):
    one = checks("--collect-only", "-q", "nixvm::db::boots")
    assert collected(one) == ["nixvm::db::boots"]
    every = collected(checks("--collect-only", "-q", "nixvm::db"))
    assert every == [f"nixvm::db::{name}" for name in READ_ONLY]
    unknown = checks("--collect-only", "-q", "nixvm::db::boot")
    assert unknown.ret == pytest.ExitCode.USAGE_ERROR
    assert "Did you mean nixvm::db::boots?" in str(unknown.stdout) + str(unknown.stderr)


def test_arguments_that_name_checks_are_told_from_paths():
    words = ["tests", "nixvm::db::boots", "tests/test_a.py::nixvm"]
    assert take_arguments(words) == (["tests", "tests/test_a.py::nixvm"], ["nixvm::db::boots"])


def test_verdicts_read_well(checks):
    done = checks(*(f"nixvm::web::{name}" for name in ("right", "wrong", "told", "absent")))
    text = str(done.stdout)

    assert done.parseoutcomes() == {"passed": 1, "failed": 2, "skipped": 1, "warnings": 1}
    assert "good to know" in text
    assert "no cellar" in text
    assert "The cellar is flooded.\nOption: services.pump.enable\n" in text
    assert "nixvm_check_off = web: told: WHY" in text
    assert "FAILED nixvm::web::told" in text
    assert "somebody else" in text
    assert "another exception" not in text
    assert "check_items.py" not in text  # nothing of what has called it


def test_a_machine_that_can_t_be_built_says_so_once_and_others_go_on(checks):
    done = checks("nixvm::broken", "nixvm::web::right")
    text = str(done.stdout)

    outcomes = done.parseoutcomes()
    assert outcomes["passed"] == 1
    assert outcomes["errors"] == 1
    assert outcomes["skipped"] == len(READ_ONLY) - 1
    assert text.count("no such compiler") <= 2  # the message, and the tail of its log
    assert "Traceback" not in text


def test_a_machine_for_another_architecture_is_skipped(checks):
    done = checks("nixvm::pi::boots")
    assert done.parseoutcomes() == {"skipped": 1}
    assert "it is for aarch64-linux" in str(done.stdout)


def test_a_check_is_turned_off_with_its_reason(checks):
    done = checks("nixvm::web::told", "--nixvm-check-off", "w*: told: the cellar is a pool")
    assert done.parseoutcomes() == {"skipped": 1}
    assert "the cellar is a pool" in str(done.stdout)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("web: boots", "should be MACHINE: CHECK: REASON"),
        ("web: boot: no", "Did you mean 'boots'?"),
        ("wbe: boots: no", "Did you mean 'web'?"),
    ],
)
def test_what_is_turned_off_must_exist(entry, says):
    with pytest.raises(SettingsError) as error:
        parse_off([entry], ["web", "db"], [])
    assert says in str(error.value)


def test_all_checks_of_a_machine_are_turned_off_with_a_star():
    assert parse_off(["d*: *: a toy"], ["web", "db"], [])[0].check == "*"


def test_mistakes_in_the_hook_are_said(checks, pytester):
    (pytester.path / "conftest.py").write_text(
        "from pytest_nixvm.checks import Check\n"
        "def pytest_nixvm_checks(machine): return [Check('boots', print)]\n"
    )
    done = checks("--nixvm-check", "--collect-only")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "two checks called 'boots'" in str(done.stdout) + str(done.stderr)


def test_junit_names_machine_and_check(checks, pytester):
    checks("nixvm::web::right", "--junit-xml=it.xml")
    assert 'classname="nixvm.web" name="right"' in (pytester.path / "it.xml").read_text()


def test_xdist_runs_them(checks):
    pytest.importorskip("xdist")
    done = checks("nixvm::web::right", "nixvm::web::told", "-n", "1", apart=True)
    assert done.parseoutcomes()["passed"] == 1
    assert "The cellar is flooded." in str(done.stdout)
