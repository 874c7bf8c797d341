"""The actor on the host, run here on a host that is made of directories and small programs."""

import shutil
import threading
import time

import pytest
from _deploy_host import Host

pytestmark = pytest.mark.shell

OLD = ("old", "old", "old")
NEW = ("new", "new", "new")


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path / "host")
    yield host
    host.stop()


def test_preflight_says_what_the_host_is(host):
    lines = host.call("preflight").stdout.splitlines()
    assert {"nixos=yes", "systemd=yes", "nix=yes", "generation=1"} <= {*lines}
    assert f"current={host.old}" in lines
    assert any(line.startswith("space=") and line[6:].isdigit() for line in lines)
    assert any(line.startswith("filesystem=") and len(line) > 11 for line in lines)


def test_confirmed_system_runs_and_boots(host):
    host.call("root_for", host.new)
    assert host.start(reason="a fire").returncode == 0
    host.until("waiting")
    assert host.runs() == ("new", "old", "old")  # a power cut now boots the old one
    assert host.rooted == ["nixvm-deploy", "nixvm-deploy-old"]
    assert host.call("confirm", host.new).returncode == 0
    assert host.ended() == "committed"
    assert host.runs() == NEW
    assert host.rooted == []
    assert "forced, for this reason: a fire" in host.journal()


def test_without_confirmation_it_goes_back(host):
    host.start(confirm=1)
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD
    assert "nobody confirmed within 1 s" in host.facts()["reason"]


def test_confirmation_of_another_system_is_none(host):
    host.start(confirm=2)
    host.until("waiting")
    assert host.call("confirm", host.old).returncode == 3
    assert host.ended() == "rolled-back"


def test_confirmation_that_comes_too_late_changes_nothing(host):
    host.start(confirm=0)
    assert host.ended() == "rolled-back"
    assert host.call("confirm", host.new).returncode == 3
    assert host.runs() == OLD


def test_asked_to_go_back_it_does_so_at_once(host):
    host.start(confirm=60)
    host.until("waiting")
    host.call("abort", "Ctrl-C")
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD
    assert host.facts()["reason"] == "Ctrl-C"


@pytest.mark.parametrize("status", [2, 3, 101])
def test_activation_that_fails_half_way_is_undone(host, status):
    host.behave("new.test", f'ln -sfn "$me" "$R/run/current-system"; echo no >&2; exit {status}')
    host.start()
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD
    assert f"exit status {status}" in host.facts()["reason"]
    assert "no" in host.call("output").stdout


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (1, "Pre-switch checks failed", "refused"),
        (11, "Could not acquire lock", "refused"),
        (100, "", "booted"),
    ],
)
def test_what_refuses_before_anything_is_changed_is_left_alone(host, status, said, reason):
    host.behave("new.test", f"echo {said} >&2; exit {status}")
    host.start()
    assert host.ended() == "rolled-back"
    assert "old test" not in host.log()
    assert reason in host.facts()["reason"]


def test_error_before_the_new_system_runs_may_have_stopped_units(host):
    """switch-to-configuration stops units first: 1 is any error of its own, then or later."""
    host.behave("new.test", 'echo "stopping the following units: a.service"; exit 1')
    host.start()
    assert host.ended() == "rolled-back"
    assert host.log() == ["new test", "old test"]


FAILS_AGAIN = 'ln -sfn "$me" "$R/run/current-system"; echo "%s"; exit 4'


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Failed to run activate script", "the activation script failed"),
        ("Failed to start b.service", "units failed: b.service"),
        ("Failed to restart b@c:d.service: it is masked", "units failed: b@c:d.service"),
        ("warning: the following units failed: a.service, b.service", "units failed: b.service"),
        ("warning: user activation for me failed", "units failed: activation-of-user-me"),
    ],
)
def test_unit_that_had_failed_before_hides_no_other_failure(host, said, reason):
    host.behave("failed", "a.service\n")
    host.behave("new.test", FAILS_AGAIN % said)
    host.start()
    assert host.ended() == "rolled-back"
    assert host.facts()["reason"] == reason


@pytest.mark.parametrize(
    "said", ["", "Failed to stop swapping to /dev/x.y: no", "Failed to start a.service"]
)
def test_unit_that_fails_again_is_no_new_failure(host, said):
    host.behave("failed", "a.service\n")
    host.behave("new.test", FAILS_AGAIN % said)
    host.start()
    host.until("waiting")


def test_unit_that_is_started_again_and_again_has_failed(host):
    host.start()
    host.until("waiting")
    host.behave("restarts", "well.service\n")
    assert "failed" not in host.facts()
    host.behave("restarts", "well.service\nb.service\n")
    assert host.facts()["failed"] == "b.service"


def test_systemd_that_does_not_answer_for_a_moment_has_not_ended_it(host):
    host.start()
    host.until("waiting")
    host.behave("reexec", "")
    threading.Timer(1.0, (host.root / "reexec").unlink).start()
    assert host.facts()["busy"] == "yes"


def test_systemd_that_does_not_answer_is_no_sign_of_health(host):
    host.start()
    host.until("waiting")
    host.behave("silent", "")
    assert host.facts()["silent"] == "yes"


def test_checks_of_the_old_system_do_not_keep_it_from_coming_back(host):
    host.behave("new.test", '[ -z "${NIXOS_NO_CHECK-}" ] || exit 1')
    host.behave("old.test", '[ "${NIXOS_NO_CHECK-}" = 1 ] || exit 1')
    host.start(confirm=0)
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD


def test_switch_of_somebody_else_is_not_undone(host):
    other = host.root / "nix/store/other"
    shutil.copytree(host.root / "nix/store/new", other)
    host.start(confirm=60)
    host.until("waiting")
    (host.root / "run/other-system").symlink_to(other)
    (host.root / "run/other-system").rename(host.root / "run/current-system")
    host.call("abort", "Ctrl-C")
    assert host.ended() == "overtaken"
    assert host.runs() == ("other", "old", "old")
    assert "old test" not in host.log()


def test_start_that_comes_after_its_end_is_refused(host):
    host.call("abort", "Ctrl-C", "one")
    late = host.start(deploy="one")
    assert (late.returncode, "called off" in late.stderr) == (3, True)
    assert host.start(deploy="two").returncode == 0


def test_another_deploy_is_neither_ended_nor_confirmed_nor_uncovered(host):
    host.call("root_for", host.new)
    host.start(deploy="one")
    host.until("waiting")
    host.call("abort", "Ctrl-C", "two")
    assert host.call("confirm", host.new, "two").returncode == 3
    host.call("release")
    assert host.rooted == ["nixvm-deploy", "nixvm-deploy-old"]
    time.sleep(0.5)
    assert host.state() == "waiting"
    host.call("confirm", host.new, "one")
    assert host.ended() == "committed"


def test_boot_loader_that_cannot_be_put_back_is_said(host):
    host.behave("new.boot", "exit 1")
    host.behave("old.boot", "exit 1")
    host.start()
    host.until("waiting")
    host.call("confirm", host.new)
    assert host.ended() == "rolled-back"
    assert host.facts()["loader"] == "bad"


def test_going_back_waits_for_another_switch(host):
    host.behave("old.test", 'echo x >> "$R/tried"; [ "$(wc -l < "$R/tried")" -gt 4 ] || exit 11')
    host.start(confirm=0)
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD


def test_old_generation_that_was_deleted_meanwhile_is_made_again(host):
    host.behave("new.boot", 'rm "$R/nix/var/nix/profiles/system-1-link"; exit 1')
    host.start()
    host.until("waiting")
    host.call("confirm", host.new)
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD


def test_boot_default_that_cannot_be_set_activates_nothing(host):
    host.behave("new.boot", "exit 1")
    host.start("boot")
    assert host.ended() == "rolled-back"
    assert "old test" not in host.log()
    assert host.runs() == OLD


def test_host_is_told_by_its_release_as_well(host):
    (host.root / "etc/NIXOS").unlink()
    assert "nixos=yes" not in host.call("preflight").stdout
    host.behave("etc/os-release", "NAME=NixOS\nID=nixos\n")
    assert "nixos=yes" in host.call("preflight").stdout


def test_units_that_fail_are_a_failure_unless_they_had_failed_before(host):
    fails = 'ln -sfn "$me" "$R/run/current-system"; printf "%s\\n" UNITS > "$R/failed"; exit 4'
    host.behave("failed", "a.service\n")
    host.behave("new.test", fails.replace("UNITS", "a.service b.service"))
    host.start()
    assert host.ended() == "rolled-back"
    assert host.facts()["reason"] == "units failed: b.service"
    (host.root / "ended").unlink()
    host.behave("failed", "a.service\n")
    host.behave("new.test", fails.replace("UNITS", "a.service"))
    host.start()
    host.until("waiting")


def test_activation_that_hangs_is_ended(host):
    host.behave("new.test", "exec sleep 60")
    host.start(activate=1)
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD
    assert "did not end in time" in host.facts()["reason"]


def test_nothing_of_an_activation_that_was_ended_goes_on(host):
    inner = 'touch "$R/began"; sleep 9; ln -sfn "$0" "$R/run/current-system"; touch "$R/late"'
    host.behave("new.test", f"bash -c '{inner}' \"$me\"; true")
    host.start(activate=3)
    assert host.ended() == "rolled-back"
    assert (host.root / "began").exists()
    time.sleep(6)
    assert not (host.root / "late").exists()
    assert host.runs() == OLD


@pytest.mark.parametrize("when", ["activating", "waiting", "committing"])
def test_actor_that_is_killed_leaves_the_old_system(host, when):
    if when == "activating":
        host.behave("new.test", 'ln -sfn "$me" "$R/run/current-system"; exec sleep 3')
    if when == "committing":
        host.behave("new.boot", 'basename "$me" > "$R/boot"; exec sleep 3')
    host.start()
    if when == "committing":
        host.until("waiting")
        host.call("confirm", host.new)
    host.until(when)
    if when != "waiting":
        end = time.monotonic() + 10
        while (
            f"new {'test' if when == 'activating' else 'boot'}"
            not in (host.root / "log").read_text()
            and time.monotonic() < end
        ):
            time.sleep(0.02)
        time.sleep(0.2)
    host.kill()
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD
    assert host.rooted == []


def test_actor_that_is_killed_when_it_has_committed_keeps_the_new_system(host):
    """What runs, what boots and the profile are one system, whichever that is."""
    kills = 'command -p rm "$@"; case $* in */committing) kill -9 "$PPID" ;; esac'
    host.program(host.root / "bin/rm", kills)
    host.start()
    host.until("waiting")
    host.call("confirm", host.new)
    assert host.ended() == "committed"
    assert host.runs() == NEW
    assert host.rooted == []


@pytest.mark.parametrize("what", ["nix-env", "boot"])
def test_commit_that_fails_goes_back(host, what):
    if what == "boot":
        host.behave("new.boot", 'basename "$me" > "$R/boot"; exit 1')
    else:
        host.behave("no-nix-env", "")
    host.start()
    host.until("waiting")
    host.call("confirm", host.new)
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD


def test_boot_only_changes_nothing_that_runs(host):
    host.start("boot")
    assert host.ended() == "committed"
    assert host.runs() == ("old", "new", "new")


def test_rollback_that_fails_at_first_is_tried_again(host):
    host.behave("old.test", 'if [ ! -e "$R/tried" ]; then touch "$R/tried"; exit 3; fi')
    host.start(confirm=0)
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD


def test_rollback_that_hangs_is_not_tried_again(host):
    host.behave("old.test", "exit 124")  # as `apply` has it for one that did not end in time
    host.start(confirm=0)
    assert host.ended() == "rollback-failed"
    assert host.log().count("old test") == 1


def test_rollback_that_is_not_possible_is_said(host):
    host.behave("old.test", "exit 3")
    host.start(confirm=0)
    assert host.ended() == "rollback-failed"
    assert host.runs() == ("new", "old", "old")  # a reboot mends it


def test_host_that_shuts_down_is_left_to_boot_the_old_one(host):
    host.start()
    host.until("waiting")
    host.behave("stopping", "")
    host.kill()
    assert host.ended() == "rolled-back"
    assert host.runs() == ("new", "old", "old")


def test_second_deploy_is_refused_and_does_not_disturb_the_first(host):
    host.start()
    host.until("waiting")
    second = host.start()
    assert second.returncode == 3
    assert "under way" in second.stderr
    assert "busy=yes" in host.call("preflight").stdout
    host.call("confirm", host.new)
    assert host.ended() == "committed"


def test_system_that_has_not_arrived_is_not_started(host):
    shutil.rmtree(host.new)
    assert "has not arrived" in host.start().stderr
    assert host.runs() == OLD
