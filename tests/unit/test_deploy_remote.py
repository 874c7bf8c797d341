"""The actor on the host, run here on a host that is made of directories and small programs."""

import shutil
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
    if (host.root / "active").exists():
        host.call("abort", "the test is over")
        host.ended()


def test_preflight_says_what_the_host_is(host):
    host.behave("failed", "a.service\n")
    lines = host.call("preflight").stdout.splitlines()
    assert {"nixos=yes", "systemd=yes", "nix=yes", "generation=1", "failed=a.service"} <= {*lines}
    assert f"current={host.old}" in lines
    assert any(line.startswith("space=") and line[6:].isdigit() for line in lines)


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
    host.until("waiting")
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


@pytest.mark.parametrize(("status", "reason"), [(1, "refused"), (11, "refused"), (100, "booted")])
def test_what_refuses_before_anything_is_changed_is_left_alone(host, status, reason):
    host.behave("new.test", f"exit {status}")
    host.start()
    assert host.ended() == "rolled-back"
    assert "old test" not in (host.root / "log").read_text()
    assert reason in host.facts()["reason"]


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


@pytest.mark.parametrize("when", ["activating", "waiting", "committing"])
def test_actor_that_is_killed_leaves_the_old_system(host, when):
    if when == "activating":
        host.behave("new.test", 'ln -sfn "$me" "$R/run/current-system"; sleep 3')
    if when == "committing":
        host.behave("new.boot", 'basename "$me" > "$R/boot"; sleep 3')
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
    host.behave("old.test", 'if [ ! -e "$R/tried" ]; then touch "$R/tried"; exit 11; fi')
    host.start(confirm=0)
    assert host.ended() == "rolled-back"
    assert host.runs() == OLD


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
