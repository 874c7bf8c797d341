"""The built-in checks, in the order in which they run."""

from __future__ import annotations

from pytest_nixvm.checks.base import Check
from pytest_nixvm.checks.changes import (
    newly_failed_units,
    reachable_after_switch,
    reboots_into_candidate,
    rolls_back,
    switch,
)
from pytest_nixvm.checks.channels import agent, boots, ssh
from pytest_nixvm.checks.configuration import ignored_configuration
from pytest_nixvm.checks.logins import log_in
from pytest_nixvm.checks.ports import ports
from pytest_nixvm.checks.power import reboot, shutdown
from pytest_nixvm.checks.units import failed_units, home_manager, restart_loops

BUILT_IN: tuple[Check, ...] = (
    Check("boots", boots),
    Check("failed-units", failed_units),
    Check("agent", agent),
    Check("ssh", ssh),
    Check("ports", ports),
    Check("log-in", log_in),
    Check("ignored-configuration", ignored_configuration),
    Check("home-manager", home_manager),
    Check("restart-loops", restart_loops),
    Check("reboot", reboot, shared=False),
    Check("shutdown", shutdown, shared=False),
    Check("switch", switch, shared=False, change=True),
    Check("newly-failed-units", newly_failed_units, shared=False, change=True),
    Check("reachable-after-switch", reachable_after_switch, shared=False, change=True),
    Check("reboots-into-candidate", reboots_into_candidate, shared=False, change=True),
    Check("rolls-back", rolls_back, shared=False, change=True),
)
