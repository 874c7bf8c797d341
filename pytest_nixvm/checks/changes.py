"""The change from the deployed generation (--nixvm-from) to the candidate, and back.

One sequence on one VM, because each step costs a boot or a switch: the deployed generation runs, is
switched, rebooted, rolled back. A step is done when the first check asks for it, and each check
tells what it has seen; a check that is selected alone does the steps before it as well. When a
step has left no machine to go on with, the roll-back begins anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_nixvm.checks.base import Checked, DoesNotApply, and_more, finding
from pytest_nixvm.checks.units import excuse
from pytest_nixvm.errors import ChannelError, CheckFailedError, MachineError, NixvmError

if TYPE_CHECKING:
    from pytest_nixvm.change import Change
    from pytest_nixvm.change_result import Rebooted, SwitchResult, UnitFailure


class Steps:
    """The sequence; every step is done once."""

    def __init__(self, checked: Checked) -> None:
        self._fleet = checked.fleet
        self._name = checked.name
        self._change: Change | None = None
        self._switched: SwitchResult | None = None
        self._rebooted: Rebooted | NixvmError | None = None
        self._back: SwitchResult | None = None
        self.failed_before: frozenset[str] = frozenset()
        self.no_ssh = ""  # why nobody can log in by SSH after the reboot, though it was possible

    def close(self) -> None:
        """End the VM."""
        if self._change is not None:
            self._fleet.end(self._change.vm)
            self._change = None

    def begin(self) -> Change:
        """Return the change; the first time its machine is started."""
        if self._change is None:
            self._change = self._fleet.change(self._name)
            self.failed_before = frozenset(self._change.before.failed_units())
        return self._change

    def switched(self) -> SwitchResult:
        """Switch to the candidate, and return what became of it, whatever that is."""
        if self._switched is None:
            self._switched = self.begin().switch(check=False)
        return self._switched

    def rebooted(self) -> Rebooted:
        """Reboot into the candidate; raises what that raised each time."""
        self.switched()
        if self._rebooted is None:
            had_ssh = not self._why_no_ssh()
            try:
                self._rebooted = self.begin().reboot(check=False)
                self.no_ssh = self._why_no_ssh() if had_ssh else ""
            except MachineError as error:
                self._rebooted = error
        if isinstance(self._rebooted, NixvmError):
            raise CheckFailedError(str(self._rebooted))
        return self._rebooted

    def rolled_back(self) -> SwitchResult:
        """Go back to the deployed generation, from the candidate that runs."""
        if self._back is None:
            if isinstance(self._rebooted, NixvmError) or not self._is_up():
                self.close()  # a reboot that failed says nothing of a roll-back
                self.begin().switch(check=False)
            self.switched()
            self._back = self.begin().rollback(check=False)
        return self._back

    def _why_no_ssh(self) -> str:
        try:
            ssh = self.begin().vm.ssh
            ssh.close()  # a new log-in, as after the reboot
            _ = ssh.client
        except ChannelError as error:
            return str(error)
        return ""

    def _is_up(self) -> bool:
        return self._change is None or self._change.vm.is_up()


def _steps(checked: Checked) -> Steps:
    def begin() -> Steps:
        steps = Steps(checked)
        steps.begin()
        return steps

    return checked.once("change", begin)


def _activated(checked: Checked) -> SwitchResult:
    """Return the switch if the candidate was activated by it."""
    result = _steps(checked).switched()
    if not result.outcome.activated:
        raise DoesNotApply(
            f"{checked.name} does not run the candidate after the switch: {result.outcome.value} "
            f"(nixvm::{checked.name}::switch)."
        )
    return result


def _real(checked: Checked, failures: tuple[UnitFailure, ...]) -> list[UnitFailure]:
    """Return the failures that may be defects; warn of the others."""
    found = []
    for each in failures:
        reason = excuse(each.name, each.report, isolated=checked.isolated)
        if reason:
            checked.warn(f"{each.name} failed after the change, which is not counted: {reason}.")
        else:
            found.append(each)
    return found


def switch(checked: Checked) -> None:
    """The deployed generation can be switched to the candidate."""
    from pytest_nixvm.guest.switching import Outcome

    result = _steps(checked).switched()
    if result.needs_reboot:
        checked.warn(
            f"the change is in effect only after a reboot: {', '.join(result.reboot_reasons)}"
        )
    if result.outcome not in (Outcome.DONE, Outcome.UNITS_FAILED, Outcome.NEEDS_REBOOT):
        raise CheckFailedError(result.text())
    if result.ignored:  # a failure of its own: ignored-configuration
        checked.warn("silently ignored by the switch: " + "; ".join(result.ignored))
    if result.surprises:
        checked.warn("not as the dry run had promised: " + "; ".join(result.surprises))


def newly_failed_units(checked: Checked) -> None:
    """No unit fails by the switch that had not failed before."""
    result = _activated(checked)
    found = _real(checked, result.newly_failed)
    if found:
        raise finding(
            f"The switch of {checked.name} makes {and_more(each.name for each in found)} fail.",
            *(each.text() for each in found),
            f"switch-to-configuration ended with exit status {result.returncode}.",
            todo="Under the deployed generation it had not failed.",
        )


def reachable_after_switch(checked: Checked) -> None:
    """Every way into the machine that worked before the switch works after it: SSH, the agent."""
    result = _steps(checked).switched()
    if result.outcome.refused:
        _activated(checked)
    if result.lost_channels:
        raise finding(
            f"The switch locks you out of {checked.name}.",
            *result.lost_channels,
            todo="On a real machine that is the moment at which one has to walk to it.",
        )


def reboots_into_candidate(checked: Checked) -> None:
    """After the switch a reboot comes up in the candidate; no more units fail, SSH works still."""
    result = _steps(checked).switched()
    if result.outcome.refused:
        _activated(checked)
    rebooted = _steps(checked).rebooted()
    if rebooted.generation != "candidate":
        raise CheckFailedError(
            f"{checked.name} is back after the reboot with {rebooted.generation} "
            f"({rebooted.into}), not with the candidate.\n{rebooted.text()}"
        )
    if rebooted.how == "direct":
        checked.warn(
            "the reboot was one without the boot loader: QEMU started the candidate's kernel "
            "(--nixvm-boot-loader goes through the machine's own)"
        )
    if no_ssh := _steps(checked).no_ssh:
        raise finding(
            f"After the reboot nobody can log in to {checked.name} by SSH, though it was possible "
            "after the switch.",
            no_ssh,
        )
    found = _real(checked, rebooted.failed_units)
    if found:
        raise finding(
            f"After the reboot {and_more(each.name for each in found)} of {checked.name} "
            f"{'have' if len(found) > 1 else 'has'} failed, and had not after the switch.",
            *(each.text() for each in found),
        )


def rolls_back(checked: Checked) -> None:
    """From the candidate the machine can be rolled back, and then is what it was before."""
    steps = _steps(checked)
    result = steps.switched()
    if result.outcome.refused:
        _activated(checked)
    back = steps.rolled_back()
    failed = [name for name in back.failed_units if name not in steps.failed_before]
    new = _real(checked, tuple(each for each in back.newly_failed if each.name in failed))
    stay = [name for name in failed if name not in {each.name for each in back.newly_failed}]
    if not (back.outcome.activated or back.needs_reboot) or back.lost_channels:
        raise CheckFailedError(back.text())
    if new or stay:
        parts = [each.text() for each in new]
        parts += [
            f"{name} failed by the switch, and the roll-back does not heal it" for name in stay
        ]
        raise finding(
            f"{checked.name} can be rolled back, but is not what it was before the change.",
            *parts,
            todo="State that the new version has converted is the usual reason.",
        )
