"""The deploy as seen from here: activate there, look whether the host is well, confirm.

Whatever ends this process, the host goes back by itself: see remote.sh.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_nixvm.deploy.host import DeployError, Facts, Host, NoEndError
from pytest_nixvm.deploy.result import NOBODY, Result
from pytest_nixvm.errors import SshError
from pytest_nixvm.progress import Progress
from pytest_nixvm.wait import Deadline

MARGIN = 15.0
"""Seconds that the host waits longer than we look: a confirmation must not come too late."""

_ENDED = ("committed", "rolled-back", "rollback-failed", "overtaken")
_BACK = 1230.0  # seconds that going back may take: remote.sh's boot and test, and a little
_UNIT_GRACE = 10.0  # seconds for a unit that has failed to be started again by systemd
_CALM = 5.0  # seconds that it has to be well: much of what fails does so just after its start
_GONE_GRACE = 20.0  # seconds for the unit on the host to be there, or to say how it ended
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


class _Unwell(Exception):
    """The host is not well; the text says why."""


class _Over(Exception):
    """The host has come to an end by itself."""


class Deploy:
    """One deploy to one host.

    Deploy(host, plan, progress).run(host.facts("preflight"), copy)

    `copy` puts the system into the host's store.

    `pause` is the time between two looks at the host, in seconds.
    """

    def __init__(self, host: Host, plan: Plan, progress: Progress, *, pause: float = 1.0) -> None:
        self._host = host
        self._plan = plan
        self._progress = progress
        self._pause = pause
        self._before = Facts({}, ())
        self._id = secrets.token_hex(8)  # tells this deploy from others to the same host

    def run(self, before: Facts, copy: Callable[[], None]) -> Result:
        """Deploy; `before` is what the host has said of itself.

        Raises:
            SshError, DeployError: nothing was activated, nor will it be.
        """
        self._before, plan = before, self._plan
        if before["profile"] == plan.toplevel and plan.toplevel == before["current"]:
            return self._result("unchanged", before)
        try:
            self._host.call("root_for", plan.toplevel)
            copy()
        except BaseException:
            self._release()
            raise
        try:
            return self._switch()
        except KeyboardInterrupt:
            why = "it was interrupted"
            try:
                return self._go_back(why, interrupted=True)
            except KeyboardInterrupt:  # once more: nobody wants to wait
                return self._result("unknown", Facts({}, ()), why, interrupted=True)

    def _switch(self) -> Result:
        plan = self._plan
        step = self._progress.step("Activating" if not plan.boot else "Setting the boot default")
        try:
            self._start()
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

    def _start(self) -> None:
        plan = self._plan
        try:
            self._host.call(
                "start",
                "boot" if plan.boot else "test",
                plan.toplevel,
                str(int(plan.switch_timeout)),
                str(int(plan.timeout + MARGIN)),
                plan.reason,
                self._id,
            )
        except SshError as error:  # it may be under way all the same
            raise _Unwell(str(error)) from None
        except DeployError:
            self._release()
            raise

    def _release(self) -> None:
        """Drop the roots that keep both systems, unless somebody is at work on the host."""
        with contextlib.suppress(SshError, DeployError):
            self._host.call("release", timeout=10)

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
        calm: Deadline | None = None
        while True:
            why = self._what_is_wrong(() if calm else self._plan.checks)
            if why:
                calm = None
                if deadline.expired or (why.startswith("units failed") and grace.expired):
                    raise _Unwell(why)
            elif calm is None:
                calm = Deadline(min(_CALM, self._plan.timeout / 2))
            if calm is not None and calm.expired:
                return
            time.sleep(self._pause)

    def _what_is_wrong(self, checks: Sequence[str]) -> str:
        try:
            facts = self._look()
            if facts["current"] != self._plan.toplevel:
                return f"{facts['current']} runs, which is not what was activated"
            if facts["silent"]:
                return "systemd does not answer"
            if facts.failed:
                return f"units failed: {', '.join(facts.failed)}"
            for command in checks:
                try:
                    ended = self._host.check(command, timeout=_CHECK_TIMEOUT)
                except NoEndError:
                    return f"the check {command!r} did not end within {_CHECK_TIMEOUT:g} s"
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
            facts = self._host.facts()
            # Of a deploy before this one, or of one that came after it: neither says what became
            # of this one.
            return facts if facts["id"] == self._id else facts.without("state", "busy")
        except DeployError as error:  # as good as no answer
            # A host that was restarted has lost remote.sh, as all that was in /run.
            with contextlib.suppress(SshError, DeployError):
                self._host.upload()
            raise SshError(str(error)) from None

    def _confirm(self) -> None:
        """Confirm. Where the answer is lost, or it came too late, the host's state decides."""
        with contextlib.suppress(SshError, DeployError):
            self._host.call("confirm", self._plan.toplevel, self._id)

    def _go_back(self, reason: str, *, interrupted: bool = False) -> Result:
        step = self._progress.step("Going back to the old generation")
        try:
            result = self._end(
                self._plan.timeout + MARGIN + _BACK, reason, interrupted=interrupted, abort=True
            )
        except BaseException:
            step.fail()
            raise
        (step.finish if result.outcome == "rolled-back" else step.fail)()
        return result

    def _end(
        self, seconds: float, reason: str = "", *, interrupted: bool = False, abort: bool = False
    ) -> Result:
        """Wait until the host says what has become of it, and tell that.

        With `abort` it is asked to go back first, which it may have to be more than once.
        """
        deadline = Deadline(seconds)
        gone: Deadline | None = None
        why = ""
        while not deadline.expired:
            try:
                if abort:
                    # One line: what ssh says may have several.
                    self._host.call("abort", " ".join(reason.split()), self._id, timeout=20)
                    abort = False
                facts = self._facts()
            except (SshError, DeployError) as error:
                why = str(error)
                if isinstance(error, DeployError):  # a host that was restarted has lost remote.sh
                    with contextlib.suppress(SshError, DeployError):
                        self._host.upload()
            else:
                outcome = None if facts["busy"] else self._outcome(facts)
                if outcome is not None:
                    if not facts["state"]:  # so its unit did not do that
                        self._release()
                    return self._result(outcome, facts, reason, interrupted=interrupted)
                if facts["busy"]:
                    gone = None
                elif gone is None:
                    gone = Deadline(_GONE_GRACE)
                elif gone.expired:
                    why = f"{NOBODY}, and it runs {facts['current']}."
                    break
            time.sleep(self._pause)
        why = f"{reason.rstrip('.')}. {why}" if reason and why else reason or why
        return self._result("unknown", Facts({}, ()), why, interrupted=interrupted)

    def _outcome(self, facts: Facts) -> str | None:
        """Return what has become of it where nobody is at work there, None if that is not clear."""
        if facts["state"] in _ENDED:
            return facts["state"]
        if not facts["state"]:  # it never began, or the host was restarted: /run is empty
            if facts["current"] == facts["profile"] == self._plan.toplevel:
                return "committed"
            if facts["current"] in (self._before["current"], self._before["profile"]):
                return "rolled-back"
        return None

    def _result(
        self, outcome: Any, facts: Facts, reason: str = "", *, interrupted: bool = False
    ) -> Result:
        output = booted = ""
        if outcome == "rolled-back" and not facts["state"]:
            reason = reason or "it was restarted"
            if facts["current"] != self._before["current"]:
                booted = facts["current"]
        if outcome in ("rolled-back", "rollback-failed") and facts["state"]:
            with contextlib.suppress(SshError, DeployError):
                output = self._host.call("output")
        return Result(
            self._plan.name,
            str(self._host.target),
            outcome,
            self._before["current"],
            self._plan.toplevel,
            facts["generation"],
            "" if outcome in ("committed", "unchanged") else reason or facts["reason"],
            output,
            interrupted,
            self._plan.boot,
            facts["loader"] == "bad",
            booted,
        )
