"""What systemd says of all units before and after something, and what became of them meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pytest_nixvm.errors import MachineError
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.guest.switching import DryRun
from pytest_nixvm.guest.systemd import parse_properties

SETTLE = 10.0
"""Seconds that jobs which are still queued may take before the states are read."""

READ_TIMEOUT = 120.0
"""Seconds for systemd to tell the states of all units; an emulated guest takes a few."""

_NAMES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "Result",
    "InvocationID",
    "StateChangeTimestampMonotonic",
    "ConditionResult",
    "TriggeredBy",
    "NRestarts",
    "ExecMainStatus",
    "Job",
)

# One call for all: starting a program is what costs time in an emulated guest. Devices and scopes
# come and go by themselves.
_TYPES = ("service", "socket", "target", "timer", "path", "mount", "automount", "swap", "slice")
_READ = r"""
exec {never}<> <(:)
for ((n = 0; n < @tries@; n++)); do
  jobs=$(systemctl list-jobs --no-legend --no-pager) || break
  [[ $jobs ]] || break
  read -rt 0.2 -u "$never"
done
exec systemctl show --no-pager --all --property=@names@ -- @patterns@
"""

# Started on demand and ended by themselves, or made by a log-in, which may be our own.
_OF_ITS_OWN = re.compile(
    r"^(user@|user-runtime-dir@|user-\d+\.slice|sshd@|systemd-(hostnamed|localed|timedated|"
    r"importd|userdbd|journal-flush|update-done)\b|systemd-.*-resetup|nixvm-switch-|getty@|"
    r"serial-getty@|run-user-|run-credentials-|sysinit-reactivation\.target)"
)


@dataclass(frozen=True)
class UnitState:
    """One unit at one time."""

    name: str
    load: str
    active: str  # active, reloading, inactive, failed, activating, deactivating
    sub: str
    result: str
    invocation: str  # another one each time it is started; "" where it never was
    changed: int  # µs of the last change of `active`, since the boot
    condition: bool  # whether its conditions held when it was last to be started
    triggered: bool  # whether a socket, timer or path starts it
    restarts: int  # how often systemd has restarted it by itself
    status: int  # of its main process
    job: bool  # whether something is queued for it

    @property
    def is_active(self) -> bool:
        """Whether it is there, or on its way."""
        return self.active in ("active", "reloading", "refreshing", "activating")

    @property
    def failed(self) -> bool:
        """Whether it has failed, or waits to be started again because it has."""
        return self.active == "failed" or (
            self.sub.startswith("auto-restart") and (self.status != 0 or self.result != "success")
        )

    @classmethod
    def parse(cls, shown: Mapping[str, str]) -> UnitState:
        """Return a unit from what `systemctl show` says of it."""
        return cls(
            name=shown.get("Id", ""),
            load=shown.get("LoadState", ""),
            active=shown.get("ActiveState", ""),
            sub=shown.get("SubState", ""),
            result=shown.get("Result", "success"),
            invocation=shown.get("InvocationID", ""),
            changed=_number(shown.get("StateChangeTimestampMonotonic")),
            condition=shown.get("ConditionResult", "yes") != "no",
            triggered=bool(shown.get("TriggeredBy")),
            restarts=_number(shown.get("NRestarts")),
            status=_number(shown.get("ExecMainStatus")),
            job=shown.get("Job", "0") not in ("", "0"),
        )


class UnitStates(dict[str, UnitState]):
    """All units that systemd knows, by name. Aliases are not in it."""

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of those that have failed, or are started again and again."""
        return tuple(sorted(name for name, unit in self.items() if unit.failed))

    @classmethod
    def parse(cls, text: str) -> UnitStates:
        """Return the units of `systemctl show`, which puts an empty line between two."""
        units = (UnitState.parse(parse_properties(each)) for each in text.split("\n\n"))
        return cls((unit.name, unit) for unit in units if unit.name)


def unit_states(
    run: Callable[[Command, float], CommandResult], *, where: str, settle: float = SETTLE
) -> UnitStates:
    """Ask systemd for all units, when no job is queued any more; after `settle` seconds anyway.

    Raises `MachineError` when systemd does not answer.
    """
    text = _READ
    for key, value in {
        "tries": str(round(settle * 5)),
        "names": ",".join(_NAMES),
        "patterns": " ".join(f"'*.{kind}'" for kind in _TYPES),
    }.items():
        text = text.replace(f"@{key}@", value)
    shown = run(["bash", "-c", text], settle + READ_TIMEOUT)
    states = UnitStates.parse(shown.stdout)
    if not states:
        said = shown.stderr.strip() or f"exit status {shown.returncode}"
        raise MachineError(f"systemd on {where} does not tell the states of its units: {said}")
    return states


# --- before and after -------------------------------------------------------------------------


@dataclass(frozen=True)
class Happened:
    """What became of the units between two times, by systemd's own account; names, sorted."""

    started: tuple[str, ...] = ()  # not active before, active now
    stopped: tuple[str, ...] = ()  # active before, not active now, and not failed
    restarted: tuple[str, ...] = ()  # active before and now, and started in between
    reloaded: tuple[str, ...] = ()  # its state changed meanwhile, without a start
    ran: tuple[str, ...] = ()  # started and over, or failed
    newly_failed: tuple[str, ...] = ()  # whether or not they were active before

    @property
    def is_empty(self) -> bool:
        """Whether nothing became of any unit."""
        return self == Happened()


def happened(before: UnitStates, after: UnitStates) -> Happened:
    """Compare two times of the same boot."""
    found: dict[str, set[str]] = {}
    for name in before.keys() | after.keys():
        if (what := _became(before.get(name), after.get(name))) is not None:
            found.setdefault(what, set()).add(name)
    failed = set(after.failed) - set(before.failed)
    names = {what: tuple(sorted(units)) for what, units in found.items()}
    return Happened(newly_failed=tuple(sorted(failed)), **names)


def _became(old: UnitState | None, new: UnitState | None) -> str | None:
    was, is_now = old is not None and old.is_active, new is not None and new.is_active
    if new is None or old is None or not (was or is_now):
        if was and new is None:
            return "stopped"  # systemd has forgotten it
        if is_now:
            return "started"
        return "ran" if new is not None and new.invocation and _anew(old, new) else None
    if was and not is_now:
        return "ran" if new.failed else "stopped"
    if not was:
        return "started"
    if _anew(old, new):
        return "restarted"
    settled = old.active == new.active == "active"
    return "reloaded" if settled and old.changed != new.changed else None


def _anew(old: UnitState | None, new: UnitState) -> bool:
    return old is None or (old.invocation != new.invocation and bool(new.invocation))


def surprises(
    promised: DryRun, became: Happened, before: UnitStates, after: UnitStates
) -> tuple[str, ...]:
    """Say where what happened is not what the dry run promised, a sentence for each.

    What the dry run can't know is none: units that come with their targets, are started on demand
    or belong to a log-in. Failures are told elsewhere.
    """
    touched = {*became.restarted, *became.started, *became.ran}
    said: list[str] = []
    for name in promised.restarted:
        unit = after.get(name)
        if name in touched or unit is None or unit.failed or not unit.condition:
            continue
        if unit.is_active:
            said.append(f"{name} was to be restarted, and has run on as it was")
        else:
            said.append(f"{name} was to be restarted, and was not started again ({unit.active})")
    for name in sorted(set(promised.stop) - set(promised.start)):
        if name in after and after[name].is_active:
            how = "was started again" if name in touched else "has run on"
            said.append(f"{name} was to be stopped, and {how}")
    for name in sorted(set(promised.start) - set(promised.stop)):
        unit = after.get(name)
        fine = unit is not None and (unit.is_active or unit.failed or not unit.condition)
        if not fine and name not in touched:
            state = unit.active if unit is not None else "unknown to systemd"
            said.append(f"{name} was to be started, and is {state}")
    for name in promised.reload:
        known = name in before and name in after and before[name].active == "active"
        if known and name not in touched and name not in became.reloaded and after[name].is_active:
            said.append(f"{name} was to be reloaded, and was not")
    for what, names in (("restarted", became.restarted), ("stopped", became.stopped)):
        for name in names:
            if name in promised.named or _OF_ITS_OWN.match(name) or name.endswith(".slice"):
                continue
            if what == "stopped" and before[name].triggered:
                continue  # it waits for its socket, timer or path again
            if what == "stopped" and before[name].active == "activating":
                continue  # it has done what it was there for
            again = name in after and after[name].restarts > before[name].restarts
            why = " (by systemd: it had ended by itself)" if again else ""
            said.append(f"{name} was {what}{why}, and the dry run did not say so")
    return tuple(said)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
