"""Units, the journal and the boot's times in a real guest."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pytest_nixvm.errors import MachineError, WaitTimeoutError

pytestmark = pytest.mark.nixvm("dev-vm")


@pytest.fixture
def unit_file(vm):
    """Make a unit for the time of the test: `unit_file(name, text)`."""
    made = []

    def make(name, text):
        made.append(name)
        vm.run(f"mkdir -p /run/systemd/system; cat >/run/systemd/system/{name}", stdin=text)
        vm.succeed("systemctl daemon-reload")
        return vm.unit(name)

    yield make
    for name in made:
        vm.run(
            f"systemctl stop {name}; systemctl reset-failed {name}; rm /run/systemd/system/{name}"
        )
    vm.succeed("systemctl daemon-reload")


def service(command, more=""):
    shell = "/run/current-system/sw/bin/bash"
    return (
        f"[Service]\nType=oneshot\nRemainAfterExit=yes\n{more}\nExecStart={shell} -c '{command}'\n"
    )


# --- units --------------------------------------------------------------------------------------


def test_a_unit(vm):
    sshd = vm.unit("sshd")

    assert (sshd.name, sshd.state, sshd.sub_state) == ("sshd.service", "active", "running")
    assert (sshd.load_state, sshd.result) == ("loaded", "success")
    assert sshd.is_active
    assert not sshd.failed
    assert sshd.properties["MainPID"] == str(sshd.main_pid)
    assert "sshd.service" in sshd.status
    before = sshd.main_pid
    sshd.restart()
    sshd.wait_active(60)
    assert sshd.main_pid != before
    assert "Server listening" in sshd.journal(lines=10).text


def test_a_unit_that_is_not_there(vm):
    nothing = vm.unit("nothing")

    assert nothing.load_state == "not-found"
    with pytest.raises(MachineError, match=r"`systemctl start nothing.service` on dev-vm: .*not f"):
        nothing.start()
    with pytest.raises(MachineError, match="does not exist"):
        vm.wait_for_unit("nothing")


def test_a_unit_that_fails(vm, unit_file):
    till = unit_file("till.service", service("echo no drawer; exit 3"))

    with pytest.raises(MachineError, match=r"(?s)start till.service.*status=3.*no drawer"):
        till.start()

    assert till.failed
    assert till.result == "exit-code"
    assert vm.failed_units() == ("till.service",)
    with pytest.raises(MachineError, match=r"(?s)has failed \(result: exit-code\).*no drawer"):
        vm.wait_for_unit("till")


def test_a_unit_whose_memory_runs_out(vm, unit_file):
    text = service("head -c 50M /dev/zero | tail", "MemoryMax=2M\nMemorySwapMax=0")
    vm.start_job(unit_file("greedy.service", text).name)

    with pytest.raises(MachineError, match=r"has failed because memory ran out"):
        vm.wait_for_unit("greedy")


def test_a_unit_on_its_way_is_waited_for(vm, unit_file):
    slow = unit_file("slow.service", service("until rm /run/go 2>/dev/null; do sleep 0.1; done"))
    assert vm.systemctl("start --no-block slow") == (0, "")

    with pytest.raises(WaitTimeoutError, match=r"(?s)slow.service to be active.*activating"):
        slow.wait_active(timeout=2)
    with pytest.raises(MachineError, match=r"(?s)is activating, and should be active.*slow"):
        vm.require_unit_state("slow")
    vm.succeed("touch /run/go")
    vm.wait_for_unit("slow")

    vm.require_unit_state("slow")
    assert vm.stop_job("slow") == (0, "")
    vm.require_unit_state("slow", "inactive")
    with pytest.raises(MachineError, match="inactive, and no job"):
        vm.wait_for_unit("slow")


def test_properties(vm):
    assert vm.get_unit_info("sshd")["Id"] == "sshd.service"
    assert vm.get_unit_property("sshd", "ActiveState") == "active"
    with pytest.raises(MachineError, match="has no property 'Nope'"):
        vm.get_unit_property("sshd", "Nope")
    assert vm.systemctl("is-active sshd nothing.service")[1] == "active\ninactive\n"


def test_a_user_s_own_units(vm, unit_file):
    with pytest.raises(MachineError, match=r"(?s)alice has no systemd.*linger"):
        vm.wait_for_unit("basic.target", user="alice")
    uid = vm.succeed("id -u alice").strip()
    # The stand-in's PAM has no pam_systemd, which would set that.
    vm.run(
        f"mkdir -p /run/systemd/system/user@{uid}.service.d; "
        f"cat >/run/systemd/system/user@{uid}.service.d/runtime.conf",
        stdin=f"[Service]\nEnvironment=XDG_RUNTIME_DIR=/run/user/{uid}\n",
        check=True,
    )
    vm.succeed("systemctl daemon-reload", f"systemctl start user@{uid}")

    vm.wait_for_unit("basic.target", user="alice")

    assert vm.systemctl("is-active basic.target", user="alice") == (0, "active\n")
    unit = vm.unit("basic.target", user="alice")
    assert unit.is_active
    assert "basic.target" in unit.journal().text
    with pytest.raises(MachineError, match=r"nothing.service on dev-vm does not exist"):
        vm.wait_for_unit("nothing", user="alice")


# --- the journal --------------------------------------------------------------------------------


def test_the_journal(vm):
    began = datetime.now(UTC)
    cursor = vm.journal_cursor()
    vm.run(
        "systemd-cat --identifier=till",
        stdin=b"<3>much money\nbin\xffary\n<7>noise\n",
        check=True,
    )

    entries = vm.journal(grep="money|noise")

    assert entries.messages == ("much money", "noise")
    assert [(entry.identifier, entry.priority) for entry in entries] == [("till", 3), ("till", 7)]
    assert abs((entries[0].time - began).total_seconds()) < 300
    assert "till[" in entries.text
    assert vm.journal(priority="err", grep="money|noise").messages == ("much money",)
    assert vm.journal(grep="money|noise", lines=1).messages == ("noise",)
    assert vm.journal(since=entries[1].time, grep="money|noise|ary").messages[-1] == "noise"
    assert vm.journal(grep="no such words") == ()
    after = vm.journal_text(cursor)
    assert "much money" in after
    assert "bin\ufffdary" in after
    assert "Linux version" not in after
    assert "Linux version" in vm.journal_text()
    # The kernel may have written something since: only what was there before is left out.
    since = vm.journal_text(vm.journal_cursor())
    assert "much money" not in since
    assert "noise" not in since


def test_the_journal_of_a_unit(vm):
    assert {entry.unit for entry in vm.journal(unit="sshd")} == {"sshd.service"}
    assert vm.journal(boot=None).messages[0] != ""


def test_what_journalctl_does_not_understand(vm):
    for wrong in ({"priority": "bad"}, {"since": "one day"}, {"boot": -9}):
        with pytest.raises(MachineError, match="The journal of dev-vm could not be read: "):
            vm.journal(**wrong)
    with pytest.raises(MachineError, match="could not be read"):
        vm.journal_text("no cursor")


# --- the boot -----------------------------------------------------------------------------------


def test_boot_times(vm):
    times = vm.boot_times()

    assert times.finished
    assert 0 < times.kernel < times.total
    assert 0 < times.userspace < times.total
    assert "systemd-journald.service" in dict(times.blame)
    assert [seconds for _, seconds in times.blame] == sorted(dict(times.blame).values())[::-1]
    assert "multi-user.target" in times.critical_chain
