"""What switch-to-configuration says, and what its exit statuses mean.

Both implementations are understood, the one in Perl and the one in Rust (-ng): they print the same
lines on stderr, in another order here and there. A line is taken for what it begins with; all else
is what activation scripts and checks have printed, and is kept in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

Units = tuple[str, ...]
"""Names of units, sorted."""


class Outcome(Enum):
    """How a switch ended; the value says it to a person."""

    DONE = "it went through"
    NEEDS_REBOOT = "it takes effect after a reboot only: the running init can't be switched"
    INHIBITED = "a switch inhibitor refused it: a component that can't be changed on the fly"
    CHECK_FAILED = "a pre-switch check refused it"
    BOOT_LOADER_FAILED = "the boot loader could not be installed, and nothing was activated"
    ACTIVATION_FAILED = "the activation script failed"
    UNITS_FAILED = "units failed"
    LOCKED = "another switch is under way on the machine, or was left hanging"
    UNFINISHED = "it did not end in time"
    UNREACHABLE = "the machine can't be reached any more, so nobody knows how it ended"
    ERROR = "switch-to-configuration itself failed"

    @property
    def activated(self) -> bool:
        """Whether the new configuration has been activated, with or without failures."""
        return self in (Outcome.DONE, Outcome.ACTIVATION_FAILED, Outcome.UNITS_FAILED)

    @property
    def refused(self) -> bool:
        """Whether it ended before anything was changed, the boot loader included."""
        return self in (
            Outcome.INHIBITED,
            Outcome.CHECK_FAILED,
            Outcome.BOOT_LOADER_FAILED,
            Outcome.LOCKED,
        )


@dataclass(frozen=True)
class DryRun:
    """What a switch would do: `switch-to-configuration dry-activate`.

    A unit that is stopped and started again is in `stop` and in `start`. Units that only the new
    configuration has are in none of them: they come with their targets. `keep` are changed units
    that would go on as they are (`restartIfChanged = false`).
    """

    stop: Units = ()
    start: Units = ()
    restart: Units = ()
    reload: Units = ()
    keep: Units = ()
    restarts_systemd: bool = False
    text: str = ""

    @property
    def restarted(self) -> Units:
        """The units that would run anew: restarted, or stopped and started again."""
        return _sorted({*self.restart, *(set(self.stop) & set(self.start))})

    @property
    def named(self) -> frozenset[str]:
        """All units that something would be done to."""
        return frozenset((*self.stop, *self.start, *self.restart, *self.reload))

    @property
    def is_empty(self) -> bool:
        """Whether no unit would be touched."""
        return not (self.named or self.keep or self.restarts_systemd)


@dataclass(frozen=True)
class Switched:
    """What a switch said that it does. What happened is systemd's to tell: see `unit_states`."""

    stopping: Units = ()
    starting: Units = ()
    restarting: Units = ()
    reloading: Units = ()
    kept: Units = ()  # changed, and not restarted
    new: Units = ()
    failed: Units = ()
    jobs_failed: Units = ()  # whose start, stop, restart or reload systemd reports as failed
    users_failed: tuple[str, ...] = ()  # users whose own units could not be switched
    restarts_systemd: bool = False
    checks: tuple[str, ...] = ()  # pre-switch checks that refused
    inhibitors: tuple[str, ...] = ()  # "dbus-implementation : dbus -> broker"
    snippets: tuple[str, ...] = ()  # parts of the activation script that failed
    activation_failed: bool = False


_LISTS = {
    "would stop the following units": "stop",
    "would NOT stop the following changed units": "keep",
    "would start the following units": "start",
    "would restart the following units": "restart",
    "would reload the following units": "reload",
    "stopping the following units": "stopping",
    "NOT restarting the following changed units": "kept",
    "starting the following units": "starting",
    "restarting the following units": "restarting",
    "reloading the following units": "reloading",
    "the following new units were started": "new",
    "warning: the following units failed": "failed",
}
_JOB = re.compile(r"^Failed to (?:start|stop|restart|reload) (?P<unit>[^\s:]+\.[a-z]+)(?::|$)")
_CHECK = re.compile(r"^Pre-switch check '(?P<name>[^']*)' failed")
_SNIPPET = re.compile(r"^Activation script snippet '(?P<name>[^']*)' failed")
_USER = re.compile(r"^warning: user activation for (?P<name>\S+) failed")
_CRITICAL = re.compile(r"^there are changes to critical components", re.IGNORECASE)
_INHIBITOR = re.compile(r"^\S+ : .*->.*$")

_RESTART_SYSTEMD = ("would restart systemd", "restarting systemd...")


def parse_dry_run(text: str) -> DryRun:
    """Return what `switch-to-configuration dry-activate` has said."""
    lists = _unit_lists(text)
    return DryRun(
        stop=lists.get("stop", ()),
        start=lists.get("start", ()),
        restart=lists.get("restart", ()),
        reload=lists.get("reload", ()),
        keep=lists.get("keep", ()),
        restarts_systemd=any(line.strip() in _RESTART_SYSTEMD for line in text.splitlines()),
        text=text,
    )


def parse_switch(text: str) -> Switched:
    """Return what `switch-to-configuration switch` (test, boot) has said."""
    lists = _unit_lists(text)
    lines = text.splitlines()
    return Switched(
        stopping=lists.get("stopping", ()),
        starting=lists.get("starting", ()),
        restarting=lists.get("restarting", ()),
        reloading=lists.get("reloading", ()),
        kept=lists.get("kept", ()),
        new=lists.get("new", ()),
        failed=lists.get("failed", ()),
        jobs_failed=_sorted(_all(_JOB, lines, "unit")),
        users_failed=_all(_USER, lines, "name"),
        restarts_systemd=any(line.strip() in _RESTART_SYSTEMD for line in lines),
        checks=_all(_CHECK, lines, "name"),
        inhibitors=_inhibitors(lines),
        snippets=_all(_SNIPPET, lines, "name"),
        activation_failed="Failed to run activate script" in lines,
    )


def outcome(returncode: int, text: str) -> Outcome:
    """Return what an exit status means, with what was said: 1 has several meanings."""
    lines = {line.strip() for line in text.splitlines()}
    if returncode == 0:
        return Outcome.DONE
    if "Could not acquire lock" in lines or "Could not open lock" in lines:
        return Outcome.LOCKED  # Perl's `die` makes errno the exit status, 11 here
    if "Failed to install bootloader" in lines:
        return Outcome.BOOT_LOADER_FAILED
    told = parse_switch(text)
    if told.inhibitors or "switchInhibitors" in told.checks:
        return Outcome.INHIBITED
    if told.checks or "Pre-switch checks failed" in lines:
        return Outcome.CHECK_FAILED
    known = {
        2: Outcome.ACTIVATION_FAILED,
        4: Outcome.UNITS_FAILED,
        100: Outcome.NEEDS_REBOOT,
    }
    return known.get(returncode, Outcome.ERROR)


def explain(result: Outcome, told: Switched, returncode: int | None) -> str:
    """Say in one sentence, without its stop, how a switch ended and what names it."""
    names: Mapping[Outcome, tuple[str, ...]] = {
        Outcome.INHIBITED: told.inhibitors,
        Outcome.CHECK_FAILED: told.checks,
        Outcome.ACTIVATION_FAILED: told.snippets,
        Outcome.UNITS_FAILED: told.failed or told.jobs_failed,
    }
    text = result.value
    if told.users_failed and result is Outcome.UNITS_FAILED and not told.failed:
        return f"the activation for {', '.join(told.users_failed)} failed"
    if named := names.get(result, ()):
        text += f": {', '.join(named)}"
    if result is Outcome.UNITS_FAILED and told.activation_failed:
        text += "; the activation script failed as well"
    if result is Outcome.ERROR and returncode is not None:
        text += f" (exit status {returncode})"
    return text


# --- lines ------------------------------------------------------------------------------------


def _unit_lists(text: str) -> dict[str, Units]:
    """Return the units by `_LISTS`; a line that comes twice adds to itself."""
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        head, colon, rest = line.partition(": ")
        if head == "warning":
            head, colon, rest = rest.partition(": ")
            head = f"warning: {head}"
        if colon and (what := _LISTS.get(head)) is not None:
            units = (unit.strip() for unit in rest.split(","))
            found.setdefault(what, set()).update(unit for unit in units if unit)
    return {what: _sorted(units) for what, units in found.items()}


def _all(pattern: re.Pattern[str], lines: list[str], group: str) -> tuple[str, ...]:
    found = [match[group] for line in lines if (match := pattern.match(line)) is not None]
    return tuple(dict.fromkeys(found))


def _inhibitors(lines: list[str]) -> tuple[str, ...]:
    """Return the lines between the heading of the check and its advice."""
    for number, line in enumerate(lines):
        if _CRITICAL.match(line):
            rest = lines[number + 1 :]
            return tuple(each.strip() for each in rest if _INHIBITOR.match(each.strip()))
    return ()


def _sorted(units: Iterable[str]) -> Units:
    return tuple(sorted(set(units)))
