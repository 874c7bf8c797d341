"""What is said of units, the journal and the boot; systemctl and journalctl are scripts here."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime

import pytest

from pytest_nixvm.errors import CommandTimeoutError, MachineError, WaitTimeoutError
from pytest_nixvm.guest.boot_times import boot_times, parse_blame, parse_span
from pytest_nixvm.guest.journal import cursor, parse_entry, read_journal, text_after
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.guest.systemd import Systemd, full_name
from pytest_nixvm.guest.unit import Unit

SYSTEMCTL = r"""#!/bin/bash
cd "${0%/*}"
printf '%s\n' "$*" >>calls
case " $* " in
  *" show "*)
    n=$(($(cat count 2>/dev/null) + 1))
    [[ -e show.$n ]] && echo $n >count || n=$((n - 1))
    cat show.$n; exit ;;
  *" status "*) echo 'x till.service - A till'; exit 3 ;;
  *" list-units "*) echo 'till.service loaded failed failed A till' ;;
  *" start "*) echo "Job for till.service failed.
See \"systemctl status\" for details." >&2; exit 1 ;;
  *" restart "*) exec sleep 60 ;;
esac
"""
JOURNALCTL = r"""#!/bin/bash
cd "${0%/*}"
[[ $1 == --sync ]] && exit
printf '%s\n' "$*" >>asked
if [[ -e journal ]]; then cat journal; else echo 'till[7]: no drawer'; fi
"""


class Guest:
    """This machine, with another systemctl and journalctl. `states` is what `show` says in turn."""

    def __init__(self, place):
        self.place = place
        for name, text in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
            (place / name).write_text(text)
            (place / name).chmod(0o755)
        self.systemd = Systemd(self.run, where="vm")

    def states(self, *states):
        for number, state in enumerate(states, 1):
            text = "".join(f"{name}={value}\n" for name, value in state.items())
            (self.place / f"show.{number}").write_text(text)
        return self.systemd

    def journal(self, *entries):
        (self.place / "journal").write_text("".join(json.dumps(e) + "\n" for e in entries))

    def run(self, command, timeout):
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        env = {"PATH": f"{self.place}:/usr/bin:/bin"}
        try:
            done = subprocess.run(
                argv, check=False, capture_output=True, timeout=timeout, env=env, cwd="/"
            )
        except subprocess.TimeoutExpired:
            raise CommandTimeoutError("too long", command=command) from None
        return CommandResult(command, done.returncode, done.stdout, done.stderr, 0.0)

    def said(self, name):
        return (self.place / name).read_text().splitlines()


@pytest.fixture
def guest(tmp_path):
    return Guest(tmp_path)


ACTIVE = {"LoadState": "loaded", "ActiveState": "active", "Job": ""}
STARTING = {"LoadState": "loaded", "ActiveState": "activating", "Job": "12"}
QUEUED = {"LoadState": "loaded", "ActiveState": "inactive", "Job": "12"}
IDLE = {"LoadState": "loaded", "ActiveState": "inactive", "Job": ""}
FAILED = {"LoadState": "loaded", "ActiveState": "failed", "Result": "exit-code"}
MISSING = {"LoadState": "not-found", "ActiveState": "inactive"}


# --- units --------------------------------------------------------------------------------------


def test_a_unit_on_its_way_is_waited_for(guest):
    guest.states(QUEUED, STARTING, ACTIVE).wait_for_unit("till", 60)

    calls = guest.said("calls")
    assert len(calls) == 3
    assert all(call.startswith("show") and call.endswith("till.service") for call in calls)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (FAILED, r"(?s)till.service on vm has failed \(result: exit-code\).*A till.*no drawer"),
        ({**FAILED, "Result": "oom-kill"}, "has failed because memory ran out"),
        (MISSING, "does not exist"),
        (IDLE, "is inactive, and no job is waiting"),
        ({**IDLE, "Job": "0"}, "is inactive, and no job is waiting"),
        ({"LoadState": "masked", "ActiveState": "inactive"}, "is masked"),
    ],
)
def test_a_unit_that_won_t_come_ends_the_wait_at_once(guest, state, says):
    with pytest.raises(MachineError, match=says):
        guest.states(STARTING, state).wait_for_unit("till", 600)


def test_a_unit_that_takes_too_long_is_shown(guest):
    with pytest.raises(WaitTimeoutError, match=r"(?s)0.1 s for till.service.*A till.*no drawer"):
        guest.states(STARTING).wait_for_unit("till", 0.1)


def test_a_systemd_that_does_not_answer(guest):
    (guest.place / "systemctl").write_text("#!/bin/sh\necho 'no D-Bus' >&2; exit 1\n")

    with pytest.raises(MachineError, match=r"till.service to be active on vm .*: no D-Bus"):
        guest.systemd.wait_for_unit("till", 600)
    with pytest.raises(MachineError, match="systemd on vm does not answer: no D-Bus"):
        guest.systemd.properties("till")


def test_a_user_without_a_manager():
    def run(command, timeout):
        said = b"Failed to connect to bus: No such file or directory\n"
        return CommandResult(command, 1, b"", said, 0.0)

    alice = Systemd(run, where="vm", user="alice")

    for ask in (lambda: alice.wait_for_unit("x", 9), lambda: alice.properties("x")):
        with pytest.raises(MachineError, match=r"(?s)^alice has no systemd.*linger"):
            ask()
    with pytest.raises(MachineError, match="linger"):
        alice.job("start", "x", 9)


def test_failed_units(guest):
    assert guest.systemd.failed_units() == ("till.service",)


def test_the_name_of_a_unit():
    assert full_name("sshd") == "sshd.service"
    assert full_name("org.example.till") == "org.example.till.service"
    assert full_name("boot.mount") == "boot.mount"
    assert full_name("getty@tty1") == "getty@tty1.service"
    assert full_name("/boot") == "/boot"


def test_the_properties_of_a_unit(guest):
    state = {**FAILED, "MainPID": "0", "SubState": "failed", "Environment": "A=1 B=2"}
    unit = Unit(guest.states(state), "till")

    assert (unit.name, unit.state, unit.sub_state) == ("till.service", "failed", "failed")
    assert (unit.load_state, unit.result, unit.main_pid) == ("loaded", "exit-code", None)
    assert unit.failed
    assert not unit.is_active
    assert unit.properties["Environment"] == "A=1 B=2"
    assert "A till" in unit.status


def test_a_job_that_fails_shows_the_unit(guest):
    with pytest.raises(MachineError) as caught:
        Unit(guest.systemd, "till").start()

    text = str(caught.value)
    assert text.startswith("`systemctl start till.service` on vm: Job for till.service failed.\n")
    assert "See" not in text
    assert "A till" in text
    assert "no drawer" in text


def test_a_job_that_takes_too_long_goes_on(guest):
    with pytest.raises(WaitTimeoutError, match=r"(?s)did not end within 0.5 s, and goes on.*till"):
        Unit(guest.systemd, "till").restart(timeout=0.5)


# --- the journal --------------------------------------------------------------------------------

ENTRY = {
    "__CURSOR": "s=1;i=2",
    "__REALTIME_TIMESTAMP": "1795515106240093",
    "SYSLOG_IDENTIFIER": "sshd",
    "_PID": "214",
    "_SYSTEMD_UNIT": "sshd.service",
    "PRIORITY": "6",
    "MESSAGE": "Server listening",
}


def test_an_entry():
    entry = parse_entry(json.dumps(ENTRY))

    assert entry.time == datetime(2026, 11, 24, 10, 11, 46, 240093, UTC)
    assert (entry.unit, entry.identifier, entry.pid) == ("sshd.service", "sshd", 214)
    assert (entry.priority, entry.message, entry.cursor) == (6, "Server listening", "s=1;i=2")
    assert entry.fields["_PID"] == "214"
    assert str(entry) == "Nov 24 10:11:46.240093 sshd[214]: Server listening"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ([98, 255, 99], "b\ufffdc"),
        ([27, 91, 109], "\x1b[m"),
        (["first", "second"], "second"),
        (["first", [98, 10, 99]], "b\nc"),
        ([], ""),
        (None, ""),
        ("", ""),
    ],
)
def test_messages_of_every_form(message, text):
    assert parse_entry(json.dumps({**ENTRY, "MESSAGE": message})).message == text


def test_every_value_of_a_field_that_is_there_several_times():
    entry = parse_entry(json.dumps({**ENTRY, "TAG": ["a", [98]]}))

    assert entry.all_fields["TAG"] == ("a", "b")


def test_an_entry_that_lacks_nearly_everything():
    entry = parse_entry('{"__REALTIME_TIMESTAMP": "0", "PRIORITY": "high"}')

    assert (entry.unit, entry.identifier, entry.pid, entry.priority) == ("", "", None, None)
    assert str(entry) == "Jan 01 00:00:00.000000 unknown: "


def test_a_message_of_several_lines_is_indented():
    lines = str(parse_entry(json.dumps({**ENTRY, "MESSAGE": "a\nb\n"}))).splitlines()

    assert lines[1].strip() == "b"
    assert lines[1].index("b") == lines[0].rindex("a")


def test_the_unit_of_what_systemd_says_is_the_one_it_is_about():
    entry = parse_entry(json.dumps({**ENTRY, "_SYSTEMD_UNIT": "init.scope", "UNIT": "till.mount"}))

    assert entry.unit == "till.mount"


def test_what_is_asked_of_the_journal(guest):
    guest.journal(ENTRY)
    at = datetime(2026, 11, 24, 10, tzinfo=UTC)

    entries = read_journal(
        guest.run, where="vm", since=at, until="-5min", priority=3, grep="a b", lines=9
    )

    assert entries.text == "Nov 24 10:11:46.240093 sshd[214]: Server listening\n"
    assert entries.messages == ("Server listening",)
    (asked,) = guest.said("asked")
    for word in ("--since=@1795514400.000000", "--until=-5min", "--priority=3", "--grep=a b"):
        assert word in asked
    assert "--boot=0" in asked


def test_entries_are_in_order_whichever_way_journalctl_gives_them(guest):
    guest.journal(*({**ENTRY, "__CURSOR": f"s=1;i={n:x}", "MESSAGE": str(n)} for n in (11, 10, 9)))

    assert read_journal(guest.run, where="vm", grep="x", lines=2).messages == ("10", "11")


def test_our_own_request_is_not_in_the_journal(guest):
    ours = {"SYSLOG_IDENTIFIER": "systemd-journald"}
    ours["MESSAGE"] = "Received client request to sync journal."
    guest.journal(ENTRY, {**ENTRY, **ours})

    assert read_journal(guest.run, where="vm", lines=1).messages == ("Server listening",)


def test_a_time_without_a_zone_is_refused(guest):
    with pytest.raises(ValueError, match="zone"):
        read_journal(guest.run, where="vm", since=datetime(2026, 1, 1))


def test_a_journal_that_can_t_be_read(guest):
    (guest.place / "journalctl").write_text("#!/bin/sh\necho 'Unknown log level x' >&2; exit 1\n")

    with pytest.raises(MachineError, match=r"journal of vm .*: Unknown log level x"):
        read_journal(guest.run, where="vm", priority="x")


def test_a_search_that_finds_nothing(guest):
    (guest.place / "journalctl").write_text("#!/bin/sh\nexit 1\n")

    assert read_journal(guest.run, where="vm", grep="x") == ()


def test_cursors(guest):
    (guest.place / "journal").write_text("-- cursor: of a message\n-- cursor: s=5;i=9\n")

    assert cursor(guest.run, where="vm") == "s=5;i=9"
    text_after(guest.run, "s=5;i=9", where="vm")
    assert "--after-cursor=s=5;i=9" in guest.said("asked")[-1]

    (guest.place / "journal").write_text("")
    assert cursor(guest.run, where="vm") == ""


# --- the boot -----------------------------------------------------------------------------------


def test_spans():
    assert parse_span("1min 2.5s") == 62.5
    assert parse_span("771ms") == pytest.approx(0.771)
    assert parse_span("12us") == pytest.approx(12e-6)
    assert parse_span("soon") is None
    assert parse_blame("1min 2.500s a.service\n  771ms b.mount\n\n") == (
        ("a.service", 62.5),
        ("b.mount", 0.771),
    )


def stamps(firmware, loader, initrd, userspace, finish):
    names = ("Firmware", "Loader", "InitRD", "Userspace", "Finish")
    values = (firmware, loader, initrd, userspace, finish)
    return {f"{n}TimestampMonotonic": v for n, v in zip(names, values, strict=True)}


def test_the_stages_of_a_boot(guest):
    (guest.place / "systemd-analyze").write_text("#!/bin/sh\necho '2.5s a.service'\n")
    (guest.place / "systemd-analyze").chmod(0o755)

    times = boot_times(guest.states(stamps(3000000, 1000000, 2000000, 5000000, 9500000)))

    assert times.finished
    assert (times.firmware, times.loader, times.kernel, times.initrd) == (2.0, 1.0, 2.0, 3.0)
    assert (times.userspace, times.total) == (4.5, 12.5)
    assert times.blame == (("a.service", 2.5),)


def test_a_boot_that_goes_on(guest):
    times = boot_times(guest.states(stamps(0, 0, 0, 5000000, 0)))

    assert not times.finished
    assert (times.kernel, times.initrd, times.userspace, times.total) == (5.0, None, None, None)
