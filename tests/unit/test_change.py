"""A change and its steps, on a machine that is played here: what is run in it, in which order."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_nixvm.change import Change
from pytest_nixvm.errors import AgentError, MachineError, ShellError, SshError, SwitchError
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.guest.journal import parse_entry
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.guest.switching import Outcome
from pytest_nixvm.progress import Silent
from pytest_nixvm.transcript import Transcript

PROFILE = "/nix/var/nix/profiles/system"
CURRENT = "/run/current-system"


class Ssh:
    """SSH that works, or says why it does not."""

    user = "root"

    def __init__(self, machine):
        self.machine = machine

    def close(self):
        pass

    @property
    def client(self):
        if self.machine.locked_out:
            raise SshError(self.machine.locked_out)
        return object()


class Machine:
    """A VM with generations, units, and a switch-to-configuration that does as it was told."""

    name = "till"
    commands_note = "no shell"

    def __init__(self, base):
        self.log = []
        self.generations = []
        self.place = 0
        self.current = base
        self.locked_out = ""
        self.agent_gone = ""
        self.units = {"till.service": ("active", "running", "1")}
        self.after = dict(self.units)  # what a switch makes of them
        self.said, self.status = "activating the configuration...\n", 0
        self.dry = "would activate the configuration...\n"
        self.dry_status = 0
        self.errors = []  # of the waits for the end, in turn
        self.locks_out = ""
        self.closes = ""  # why the agent is gone after the switch
        self.boots_into = None
        self.logged = []
        self.progress, self.transcript = Silent(), Transcript()
        self.agent = SimpleNamespace(ping=lambda: None)
        self.ssh = Ssh(self)

    # --- commands ---

    def run(self, command, *, check=False, timeout=900.0):
        status, out = self._run(command)
        result = CommandResult(command, status, out.encode(), b"", 0.1, channel="shell")
        return result.check() if check else result

    def _run(self, command):
        if isinstance(command, str):
            if self.errors:
                raise self.errors.pop(0)
            return 0, ""
        program = command[0]
        if program == "readlink":
            found = {PROFILE: self.profile, CURRENT: str(self.current)}[command[-1]]
            return (0, f"{found}\n") if found else (1, "")
        if program == "nix-env":
            self.log.append(" ".join(("nix-env", *command[3:])))
            return self._nix_env(command[3:])
        if program.endswith("switch-to-configuration"):
            self.log.append(f"dry {Path(program).parent.parent.name}")
            return self.dry_status, self.dry
        if program == "bash" and "systemd-run" in command[2]:
            self._switch(command[6], command[7])
            return 0, "1000000000.500000\n"
        if program == "bash" and "list-units" in command[2]:
            return 0, self._states()
        if program == "bash" and "cat --" in command[2]:
            return 0, f"{self.status}\n{self.said}"
        return 0, ""

    @property
    def profile(self):
        return self.generations[self.place] if self.generations else ""

    def _nix_env(self, words):
        if words[0] == "--rollback":
            self.place -= 1
        elif self.profile != words[1]:
            self.generations[self.place + 1 :] = [words[1]]
            self.place = len(self.generations) - 1
        return 0, ""

    def _switch(self, program, mode):
        system = Path(program).parent.parent
        self.log.append(f"{mode} {system.name}")
        if mode != "boot" and self.status in (0, 2, 4):
            self.current = system
            self.units = self.after
        self.locked_out, self.agent_gone = self.locks_out, self.closes

    def _states(self):
        lines = [f"{name} loaded {a} {s} x" for name, (a, s, _) in self.units.items()]
        ids = [each[2] for each in self.units.values()]
        return "\n".join([*lines, "----", *self.units, "----", *ids, "----\n"])

    # --- what else a machine has ---

    def reconnect(self, timeout=60.0):
        self.log.append("reconnect")
        if self.agent_gone:
            raise AgentError(self.agent_gone)

    def failed_units(self):
        return tuple(name for name, unit in self.units.items() if unit[0] == "failed")

    def systemd(self):
        return SimpleNamespace(
            report=lambda name: f"the journal of {name}",
            properties=lambda *_: {"Result": "exit-code"},
        )

    def journal(self, **_):
        return tuple(parse_entry(json.dumps(each)) for each in self.logged)

    def shutdown(self):
        self.log.append("shutdown")

    def become(self, build):
        self.log.append(f"become {build.name}")
        self.boots_into = self.boots_into or build.toplevel

    def start(self):
        self.log.append("start")
        self.current = self.boots_into

    def reboot(self, timeout=None):
        self.log.append("reboot")
        self.current = self.boots_into


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr("pytest_nixvm.change_switch.LOOK_AFTER", 0.0)

    def system(name, **files):
        place = tmp_path / name
        for path in ("bin/switch-to-configuration", "kernel", "initrd", "kernel-params"):
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(files.get(path, path))
        return place

    def build(name, boot_loader=False, **files):
        top = system(name, **files)
        script = tmp_path / "run"
        return VmBuild(
            name, name, script, script, top, "x86_64-linux", (), False, 0, 0, boot_loader
        )

    def change(boot_loader=False, **files):
        base = build("old", boot_loader)
        candidate = build("new", boot_loader, **files)
        system("new/specialisation/night")
        return Change(Machine(base.toplevel), base, candidate, lambda: "the difference")

    return change


def steps(change):
    return [each for each in change.vm.log if each != "reconnect"]


# --- switching ----------------------------------------------------------------------------------


def test_a_switch_makes_both_generations_and_asks_for_the_promise_first(make, tmp_path):
    change = make()
    result = change.switch()
    assert steps(change) == [
        f"nix-env --set {tmp_path}/old",
        f"nix-env --set {tmp_path}/new",
        "dry new",
        "switch new",
    ]
    assert result.ok
    assert result.into == tmp_path / "new"
    assert change.current == change.default == tmp_path / "new"
    assert change.results == [result]


def test_a_test_makes_no_generation(make, tmp_path):
    change = make()
    change.switch("test")
    assert steps(change) == ["dry new", "test new"]
    assert change.default == tmp_path / "old"
    assert change.current == tmp_path / "new"
    change.rollback()
    assert steps(change)[2:] == ["dry old", "switch old"]


def test_boot_activates_nothing_and_says_so(make, tmp_path):
    change = make()
    result = change.switch("boot")
    assert steps(change)[-1] == "boot new"
    assert result.needs_reboot
    assert change.before is change.vm
    assert (change.current, change.default) == (tmp_path / "old", tmp_path / "new")


def test_before_ends_with_the_switch(make):
    change = make()
    assert change.before is change.vm
    change.switch()
    with pytest.raises(MachineError, match=r"Use change\.vm"):
        _ = change.before


def test_a_mode_that_is_none_is_refused(make):
    with pytest.raises(MachineError, match="switch, test, boot"):
        make().switch("install")


def test_the_difference_is_made_when_it_is_asked_for(make):
    assert make().diff == "the difference"


def test_a_unit_that_fails_by_the_switch_is_named_with_its_journal(make):
    change = make()
    change.vm.after = {"till.service": ("failed", "failed", "2")}
    change.vm.said, change.vm.status = "warning: the following units failed: till.service\nx\n", 4
    with pytest.raises(SwitchError, match="the journal of till") as caught:
        change.switch()
    result = caught.value.result
    assert [failure.name for failure in result.newly_failed] == ["till.service"]
    assert str(result).startswith(
        "till, switch into the candidate, new: till.service failed.\n(switch-to-configuration"
    )
    assert change.results == [result]


def test_a_unit_that_had_failed_before_is_no_fault_of_the_switch(make):
    change = make()
    change.vm.units["old.service"] = ("failed", "failed", "1")
    change.vm.after = dict(change.vm.units)
    change.vm.said, change.vm.status = "warning: the following units failed: old.service\n", 4
    result = change.switch()
    assert result.ok
    assert result.outcome is Outcome.UNITS_FAILED
    assert "with units that had failed before" in str(result)
    assert "Failed already before: old.service." in str(result)


def test_a_switch_that_locks_out_is_found_though_it_ends_well(make):
    change = make()
    change.vm.locks_out = "sshd refused the session's key."
    with pytest.raises(SwitchError) as caught:
        change.switch()
    said = str(caught.value)
    assert "it went through, but nobody can log in over SSH any more" in said.splitlines()[0]
    assert "ssh: root could log in, now nobody can. sshd refused the session's key." in said
    assert not change.results[0].ok


def test_who_could_not_log_in_before_loses_nothing(make):
    change = make()
    change.vm.locked_out = change.vm.locks_out = "there is no sshd"
    assert change.switch().ok


def test_a_shell_that_ends_meanwhile_is_opened_again(make):
    change = make()
    change.vm.errors = [ShellError("ended"), ShellError("ended")]
    assert change.switch().ok
    assert change.vm.log.count("reconnect") == 3


def test_an_agent_that_stays_away_is_the_finding(make):
    change = make()
    change.vm.closes = "the agent gives no answer"
    result = change.switch(check=False)
    assert not result.ok
    assert result.lost_channels == ("agent: the agent gives no answer",)
    assert result.outcome is Outcome.DONE


def test_a_machine_that_nobody_reaches_any_more(make):
    change = make()
    change.vm.errors = [ShellError("no channel") for _ in range(9)]
    change.vm.closes = change.vm.locks_out = "nothing answers"
    result = change.switch(check=False)
    assert result.outcome is Outcome.UNREACHABLE
    assert result.returncode is None
    assert "no channel" in str(result)


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (1, "Pre-switch check 'disk' failed\nPre-switch checks failed\n", Outcome.CHECK_FAILED),
        (100, "Warning: the new NixOS configuration\n", Outcome.NEEDS_REBOOT),
    ],
)
def test_what_was_not_activated_leaves_the_deployed_generation(make, status, said, expected):
    change = make()
    change.vm.status, change.vm.said = status, said
    change.vm.dry_status = status
    with pytest.raises(SwitchError) as caught:
        change.switch()
    assert caught.value.result.outcome is expected
    assert caught.value.result.promised is None
    assert change.before is change.vm


def test_a_refused_switch_is_not_what_boots_next(make, tmp_path):
    change = make()
    change.vm.status, change.vm.said = 1, "Failed to install bootloader\n"
    change.switch(check=False)
    assert change.vm.profile == str(tmp_path / "new")  # nixos-rebuild leaves it like that
    assert change.default == tmp_path / "old"


def test_a_dry_run_that_is_refused_raises(make):
    change = make()
    change.vm.dry, change.vm.dry_status = "Pre-switch check 'disk' failed\n", 1
    with pytest.raises(SwitchError, match="a pre-switch check refused it: disk"):
        change.dry_activate()


def test_a_kernel_that_waits_for_the_reboot_is_told(make):
    change = make(kernel="newer")
    result = change.switch()
    assert result.ok
    assert result.reboot_reasons == ("the kernel",)


def test_broken_promises_are_told(make):
    change = make()
    change.vm.dry = "would restart the following units: till.service\n"
    result = change.switch()
    assert result.surprises == ("till.service was to be restarted, and has run on as it was",)


def test_what_systemd_ignores_is_told_if_it_is_new(make):
    def says(key, seconds):
        where = "/etc/systemd/system/till.service"
        return {
            "MESSAGE": f"{where}:9: Unknown key '{key}' in section [Service], ignoring.",
            "SYSLOG_IDENTIFIER": "systemd",
            "CONFIG_FILE": where,
            "CONFIG_LINE": "9",
            "_PID": "1",
            "PRIORITY": "4",
            "__REALTIME_TIMESTAMP": str(seconds * 1000000),
        }

    change = make()
    change.vm.logged = [
        says("Olde", 999999999),
        says("Olde", 1000000002),
        says("Restrat", 1000000002),
    ]
    with pytest.raises(SwitchError, match="a setting is silently ignored"):
        change.switch()
    result = change.results[-1]
    assert len(result.ignored) == 1
    assert "Restrat" in result.ignored[0]
    assert "Restrat" in str(result)


# --- specialisations, rollback, reboot ----------------------------------------------------------


def test_a_specialisation_is_the_running_generations(make):
    change = make()
    change.switch()
    change.specialisation("night")
    assert steps(change)[-1] == "test night"
    assert change.specialisation("night").ok  # from within itself


def test_a_specialisation_that_is_none_names_those_there_are(make):
    change = make()
    with pytest.raises(MachineError, match="old has no specialisation 'night'; it has none"):
        change.specialisation("night")
    with pytest.raises(MachineError, match="it has night"):
        change.switch(specialisation="day")


def test_a_system_that_can_not_be_switched_to(make, tmp_path):
    change = make()
    (tmp_path / "new" / "bin" / "switch-to-configuration").unlink()
    with pytest.raises(MachineError, match=r"system\.switch\.enable"):
        change.switch()


def test_a_rollback_goes_to_the_generation_before(make, tmp_path):
    change = make()
    change.switch()
    change.rollback()
    assert steps(change)[-3:] == ["nix-env --rollback", "dry old", "switch old"]
    assert change.current == change.default == tmp_path / "old"


def test_there_is_nothing_to_roll_back_at_first(make):
    with pytest.raises(MachineError, match="nothing to roll back"):
        make().rollback()


def test_a_reboot_without_a_boot_loader_starts_the_other_build(make):
    change = make()
    change.switch()
    result = change.reboot()
    assert change.vm.log[-3:] == ["shutdown", "become new", "start"]
    assert (result.how, result.generation) == ("direct", "candidate")
    assert "the boot loader was not tested" in str(result)


def test_a_reboot_before_any_switch_is_into_the_deployed_generation(make):
    change = make()
    assert change.reboot().generation == "base"
    assert change.before is change.vm


def test_a_reboot_through_the_boot_loader_is_checked(make, tmp_path):
    change = make(boot_loader=True)
    change.switch("boot")
    change.vm.boots_into = tmp_path / "old"
    with pytest.raises(SwitchError, match=r"has booted .*old \(base\)"):
        change.reboot()
    change.switch("boot")
    change.vm.boots_into = tmp_path / "new"
    assert change.reboot().how == "boot loader"


def test_units_that_fail_after_the_reboot_are_told(make, tmp_path):
    change = make(boot_loader=True)
    change.vm.boots_into = tmp_path / "old"
    reboot = change.vm.reboot

    def fail(timeout):
        reboot(timeout)
        change.vm.units = {"till.service": ("failed", "failed", "2")}

    change.vm.reboot = fail
    with pytest.raises(SwitchError, match=r"till\.service failed, and had not before"):
        change.reboot()
