"""What is understood of switch-to-configuration, in Perl or in Rust: their lines and statuses."""

from __future__ import annotations

import pytest

from pytest_nixvm.guest.switching import (
    Outcome,
    Switched,
    explain,
    outcome,
    parse_dry_run,
    parse_switch,
)

# The order of -ng; the implementation in Perl has the same lines.
DRY = """\
checking switch inhibitors... done
would stop the following units: cups.service, till.service
would NOT stop the following changed units: display-manager.service
would activate the configuration...
would restart systemd
would reload the following units: dbus.service
would restart the following units: nginx.service, sshd.service
would start the following units: till.service
would restart the following user units: pipewire.service
"""

SWITCH = """\
stopping the following units: cups.service, till.service
NOT restarting the following changed units: display-manager.service
activating the configuration...
setting up /etc...
restarting systemd...
reloading user units for alice...
restarting the following user units: nixos-activation.service
restarting sysinit-reactivation.target
reloading the following units: dbus.service
restarting the following units: nginx.service
starting the following units: till.service
Failed to start till.service
the following new units were started: fresh.service, fresh.timer
warning: the following units failed: till.service
× till.service - A till
"""

INHIBITED = """\
Checking switch inhibitors...
There are changes to critical components of the system:

dbus-implementation : dbus -> broker

Switching into this system is not recommended.
You probably want to run 'nixos-rebuild boot' and reboot your system instead.

Pre-switch check 'switchInhibitors' failed
Pre-switch checks failed
"""


def test_a_dry_run_tells_its_units_apart():
    dry = parse_dry_run(DRY)
    assert dry.stop == ("cups.service", "till.service")
    assert dry.start == ("till.service",)
    assert dry.restart == ("nginx.service", "sshd.service")
    assert dry.reload == ("dbus.service",)
    assert dry.keep == ("display-manager.service",)
    assert dry.restarts_systemd
    assert dry.text == DRY


def test_what_is_stopped_and_started_again_counts_as_restarted():
    assert parse_dry_run(DRY).restarted == ("nginx.service", "sshd.service", "till.service")


def test_units_of_users_are_not_taken_for_the_systems():
    assert "pipewire.service" not in parse_dry_run(DRY).named
    assert "nixos-activation.service" not in parse_switch(SWITCH).restarting


def test_a_dry_run_of_an_equal_system_is_empty():
    dry = parse_dry_run("would activate the configuration...\n")
    assert dry.is_empty
    assert not parse_dry_run(DRY).is_empty


def test_a_switch_is_read():
    told = parse_switch(SWITCH)
    assert told.stopping == ("cups.service", "till.service")
    assert told.starting == ("till.service",)
    assert told.restarting == ("nginx.service",)
    assert told.reloading == ("dbus.service",)
    assert told.kept == ("display-manager.service",)
    assert told.new == ("fresh.service", "fresh.timer")
    assert told.failed == told.jobs_failed == ("till.service",)
    assert told.restarts_systemd
    assert not told.activation_failed


def test_units_that_failed_are_named():
    assert outcome(4, SWITCH) is Outcome.UNITS_FAILED
    assert explain(Outcome.UNITS_FAILED, parse_switch(SWITCH), 4) == "units failed: till.service"


def test_a_users_activation_that_failed_is_named():
    text = "warning: user activation for alice failed\n"
    told = parse_switch(text)
    assert told.users_failed == ("alice",)
    assert explain(outcome(4, text), told, 4) == "the activation for alice failed"


def test_the_parts_of_an_activation_that_failed_are_named():
    text = (
        "activating the configuration...\nActivation script snippet 'users' failed (1)\n"
        "Failed to run activate script\n"
    )
    told = parse_switch(text)
    assert outcome(2, text) is Outcome.ACTIVATION_FAILED
    assert told.activation_failed
    assert explain(Outcome.ACTIVATION_FAILED, told, 2) == "the activation script failed: users"
    both = parse_switch(text + "warning: the following units failed: x.service\n")
    assert explain(Outcome.UNITS_FAILED, both, 4).endswith("the activation script failed as well")


def test_inhibitors_are_named():
    told = parse_switch(INHIBITED)
    assert outcome(1, INHIBITED) is Outcome.INHIBITED
    assert told.inhibitors == ("dbus-implementation : dbus -> broker",)
    assert "dbus -> broker" in explain(Outcome.INHIBITED, told, 1)


@pytest.mark.parametrize(
    ("returncode", "text", "expected"),
    [
        (0, "", Outcome.DONE),
        (1, "Pre-switch check 'disk' failed\nPre-switch checks failed\n", Outcome.CHECK_FAILED),
        (1, "Pre-switch checks failed\n", Outcome.CHECK_FAILED),  # without a name: older ones
        (1, "Failed to install bootloader\n", Outcome.BOOT_LOADER_FAILED),
        (1, "Usage: switch-to-configuration [check|switch|boot]\n", Outcome.ERROR),
        (11, "Could not acquire lock\n", Outcome.LOCKED),
        (100, "Warning: the new NixOS configuration has an 'init'\n", Outcome.NEEDS_REBOOT),
        (127, "", Outcome.ERROR),
    ],
)
def test_exit_statuses(returncode, text, expected):
    assert outcome(returncode, text) is expected


def test_a_check_that_refused_is_named():
    told = parse_switch("Pre-switch check 'disk' failed\nPre-switch checks failed\n")
    assert explain(Outcome.CHECK_FAILED, told, 1) == "a pre-switch check refused it: disk"


def test_what_is_refused_has_changed_nothing():
    refused = {each for each in Outcome if each.refused}
    assert refused == {
        Outcome.INHIBITED,
        Outcome.CHECK_FAILED,
        Outcome.BOOT_LOADER_FAILED,
        Outcome.LOCKED,
    }
    assert not any(each.activated for each in refused)


def test_noise_is_no_unit():
    text = "building the following units: no.service\nnote: stopping the following units: a.service"
    assert parse_switch(text) == Switched()
