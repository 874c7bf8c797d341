"""What is said of units, from what systemctl prints."""

from __future__ import annotations

import pytest

from pytest_nixvm.errors import MachineError, WaitTimeoutError
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.guest.systemd import Systemd


class Guest:
    """Answers systemctl and journalctl; `states` are what `show` says, one after the other."""

    def __init__(self, *states: dict[str, str]) -> None:
        self.states = list(states)
        self.calls: list[list[str]] = []

    def run(self, argv, timeout):
        self.calls.append(list(argv))
        if "show" in argv:
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            out = "".join(f"{name}={value}\n" for name, value in state.items())
        elif "status" in argv:
            out = "x till.service - A till\n"
        elif argv[0] == "journalctl":
            out = "till[7]: no drawer\n"
        else:
            out = "till.service loaded failed failed A till\n"
        return CommandResult(argv, 0, out.encode(), b"", 0.0)


ACTIVE = {"LoadState": "loaded", "ActiveState": "active"}
STARTING = {"LoadState": "loaded", "ActiveState": "activating", "Job": "12"}
QUEUED = {"LoadState": "loaded", "ActiveState": "inactive", "Job": "12"}
IDLE = {"LoadState": "loaded", "ActiveState": "inactive"}
FAILED = {"LoadState": "loaded", "ActiveState": "failed", "Result": "exit-code"}
MISSING = {"LoadState": "not-found", "ActiveState": "inactive"}


def test_a_unit_on_its_way_is_waited_for():
    guest = Guest(QUEUED, STARTING, ACTIVE)
    Systemd(guest.run, where="vm").wait_for_unit("till", 60)

    assert guest.calls == [["systemctl", "show", "--no-pager", "till.service"]] * 3


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (FAILED, r"(?s)till.service on vm has failed \(result: exit-code\).*no drawer"),
        (MISSING, "does not exist"),
        (IDLE, "is inactive, and no job is waiting"),
        ({"LoadState": "masked", "ActiveState": "inactive"}, "is masked"),
    ],
)
def test_a_unit_that_won_t_come_ends_the_wait_at_once(state, says):
    with pytest.raises(MachineError, match=says):
        Systemd(Guest(state).run, where="vm").wait_for_unit("till", 600)


def test_a_unit_that_takes_too_long_is_shown():
    with pytest.raises(WaitTimeoutError, match=r"(?s)It is activating.*A till.*no drawer"):
        Systemd(Guest(STARTING).run, where="vm").wait_for_unit("till", 0.01)


def test_a_user_s_own_manager():
    guest = Guest(ACTIVE)
    Systemd(guest.run, where="vm", user="alice").wait_for_unit("pipewire.socket", 1)

    assert guest.calls[0][:3] == ["systemctl", "--machine=alice@", "--user"]


def test_failed_units():
    assert Systemd(Guest(ACTIVE).run, where="vm").failed_units() == ("till.service",)
