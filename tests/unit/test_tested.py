"""The record of tested systems, and what a session writes into it."""

import json
import threading

import pytest

from pytest_nixvm.errors import EvaluationError, NotAVirtualMachineError, SettingsError
from pytest_nixvm.tested import Recorder
from pytest_nixvm.tested import Tested as Records  # or pytest takes it for a test

ONE = "/nix/store/" + "1" * 32 + "-nixos-system-dev-vm-25.11"
TWO = "/nix/store/" + "2" * 32 + "-nixos-system-dev-vm-25.11"


@pytest.fixture
def tested(tmp_path):
    return Records(tmp_path / "tested")


def recorder(tested, ask=lambda name: ONE):
    return Recorder("/home/me/config", ask, tested=tested)


def ran(recorder, nodeid, *outcomes, name="dev-vm"):
    recorder.machine_used(nodeid, name)
    for when, outcome in zip(("setup", "call", "teardown"), outcomes, strict=False):
        recorder.outcome(nodeid, when, outcome)


def test_what_was_never_tested_has_no_verdict(tested):
    assert tested.verdict(ONE).kind == "none"
    assert str(tested.verdict(ONE)) == "not tested"


def test_last_outcomes_of_all_sessions_count(tested):
    tested.add(ONE, machine="dev-vm", flake=".", outcomes={"a": "passed", "b": "failed"})
    assert tested.verdict(ONE).failed == ("b",)
    assert "1 of 2 tests failed" in str(tested.verdict(ONE))
    tested.add(ONE, machine="dev-vm", flake=".", outcomes={"b": "passed"})
    verdict = tested.verdict(ONE)
    assert (verdict.kind, verdict.passed) == ("passed", 2)
    assert tested.verdict(TWO).kind == "none"


def test_forcing_is_kept_beside_the_tests_and_is_no_verdict(tested):
    tested.force(ONE, machine="dev-vm", flake=".", to="ssh://root@host", reason="fire")
    assert tested.verdict(ONE).kind == "none"
    tested.add(ONE, machine="dev-vm", flake=".", outcomes={"a": "passed"})
    assert tested.record(ONE).forced[0]["reason"] == "fire"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 2}', '{"format": 1}'])
def test_damaged_record_counts_as_none_and_can_be_written_again(tested, text):
    tested.add(ONE, machine="dev-vm", flake=".", outcomes={"a": "passed"})
    next(tested.directory.glob("*.json")).write_text(text)
    assert tested.verdict(ONE).kind == "none"
    assert tested.records() == []
    tested.add(ONE, machine="dev-vm", flake=".", outcomes={"a": "passed"})
    assert tested.verdict(ONE).kind == "passed"


def test_record_of_another_system_is_not_taken(tested):
    tested.add(ONE, machine="dev-vm", flake=".", outcomes={"a": "passed"})
    file = next(tested.directory.glob("*.json"))
    file.rename(file.with_name(TWO.rpartition("/")[2] + ".json"))
    assert tested.verdict(TWO).kind == "none"


def test_record_is_private(tested):
    tested.add(ONE, machine="dev-vm", flake=".", outcomes={"a": "passed"})
    assert tested.directory.stat().st_mode & 0o777 == 0o700
    assert next(tested.directory.glob("*.json")).stat().st_mode & 0o777 == 0o600


def test_sessions_at_the_same_time_lose_nothing(tested):
    def one(number):
        tested.add(ONE, machine="dev-vm", flake=".", outcomes={f"t{number}": "passed"})

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tested.verdict(ONE).passed == 12


def test_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="can't be written"):
        Records(tmp_path / "file" / "tested").add(ONE, machine="m", flake=".", outcomes={})


def test_session_records_each_machine_that_a_test_used(tested):
    session = recorder(tested, {"dev-vm": ONE, "test-vm": TWO}.__getitem__)
    ran(session, "t.py::both", "passed", "passed", "passed", name="dev-vm")
    session.machine_used("t.py::both", "test-vm@qcow2")
    ran(session, "t.py::one", "passed", "failed", "passed")
    assert session.finish() == []
    assert tested.verdict(ONE).failed == ("t.py::one",)
    assert tested.verdict(TWO).kind == "passed"
    assert json.loads(next(tested.directory.glob("2*.json")).read_text())["machine"] == "test-vm"


@pytest.mark.parametrize(
    ("outcomes", "kind"),
    [
        (("failed",), "failed"),
        (("passed", "passed", "failed"), "failed"),
        (("passed", "skipped", "passed"), "none"),
        (("skipped",), "none"),
        (("passed",), "none"),  # the session ended before it had run
    ],
)
def test_what_each_end_of_a_test_counts(tested, outcomes, kind):
    session = recorder(tested)
    ran(session, "t", *outcomes)
    session.finish()
    assert tested.verdict(ONE).kind == kind


def test_repeated_test_counts_as_it_ended_last(tested):
    session = recorder(tested)
    ran(session, "t", "passed", "failed", "passed")
    ran(session, "t", "passed", "passed", "passed")
    session.finish()
    assert tested.verdict(ONE).kind == "passed"


def test_test_without_a_machine_is_not_recorded(tested):
    session = recorder(tested)
    session.outcome("t", "call", "passed")
    assert session.finish() == []
    assert not tested.directory.exists()


def test_machine_that_was_changed_meanwhile_is_not_recorded(tested):
    answers = iter([ONE, TWO])
    session = recorder(tested, lambda name: next(answers))
    session.expect(["dev-vm"])
    ran(session, "t", "passed", "passed", "passed")
    [note] = session.finish()
    assert note.startswith("dev-vm was changed while its tests ran")
    assert tested.records() == []


def test_machine_whose_vm_would_be_another_by_now_is_not_recorded(tested):
    session = Recorder("/home/me/config", lambda _: ONE, is_current=lambda _: False, tested=tested)
    ran(session, "t", "passed", "passed", "passed")
    [note] = session.finish()
    assert note.startswith("dev-vm was changed while its tests ran")
    assert tested.records() == []


def test_interrupted_session_records_failures_only_and_does_not_ask_again(tested):
    asked = []
    session = recorder(tested, lambda name: (asked.append(name), ONE)[1])
    ran(session, "good", "passed", "passed", "passed")
    ran(session, "bad", "passed", "failed", "passed")
    session._early["dev-vm"].result(5)
    assert session.finish(interrupted=True) == []
    assert asked == ["dev-vm"]
    assert tested.verdict(ONE).failed == ("bad",)
    assert tested.verdict(ONE).passed == 0


def test_bare_derivation_is_no_error_but_an_evaluation_that_fails_is_told(tested):
    def ask(name):
        raise (NotAVirtualMachineError if name == "bare" else EvaluationError)("no\nmore")

    session = recorder(tested, ask)
    ran(session, "a", "passed", "passed", name="bare")
    ran(session, "b", "passed", "passed", name="broken")
    assert session.finish() == ["broken: its tests are not recorded for nixvm deploy: no"]
