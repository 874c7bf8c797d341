"""systemd in the guest: what it says of units, what it does to them, and the wait for one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

from pytest_nixvm.errors import (
    ChannelError,
    CommandError,
    CommandTimeoutError,
    MachineError,
    WaitTimeoutError,
)
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.guest.waits import GuestWait, wait_in_guest

COMMAND_TIMEOUT = 60.0
"""Seconds for one call of systemctl or journalctl."""

_SUFFIX = re.compile(
    r"\.(service|socket|target|device|mount|automount|swap|path|timer|slice|scope)$"
)

# A manager of a user's own takes calls from nobody else, root included.
_AS_USER = 'export XDG_RUNTIME_DIR=/run/user/$(id -u); exec systemctl --user "$@"'

_SHOWN = ("LoadState", "ActiveState", "SubState", "Result", "Job")

# The states in which a unit is on its way to another one by itself; `hopeless` has the others.
_UNIT = r"""
unit=@unit@
systemctl=(systemctl @scope@)
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$UID}
happened() {
  local shown
  shown=$("${systemctl[@]}" show --no-pager -p @names@ -- "$unit" 2>&1) || refuse "$shown"
  case $'\n'$shown$'\n' in
    *$'\nLoadState=not-found\n'* | *$'\nLoadState=masked\n'*) ;;
    *$'\nActiveState=active\n'* | *$'\nActiveState=failed\n'*) ;;
    *$'\nActiveState=inactive\n'*)
      [[ $'\n'$shown$'\n' =~ $'\n'Job=[1-9] ]] && return 1
      ;;
    *) return 1 ;;
  esac
  printf '%s\n' "$shown"
}
"""


class Systemd:
    """systemd in one guest, or one user's own manager in it.

    `run` runs a command in the guest with a timeout in seconds, on whatever channel there is; only
    the wait for a unit gives it a string, which is bash's.
    """

    def __init__(
        self,
        run: Callable[[Command, float], CommandResult],
        *,
        where: str,
        user: str | None = None,
    ) -> None:
        self.where = where
        self.user = user
        self.run = run

    def call(self, *words: str, timeout: float = COMMAND_TIMEOUT) -> CommandResult:
        """Run systemctl, or `systemctl --user` as the user. Whatever its exit status is."""
        if self.user is None:
            return self.run(["systemctl", *words], timeout)
        return self.run(
            ["runuser", "-u", self.user, "--", "sh", "-c", _AS_USER, "sh", *words], timeout
        )

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        """Return what `systemctl show` says of a unit (all, or these), whether or not it exists.

        Raises `MachineError` when systemd does not answer.
        """
        only = [f"--property={','.join(names)}"] if names else []
        shown = self.call("show", "--no-pager", *only, "--", full_name(unit))
        if not shown.ok:
            raise self.no_answer(shown.stderr)
        return parse_properties(shown.stdout)

    def failed_units(self) -> tuple[str, ...]:
        """Return the names of the units that have failed."""
        listed = self.call("list-units", "--failed", "--plain", "--no-legend", "--full")
        return tuple(line.split()[0] for line in listed.stdout.splitlines() if line.split())

    def job(self, verb: str, unit: str, timeout: float) -> None:
        """Run a job (start, stop, restart, reload) on a unit and wait for its end.

        Raises `MachineError` with the unit's status and journal when the job fails, and
        `WaitTimeoutError` after `timeout` seconds, when the job goes on in the guest.
        """
        name = full_name(unit)
        try:
            done = self.call(verb, "--", name, timeout=timeout)
        except CommandTimeoutError:
            raise WaitTimeoutError(
                f"`systemctl {verb} {name}` on {self.where} did not end within {timeout:g} s, and "
                f"goes on.\n{self.report(name)}"
            ) from None
        if done.ok:
            return
        said = done.stderr.strip() or f"exit status {done.returncode}"
        if self._is_silent(said):
            raise self.no_answer(said)
        # The hint is to look where the report looks.
        first = said.partition("\nSee ")[0]
        raise MachineError(
            f"`systemctl {verb} {name}` on {self.where}: {first}\n{self.report(name)}"
        )

    def status(self, unit: str) -> str:
        """Return `systemctl status` of a unit, without its journal."""
        shown = self.call("status", "--no-pager", "--full", "-n", "0", "--", full_name(unit))
        return (shown.stdout.rstrip() or shown.stderr.rstrip()) + "\n"

    def matches(self, unit: str) -> list[str]:
        """Return journalctl's words for what a unit has logged, and what its manager of it."""
        name = full_name(unit)
        if self.user is None:
            return ["-u", name]
        # --user-unit would mean one of root's own.
        uid = self.run(["id", "-u", self.user], COMMAND_TIMEOUT).check().stdout.strip()
        fields = ("_SYSTEMD_USER_UNIT", "USER_UNIT")
        own, of = ([f"{field}={name}", f"_UID={uid}"] for field in fields)
        return [*own, "+", *of]

    def report(self, unit: str, lines: int = 20) -> str:
        """Return a unit's status and the end of its journal, as a person reads them.

        What can't be had is said in its place: this is for the text of another error.
        """
        try:
            status = self.status(unit)
            words = ["journalctl", "-b", "-q", "--no-pager", "-n", str(lines), *self.matches(unit)]
            logged = self.run(words, COMMAND_TIMEOUT)
        except (ChannelError, CommandError) as error:
            return f"Its status and journal could not be read: {error}"
        entries = logged.stdout.rstrip() or logged.stderr.rstrip()
        if not entries:
            return f"{status}It has logged nothing since the boot."
        return f"{status}Its journal's last lines:\n{entries}"

    def wait_for_unit(self, unit: str, timeout: float) -> None:
        """Wait until a unit is active.

        Raises `MachineError` at once when it can't become active by itself: it has failed, does not
        exist, is masked, or is inactive without a job that would start it. Raises
        `WaitTimeoutError` after `timeout` seconds. Both show `report(unit)`.
        """
        name = full_name(unit)
        text = _UNIT
        for key, value in {
            "unit": shlex.quote(name),
            "scope": "" if self.user is None else "--user",
            "names": ",".join(_SHOWN),
        }.items():
            text = text.replace(f"@{key}@", value)
        try:
            shown = wait_in_guest(
                GuestWait(f"{name} to be active", text),
                self._in_bash,
                where=self.where,
                timeout=timeout,
                saw=lambda: self.report(name),
            )
        except MachineError as error:
            if self.user is not None and self._is_silent(str(error)):
                raise self.no_answer(str(error)) from None
            raise
        if (reason := hopeless(parse_properties(shown.stdout))) is not None:
            raise MachineError(f"{name} on {self.where} {reason}.\n{self.report(name)}")

    def _in_bash(self, script: str, timeout: float) -> CommandResult:
        if self.user is None:
            return self.run(script, timeout)
        return self.run(["runuser", "-u", self.user, "--", "bash", "-c", script], timeout)

    # --- a manager that does not answer --------------------------------------------------------

    @staticmethod
    def _is_silent(said: str) -> bool:
        return "to connect to bus" in said or "not been booted with systemd" in said

    def no_answer(self, said: str) -> MachineError:
        """Build the error of a systemd that does not answer; `said` is what systemctl said."""
        said = said.strip() or "systemctl failed, and did not say why"
        if self.user is None or not self._is_silent(said):
            return MachineError(f"systemd on {self.where} does not answer: {said}")
        return MachineError(
            f"{self.user} has no systemd of their own running on {self.where}: it is there from "
            f"the user's first log-in to the last log-out, or always with `loginctl enable-linger "
            f"{self.user}` (users.users.{self.user}.linger = true)."
        )


def full_name(unit: str) -> str:
    """Return a unit's name with its suffix: ".service" if it has none, as systemctl takes it."""
    if unit.startswith("/") or _SUFFIX.search(unit):
        return unit
    return f"{unit}.service"


def parse_properties(shown: str) -> dict[str, str]:
    """Return what `systemctl show` has printed. A name that is there several times has lines."""
    found: dict[str, str] = {}
    for line in shown.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            found[name] = f"{found[name]}\n{value}" if name in found else value
    return found


def hopeless(state: Mapping[str, str]) -> str | None:
    """Say why a unit with these properties won't become active by itself; None if it may."""
    active, load = state.get("ActiveState"), state.get("LoadState")
    if active == "active":
        return None
    if load == "not-found":
        return "does not exist"
    if load == "masked":
        return "is masked"
    if active == "failed":
        result = state.get("Result")
        why = " because memory ran out" if result == "oom-kill" else ""
        return f"has failed{why} (result: {result})"
    # Job is the id of a queued job, and is left out, empty or 0 when there is none.
    if active == "inactive" and state.get("Job", "0") in ("", "0"):
        return "is inactive, and no job is waiting to start it"
    return None
