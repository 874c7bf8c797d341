"""What systemd says of all units before and after something, and what became of them meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

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
    "Result",
    "InvocationID",
    "StateChangeTimestampMonotonic",
    "ConditionResult",
    "TriggeredBy",
    "PartOf",
    "BindsTo",
    "Requires",
    "NRestarts",
    "ExecMainStatus",
)

# Devices and scopes come and go by themselves.
_TYPES = "service,socket,target,timer,path,mount,automount,swap"

# All in one call, and few programs: those are what costs time in an emulated guest. Properties cost
# a message to systemd for each unit, so they are asked of some only. Where a unit has processes,
# /run/systemd/units has its invocation for journald (unit_export_invocation_id in systemd).
_READ = r"""
exec {never}<> <(:)
for ((n = 0; n < @tries@; n++)); do
  jobs=$(systemctl list-jobs --no-legend --no-pager) || break
  [[ $jobs ]] || break
  read -rt 0.2 -u "$never"
done
units=$(systemctl list-units --all --full --plain --no-legend --no-pager --type=@types@) || exit
printf '%s\n' "$units"
while read -r name load active sub _; do
  [[ $active == failed || $sub == auto-restart* ]] && set -- "$@" "$name"
done <<<"$units"
echo ----
shopt -s nullglob
links=(/run/systemd/units/invocation:*)
((${#links[@]})) && printf '%s\n' "${links[@]#*/invocation:}" ---- && readlink -- "${links[@]}"
echo ----
(($# == 0)) || systemctl show --no-pager --property=@names@ -- "$@"
"""

# Started on demand and ended by themselves, or made by a log-in, which may be our own.
_OF_ITS_OWN = re.compile(
    r"^(user@|user-runtime-dir@|user-\d+\.slice|sshd@|systemd-(hostnamed|localed|timedated|"
    r"importd|userdbd|journal-flush|update-done)\b|systemd-.*-resetup|nixvm-switch-|getty@|"
    r"serial-getty@|run-user-|run-credentials-)"
)

# What every switch restarts for its own purposes.
_BOOKKEEPING = ("sysinit-reactivation.target",)


@dataclass(frozen=True)
class UnitState:
    """One unit at one time. What only `systemctl show` tells is there if it was asked for."""

    name: str
    active: str  # active, reloading, inactive, failed, activating, deactivating
    sub: str
    invocation: str = ""  # another one each time it is started; "" where that is not known
    shown: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_active(self) -> bool:
        """Whether it is there, or on its way."""
        return self.active in ("active", "reloading", "refreshing", "activating")

    @property
    def result(self) -> str:
        """How it ended the last time: success, exit-code, timeout, …; "" where that is unknown."""
        return self.shown.get("Result", "")

    @property
    def failed(self) -> bool:
        """Whether it has failed, or waits to be started again because it has."""
        return self.active == "failed" or (
            self.sub.startswith("auto-restart")
            and (self.shown.get("ExecMainStatus", "0") != "0" or self.result != "success")
        )

    @property
    def skipped(self) -> bool:
        """Whether a condition kept it from being started."""
        return self.shown.get("ConditionResult") == "no"

    def pulled_by(self, units: Iterable[str]) -> str:
        """Return which of `units` stops and restarts this one with itself, and by what."""
        for name in ("PartOf", "BindsTo", "Requires"):
            for unit in self.shown.get(name, "").split():
                if unit in units:
                    return f"{name} {unit}"
        return ""


class UnitStates(dict[str, UnitState]):
    """All units that systemd knows, by name. Aliases are not in it."""

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of those that have failed, or are started again and again."""
        return tuple(sorted(name for name, unit in self.items() if unit.failed))

    @classmethod
    def parse(cls, text: str) -> UnitStates:
        """Return the units of what the script in the guest has printed."""
        listed, names, invocations, *shown = (text + "\n").split("----\n")
        if not shown:  # no unit has an invocation
            shown, invocations = [invocations], ""
        ids = dict(zip(names.splitlines(), invocations.split(), strict=False))
        more = {}
        for each in shown[0].split("\n\n"):
            properties = parse_properties(each)
            more[properties.get("Id", "")] = properties
        states = cls()
        for line in listed.splitlines():
            name, _, active, sub = (line.split() + [""] * 4)[:4]
            if name:
                known = more.get(name, {})
                invocation = known.get("InvocationID") or ids.get(name, "")
                states[name] = UnitState(name, active, sub, invocation, known)
        return states


def unit_states(
    run: Callable[[Command, float], CommandResult],
    *,
    where: str,
    names: Iterable[str] = (),
    settle: float = SETTLE,
) -> UnitStates:
    """Ask systemd for all units, when no job is queued any more; after `settle` seconds anyway.

    Of `names`, and of what has failed, the properties are asked as well. Raises `MachineError` when
    systemd does not answer.
    """
    text = _READ
    for key, value in {
        "tries": str(round(settle * 5)),
        "names": ",".join(_NAMES),
        "types": _TYPES,
    }.items():
        text = text.replace(f"@{key}@", value)
    argv = ["bash", "-c", text, "nixvm-units", *sorted(set(names))]
    shown = run(argv, settle + READ_TIMEOUT)
    states = UnitStates.parse(shown.stdout) if "----" in shown.stdout else UnitStates()
    if not states:
        said = shown.stderr.strip() or f"exit status {shown.returncode}"
        raise MachineError(f"systemd on {where} does not tell the states of its units: {said}")
    return states


# --- before and after -------------------------------------------------------------------------


@dataclass(frozen=True)
class Happened:
    """What became of the units between two times, by systemd's own account; names, sorted.

    A unit without processes (a timer, a mount) counts as restarted or reloaded only where the dry
    run has named it: of others, only that they were started or stopped is known.
    """

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
        what = _became(before.get(name), after.get(name))
        if what is not None and name not in _BOOKKEEPING:
            found.setdefault(what, set()).add(name)
    failed = set(after.failed) - set(before.failed)
    names = {what: tuple(sorted(units)) for what, units in found.items()}
    return Happened(newly_failed=tuple(sorted(failed)), **names)


def _became(old: UnitState | None, new: UnitState | None) -> str | None:
    was = old is not None and old.is_active
    if new is None:
        return "stopped" if was else None  # systemd has forgotten it
    if old is None or not was:
        if new.is_active:
            return "started"
        return "ran" if _anew(old, new) else None
    if not new.is_active:
        return "ran" if new.failed else "stopped"
    if _anew(old, new):
        return "restarted"
    changed = [unit.shown.get("StateChangeTimestampMonotonic", "") for unit in (old, new)]
    settled = old.active == new.active == "active"
    return "reloaded" if settled and all(changed) and changed[0] != changed[1] else None


def _anew(old: UnitState | None, new: UnitState) -> bool:
    if old is None:
        return bool(new.invocation)
    known = bool(new.invocation) and (bool(old.invocation) or not old.is_active)
    return known and old.invocation != new.invocation


def what_became(
    ask: Callable[[Iterable[str]], UnitStates], promised: DryRun, before: UnitStates
) -> tuple[UnitStates, Happened]:
    """Ask for the states now, with all properties that `surprises` needs, and compare."""
    after = ask(promised.named)
    became = happened(before, after)
    if more := unpromised(promised, became):
        # Most switches have none of these.
        shown = ask((*promised.named, *more))
        after.update((name, shown[name]) for name in more if name in shown)
    return after, became


def unpromised(promised: DryRun, became: Happened) -> tuple[str, ...]:
    """Return the units that were stopped or restarted, and the dry run did not say so."""
    units = {*became.restarted, *became.stopped} - promised.named
    return tuple(sorted(name for name in units if not _OF_ITS_OWN.match(name)))


def surprises(
    promised: DryRun, became: Happened, before: UnitStates, after: UnitStates
) -> tuple[str, ...]:
    """Say where what happened is not what the dry run promised, a sentence for each.

    What the dry run can't know is none: units that come with their targets, are started on demand
    or belong to a log-in. Failures are told elsewhere. `after` has the properties of what the dry
    run has named and of what is `unpromised`.
    """
    return (
        *_broken_promises(promised, became, after),
        *_not_promised(promised, became, before, after),
    )


def _broken_promises(promised: DryRun, became: Happened, after: UnitStates) -> list[str]:
    touched = {*became.restarted, *became.started, *became.ran}
    said: list[str] = []
    for name in promised.restarted:
        unit = after.get(name)
        if name in touched or unit is None or unit.failed or unit.skipped:
            continue
        if not unit.is_active:
            said.append(f"{name} was to be restarted, and was not started again ({unit.active})")
        elif unit.invocation:
            said.append(f"{name} was to be restarted, and has run on as it was")
    for name in sorted(set(promised.stop) - set(promised.start)):
        if name in after and after[name].is_active:
            how = "was started again" if name in touched else "has run on"
            said.append(f"{name} was to be stopped, and {how}")
    for name in sorted(set(promised.start) - set(promised.stop)):
        unit = after.get(name)
        fine = unit is not None and (unit.is_active or unit.failed or unit.skipped)
        if not fine and name not in touched:
            state = unit.active if unit is not None else "unknown to systemd"
            said.append(f"{name} was to be started, and is {state}")
    for name in promised.reload:
        done = name in touched or name in became.reloaded or name in became.stopped
        if not done and name in after and not after[name].failed:
            said.append(f"{name} was to be reloaded, and was not")
    return said


def _not_promised(
    promised: DryRun, became: Happened, before: UnitStates, after: UnitStates
) -> list[str]:
    moved = {*became.restarted, *became.stopped, *became.ran}
    said: list[str] = []
    for name in unpromised(promised, became):
        unit = after.get(name)
        what = "restarted" if name in became.restarted else "stopped"
        if what == "stopped" and (
            before[name].active == "activating"  # it has done what it was there for
            or (unit is not None and unit.shown.get("TriggeredBy"))  # until it is wanted again
        ):
            continue
        why = ""
        if unit is not None and unit.shown.get("NRestarts", "0") != "0":
            why = ": it had ended by itself, and systemd has started it again"
        elif unit is not None and (puller := unit.pulled_by(moved)):
            why = f": it is {puller}"
        said.append(f"{name} was {what}, and the dry run did not say so{why}")
    return said
