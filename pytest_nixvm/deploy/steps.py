"""The deploy as seen from here: activate there, look whether the host is well, confirm.

Whatever ends this process, the host goes back by itself: see remote.sh.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pytest_nixvm.deploy.host import DeployError, Facts, Host
from pytest_nixvm.errors import SshError
from pytest_nixvm.progress import Progress
from pytest_nixvm.wait import Deadline

MARGIN = 15.0
"""Seconds that the host waits longer than we look: a confirmation must not come too late."""

_ENDED = ("committed", "rolled-back", "rollback-failed")
_BACK = 660.0  # seconds that going back may take: as remote.sh has it, and a little
_UNIT_GRACE = 10.0  # seconds for a unit that has failed to be started again by systemd
_CHECK_TIMEOUT = 60.0


@dataclass(frozen=True)
class Plan:
    """What is to be done. Times are in seconds."""

    name: str
    toplevel: str
    boot: bool = False  # only make it the boot default
    timeout: float = 120.0  # from the activation's end until the host is well
    switch_timeout: float = 900.0  # for the activation
    checks: tuple[str, ...] = ()  # shell commands for the host that have to succeed
    reason: str = ""  # why it is deployed though its tests did not pass


@dataclass(frozen=True)
class Result:
    """What became of it. `outcome` is unknown where the host can't be reached any more."""

    name: str
    host: str
    outcome: Literal["committed", "unchanged", "rolled-back", "rollback-failed", "unknown"]
    old: str
    new: str
    generation: str
    reason: str = ""
    output: str = ""  # of the activation, where it did not go well
    interrupted: bool = False
    boot: bool = False

    @property
    def ok(self) -> bool:
        """Whether the host has what it was to have."""
        return self.outcome in ("committed", "unchanged")

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {**asdict(self), "ok": self.ok}


class _Unwell(Exception):
    """The host is not well; the text says why."""


class _Over(Exception):
    """The host has come to an end by itself."""


class Deploy:
    """One deploy to one host.

    Deploy(host, plan, progress).run(copy)      # copy: what puts the system into the host's store

    `pause` is the time between two looks at the host, in seconds.
    """

    def __init__(self, host: Host, plan: Plan, progress: Progress, *, pause: float = 1.0) -> None:
        self._host = host
        self._plan = plan
        self._progress = progress
        self._pause = pause
        self._before = Facts({}, ())

    def run(self, before: Facts, copy: Callable[[], None]) -> Result:
        """Deploy; `before` is what the host has said of itself.

        Raises:
            SshError, DeployError: before anything was activated.
        """
        self._before, plan = before, self._plan
        if before["profile"] == plan.toplevel and plan.toplevel == before["current"]:
            return self._result("unchanged", before["generation"])
        try:
            self._host.call("root_for", plan.toplevel)
            copy()
        except BaseException:
            with contextlib.suppress(SshError, DeployError):
                self._host.call("release", timeout=10)
            raise
        try:
            return self._switch()
        except KeyboardInterrupt:
            return self._go_back("it was interrupted", interrupted=True)

    def _switch(self) -> Result:
        plan = self._plan
        step = self._progress.step("Activating" if not plan.boot else "Setting the boot default")
        try:
            self._host.call(
                "start",
                "boot" if plan.boot else "test",
                plan.toplevel,
                str(int(plan.switch_timeout)),
                str(int(plan.timeout + MARGIN)),
                plan.reason,
            )
            if plan.boot:
                step.finish()
                return self._end(_BACK)
            self._activated()
            step.finish()
            step = self._progress.step("Looking whether the host is well")
            self._well()
            step.finish()
            step = self._progress.step("Making it the boot default")
            self._confirm()
            result = self._end(_BACK)
            (step.finish if result.ok else step.fail)()
        except _Unwell as why:
            step.fail()
            return self._go_back(str(why))
        except _Over:
            step.fail()
            return self._end(_BACK)
        except BaseException:
            step.fail()
            raise
        return result

    # --- steps -----------------------------------------------------------------------------------

    def _activated(self) -> None:
        """Wait for the end of the activation, which may well cut the network for a while."""
        deadline = Deadline(self._plan.switch_timeout + self._plan.timeout)
        silent = Deadline(self._plan.timeout)
        why = ""
        while not deadline.expired:
            try:
                facts = self._look()
            except SshError as error:
                why = str(error)
                if silent.expired:
                    raise _Unwell(
                        f"the host has not answered for {silent.seconds:g} s. {why}"
                    ) from None
            else:
                if facts["state"] == "waiting":
                    return
                silent = Deadline(self._plan.timeout)
            time.sleep(self._pause)
        raise _Unwell(f"the activation did not end in time. {why}".rstrip())

    def _well(self) -> None:
        deadline = Deadline(self._plan.timeout)
        grace = Deadline(min(_UNIT_GRACE, self._plan.timeout))
        while True:
            why = self._what_is_wrong()
            if not why:
                return
            if deadline.expired or (why.startswith("units failed") and grace.expired):
                raise _Unwell(why)
            time.sleep(self._pause)

    def _what_is_wrong(self) -> str:
        try:
            facts = self._look()
            if facts["current"] != self._plan.toplevel:
                return f"{facts['current']} runs, which is not what was activated"
            if facts.failed:
                return f"units failed: {', '.join(facts.failed)}"
            for command in self._plan.checks:
                ended = self._host.ssh(command, timeout=_CHECK_TIMEOUT)
                if ended.returncode != 0:
                    said = (ended.stderr.strip() or ended.stdout.strip()).splitlines()
                    tail = f": {said[-1]}" if said else ""
                    return f"the check {command!r} ended with {ended.returncode}{tail}"
        except SshError as error:
            return str(error)
        return ""

    def _look(self) -> Facts:
        facts = self._facts()
        if facts["state"] == "going-back" or facts["state"] in _ENDED:
            raise _Over
        if not facts["busy"] and facts["state"] != "committed":
            raise _Unwell("nobody is at work on the host any more: was it restarted?")
        return facts

    def _facts(self) -> Facts:
        try:
            return self._host.facts()
        except DeployError as error:  # as good as no answer
            # A host that was restarted has lost remote.sh, as all that was in /run.
            with contextlib.suppress(SshError, DeployError):
                self._host.upload()
            raise SshError(str(error)) from None

    def _confirm(self) -> None:
        """Confirm. Where the answer is lost, or it came too late, the host's state decides."""
        with contextlib.suppress(SshError, DeployError):
            self._host.call("confirm", self._plan.toplevel)

    def _go_back(self, reason: str, *, interrupted: bool = False) -> Result:
        step = self._progress.step("Going back to the old generation")
        try:
            with contextlib.suppress(SshError, DeployError):
                self._host.call("abort", reason, timeout=20)
            result = self._end(self._plan.timeout + MARGIN + _BACK, reason, interrupted)
        except BaseException:
            step.fail()
            raise
        (step.finish if result.outcome == "rolled-back" else step.fail)()
        return result

    def _end(self, seconds: float, reason: str = "", interrupted: bool = False) -> Result:
        """Wait until the host says what has become of it, and tell that."""
        deadline = Deadline(seconds)
        why = ""
        while not deadline.expired:
            try:
                facts = self._facts()
            except SshError as error:
                why = str(error)
            else:
                state = facts["state"]
                if state in _ENDED and not facts["busy"]:
                    return self._result(
                        state, facts["generation"], reason or facts["reason"], interrupted
                    )
                if not facts["busy"] and not state:  # restarted: /run is empty
                    back = facts["current"] == self._before["current"]
                    outcome = "rolled-back" if back else "unknown"
                    return self._result(outcome, facts["generation"], reason, interrupted)
            time.sleep(self._pause)
        return self._result("unknown", "", f"{reason} {why}".strip(), interrupted)

    def _result(
        self, outcome: Any, generation: str, reason: str = "", interrupted: bool = False
    ) -> Result:
        output = ""
        if outcome in ("rolled-back", "rollback-failed"):
            with contextlib.suppress(SshError, DeployError):
                output = self._host.call("output")
        return Result(
            self._plan.name,
            str(self._host.target),
            outcome,
            self._before["current"],
            self._plan.toplevel,
            generation,
            "" if outcome in ("committed", "unchanged") else reason,
            output,
            interrupted,
            self._plan.boot,
        )


def told(result: Result) -> str:
    """Say what became of a deploy, and what can be done now."""
    host, name = result.host, result.name
    login = f"ssh {host}"  # OpenSSH takes such a URL, with its port
    if result.outcome == "unchanged":
        return f"{host} has this {name} already, as generation {result.generation}."
    if result.outcome == "committed":
        done = "boots" if result.boot else "runs"
        return (
            f"{host} {done} {name}, generation {result.generation}"
            + (" from its next boot on.\n" if result.boot else ", also after a reboot.\n")
            + f"To go back by hand: {login} nixos-rebuild switch --rollback"
        )
    why = f" {result.reason.rstrip('.')}." if result.reason else ""
    if result.outcome == "rolled-back":
        text = f"{host} was not switched to {name}:{why}\nIt runs {result.old}, as before."
        if "only booted" in result.reason:
            text += "\nHave it booted the next time: nixvm deploy --boot."
        if result.output.strip():
            text += "\nThe activation said:\n" + _indent(result.output)
        return text
    if result.outcome == "rollback-failed":
        return (
            f"{host} was not switched to {name}:{why}\nGoing back has failed as well. Its boot "
            f"default is the old generation: reboot it.\nThe activation said:\n"
            + _indent(result.output)
        )
    return (
        f"{host} can't be reached:{why}\nIt goes back to {result.old} by itself. Look: {login} "
        "journalctl -u nixvm-deploy; a reboot brings the old generation back, too."
    )


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines()[-40:])


def difference(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Say by name what differs between two closures (store paths): + new, - gone, ~ changed."""
    left, right = _names(old), _names(new)
    lines = []
    for name in sorted(left.keys() | right.keys()):
        before, after = left.get(name, set()), right.get(name, set())
        if before == after:
            continue
        versions = [", ".join(sorted(v for v, _ in each if v)) for each in (before, after)]
        if not before:
            lines.append(f"+ {name} {versions[1]}".rstrip())
        elif not after:
            lines.append(f"- {name} {versions[0]}".rstrip())
        elif versions[0] != versions[1]:
            lines.append(f"~ {name} {versions[0] or '?'} → {versions[1] or '?'}")
        else:
            lines.append(f"~ {name}, rebuilt")
    return lines


def _names(paths: Sequence[str]) -> dict[str, set[tuple[str, str]]]:
    found: dict[str, set[tuple[str, str]]] = {}
    for path in paths:
        base = path.rpartition("/")[2]
        digest, _, full = base.partition("-")
        name, version = full, ""
        for at, letter in enumerate(full):
            if letter == "-" and full[at + 1 : at + 2].isdigit():
                name, version = full[:at], full[at + 1 :]
                break
        found.setdefault(name, set()).add((version, digest))
    return found
