"""The machine's power: it shuts down cleanly, and comes back."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_nixvm.checks.base import Checked, and_more, finding
from pytest_nixvm.checks.units import sort_out
from pytest_nixvm.errors import MachineError, WaitTimeoutError, tail

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

POWER = "power"
"""The VM that is rebooted and shut down."""

# What systemd and systemd-shutdown say of what did not stop by itself. The first is in the journal,
# the others are on the console only: the journal is closed by then.
_KILLED = re.compile(
    r"(\S+): State '(?:stop|final)-\S+' timed out\. (?:Killing|Aborting|Terminating)"
)
_UNMOUNTED = re.compile(r"(?:Failed to unmount|Failed unmounting|Could not unmount)[^\r\n]*", re.I)
# What the running system itself lies on, and what every VM has: these stay mounted to the end.
_STAYS = re.compile(r"/(?:usr|nix(?:/\S*)?|tmp/(?:xchg|shared)|run(?:/\S*)?|oldroot\S*)?[:.]?$")
_REMAINED = re.compile(r"Sending SIGKILL to PID \d+ \(([^)\r\n]+)\)")
_STOPPING = re.compile(
    r"A stop job is running for ([^\r\n(]+?)\s*\((?:(\d+)min )?(?:(\d+)s)? / (?:(\d+)min ?)?"
    r"(?:(\d+)s)?\)"
)


def shutdown_trouble(console: str) -> list[str]:
    """Return what a console shows of a shutdown that was not clean."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console)
    found = [
        match[0].strip()
        for match in _UNMOUNTED.finditer(plain)
        if not any(_STAYS.fullmatch(word) for word in match[0].split())
    ]
    found += [f"{match[1]} had to be killed at the very end" for match in _REMAINED.finditer(plain)]
    for name, minutes, seconds, of_minutes, of_seconds in _STOPPING.findall(plain):
        took = 60 * int(minutes or 0) + int(seconds or 0)
        limit = 60 * int(of_minutes or 0) + int(of_seconds or 0)
        if limit and took >= limit - 2:
            found.append(f"{name} did not stop within {limit} s, and was killed")
    return list(dict.fromkeys(found))


def shutdown(checked: Checked) -> None:
    """It powers off when it is told to: nothing has to be killed, everything is unmounted."""
    vm = checked.vm_for(POWER)
    log = vm.spec.console_log
    since = log.stat().st_size if log.exists() else 0
    try:
        vm.shutdown(timeout=checked.settings.boot_timeout)
    except WaitTimeoutError as error:
        raise finding(
            f"{checked.name} does not power off.",
            str(error),
            todo="A service that does not stop holds it up; its TimeoutStopSec ends that.",
        ) from error
    console = ""
    if log.exists():
        console = log.read_bytes()[since:].decode("utf-8", "replace")
    found = shutdown_trouble(console)
    if found:
        raise finding(
            f"{checked.name} powers off, but not cleanly.",
            *found,
            "The console's last lines:\n" + tail(console, 12),
            todo="What is killed or stays mounted can lose data: see the unit's ExecStop, KillMode "
            "and TimeoutStopSec.",
        )


def reboot(checked: Checked) -> None:
    """It survives a reboot: it stops in time, comes back, and no unit fails that had not before."""
    vm = checked.vm_for(POWER)
    before = set(vm.failed_units())
    system = _system(vm)
    vm.reboot()
    found = sort_out(checked, vm, [name for name in vm.failed_units() if name not in before])
    if found:
        raise finding(
            f"After a reboot {and_more(each.name for each in found)} "
            f"{'have' if len(found) > 1 else 'has'} failed on {checked.name}, and not before.",
            *map(str, found),
            todo="State of the first boot is in its way: a file that is there already, a lock, a "
            "database of another version.",
        )
    if _system(vm) != system:
        raise finding(
            f"{checked.name} has rebooted into another system.", f"{system} → {_system(vm)}"
        )
    if killed := _killed(vm):
        raise finding(
            f"{checked.name} reboots, but {and_more(killed)} did not stop by itself and had to be "
            "killed.",
            todo="What is killed can lose data: see the unit's ExecStop, KillMode and "
            "TimeoutStopSec.",
        )


def _system(vm: Machine) -> str:
    return vm.run(["readlink", "-f", "/run/current-system"], check=True).stdout.strip()


def _killed(vm: Machine) -> list[str]:
    """Return the units that were killed when the boot before this one ended."""
    try:
        entries = vm.journal(boot=-1, grep="timed out", lines=200)
    except MachineError:
        return []  # its journal is not kept
    found = (_KILLED.search(message) for message in entries.messages)
    return list(dict.fromkeys(match[1] for match in found if match))
