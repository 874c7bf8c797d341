"""What became of units between two times; systemctl is a script here."""

from __future__ import annotations

import subprocess

import pytest

from pytest_nixvm.errors import MachineError
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.guest.switching import DryRun
from pytest_nixvm.guest.unit_states import (
    Happened,
    UnitState,
    UnitStates,
    happened,
    surprises,
    unit_states,
    unpromised,
)


def states(**units):
    """Units by their name without ".service": (active, invocation, shown), or just "active"."""
    found = UnitStates()
    for name, state in units.items():
        active, invocation, shown = (
            (*state, {}, {})[:3] if isinstance(state, tuple) else (state, "", {})
        )
        active, _, sub = active.partition("/")
        name = f"{name}.service"
        found[name] = UnitState(name, active, sub, invocation, shown)
    return found


def test_states_are_read_from_systemctl(tmp_path):
    (tmp_path / "systemctl").write_text(r"""#!/bin/bash
case " $* " in
  *" list-jobs "*) ;;
  *" list-units "*)
    echo 'till.service loaded active running A till'
    echo 'dead.service loaded failed failed A thing'
    echo 'gone.service not-found inactive dead gone.service' ;;
  *" show "*)
    printf 'Id=till.service\nInvocationID=one\nResult=success\n\n'
    printf 'Id=dead.service\nInvocationID=two\nResult=exit-code\n' ;;
esac
echo "$*" >>"${0%/*}/calls"
""")
    (tmp_path / "systemctl").chmod(0o755)

    def run(command, timeout):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(command, check=False, capture_output=True, timeout=timeout, env=env)
        return CommandResult(command, done.returncode, done.stdout, done.stderr, 0.0)

    found = unit_states(run, where="vm", names=["till.service"])
    assert found["till.service"].is_active
    assert found["till.service"].invocation == "one"
    assert found["dead.service"].result == "exit-code"
    assert found.failed == ("dead.service",)
    assert not found["gone.service"].is_active
    shown = (tmp_path / "calls").read_text().splitlines()[-1]
    assert shown.endswith(
        "-- till.service dead.service"
    )  # what has failed is asked about by itself


def test_a_systemd_that_does_not_answer_is_said():
    def run(command, timeout):
        return CommandResult(command, 1, b"", b"Failed to connect to bus\n", 0.0)

    with pytest.raises(MachineError, match=r"systemd on vm .*Failed to connect to bus"):
        unit_states(run, where="vm")


def test_invocations_come_from_journalds_links():
    text = "a.service loaded active running A\n----\na.service\nb.service\n----\none\ntwo\n----\n"
    assert UnitStates.parse(text)["a.service"].invocation == "one"


def test_what_happened():
    before = states(
        same=("active", "1"),
        again=("active", "1"),
        off=("active", "1"),
        reread=("active", "1", {"StateChangeTimestampMonotonic": "5"}),
        fell=("active", "1"),
        task="inactive",
        broken=("failed", "1"),
    )
    after = states(
        same=("active", "1"),
        again=("active", "2"),
        off=("inactive", "1"),
        reread=("active", "1", {"StateChangeTimestampMonotonic": "9"}),
        fell=("failed", "2"),
        task=("inactive", "7"),
        new=("active", "1"),
        broken=("failed", "2"),
    )
    became = happened(before, after)
    assert became == Happened(
        started=("new.service",),
        stopped=("off.service",),
        restarted=("again.service",),
        reloaded=("reread.service",),
        ran=("broken.service", "fell.service", "task.service"),
        newly_failed=("fell.service",),
    )


def test_a_service_that_is_started_again_and_again_has_failed():
    before = states(loop="active/running")
    after = states(loop=("activating/auto-restart", "2", {"ExecMainStatus": "1"}))
    assert happened(before, after).newly_failed == ("loop.service",)
    fine = {"ExecMainStatus": "0", "Result": "success"}
    after = states(loop=("activating/auto-restart", "2", fine))
    assert happened(before, after).newly_failed == ()


def test_a_promise_that_was_kept_is_no_surprise():
    before = states(till=("active", "1"), old=("active", "1"), new="inactive")
    after = states(till=("active", "2"), old="inactive", new=("active", "1"))
    dry = DryRun(
        stop=("old.service", "till.service"), start=("till.service", "new.service"), text=""
    )
    assert surprises(dry, happened(before, after), before, after) == ()


def test_promises_that_were_not_kept():
    before = states(till=("active", "1"), old=("active", "1"), new="inactive", conf=("active", "1"))
    after = before
    dry = DryRun(
        stop=("old.service",),
        start=("new.service",),
        restart=("till.service",),
        reload=("conf.service",),
    )
    assert surprises(dry, happened(before, after), before, after) == (
        "till.service was to be restarted, and has run on as it was",
        "old.service was to be stopped, and has run on",
        "new.service was to be started, and is inactive",
        "conf.service was to be reloaded, and was not",
    )


def test_a_unit_whose_conditions_do_not_hold_is_no_surprise():
    before = states(new="inactive")
    after = states(new=("inactive", "", {"ConditionResult": "no"}))
    dry = DryRun(start=("new.service",))
    assert surprises(dry, happened(before, after), before, after) == ()


def test_what_was_not_promised_is_told_with_its_reason():
    before = states(
        till=("active", "1"), ledger=("active", "1"), lone=("active", "1"), loop=("active", "1")
    )
    after = states(
        till=("active", "2"),
        ledger=("active", "2", {"PartOf": "till.service"}),
        lone="inactive",
        loop=("active", "2", {"NRestarts": "3"}),
    )
    dry = DryRun(restart=("till.service",))
    became = happened(before, after)
    assert unpromised(dry, became) == ("ledger.service", "lone.service", "loop.service")
    said = "\n".join(surprises(dry, became, before, after))
    assert "ledger.service was restarted, and the dry run did not say so: it is PartOf till" in said
    assert "lone.service was stopped, and the dry run did not say so" in said
    assert "loop.service was restarted" in said
    assert "ended by itself" in said
    assert "till.service was" not in said


def test_what_comes_and_goes_by_itself_is_no_surprise():
    before = states(**{"user@0": ("active", "1"), "idle": ("active", "1"), "task": "activating"})
    after = states(
        **{
            "user@0": "inactive",
            "idle": ("inactive", "1", {"TriggeredBy": "idle.socket"}),
            "task": "inactive",
        }
    )
    assert surprises(DryRun(), happened(before, after), before, after) == ()
