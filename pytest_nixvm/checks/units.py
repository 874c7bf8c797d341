"""Units: none has failed, none is restarted over and over, Home Manager has done its work."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_nixvm.checks.base import Checked, DoesNotApply, and_more, finding
from pytest_nixvm.guest.systemd import parse_properties

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

FIRST_MINUTE = 60.0
"""Seconds after the kernel's start in which nothing should have to be restarted often."""
AGAIN = 5.0
"""Seconds between two looks at a machine that is older than that."""
RESTARTS = 3
"""So many restarts are a loop."""
LINES = 12
"""Lines of a unit's journal that are shown."""

# What programs say when they can't reach what is outside. They say it in English: services have no
# locale.
_NO_NETWORK = re.compile(
    r"could(?: not|n't) resolve|cannot resolve|unable to resolve|failed to resolve"
    r"|temporary failure in name resolution|name or service not known|no such host"
    r"|network is unreachable|no route to host|network is down|server misbehaving"
    r"|EAI_AGAIN|ENETUNREACH|EHOSTUNREACH|dns (?:lookup|resolution|query)\w* (?:failed|timed out)"
    r"|name resolution failed|dial (?:tcp|udp)\b.*(?:timeout|unreachable)",
    re.IGNORECASE,
)

# Units that look for hardware of the real machine, what they say without it, and what is missing.
_HARDWARE = (
    (
        r"systemd-modules-load\.service",
        r"Failed to insert module '[^']+': (?:Operation not supported|No such device)",
        "the hardware that the module is for",
    ),
    (r"smartd\.service", r"NO devices found|Unable to detect device type", "disks with S.M.A.R.T."),
    (r"thermald\.service", r"[Uu]nsupported (?:cpu|processor)|THD|No thermal", "thermal sensors"),
    (r"lm_sensors\.service|fancontrol\.service", r".", "sensors and fans"),
    (r"nvidia-.*\.service|.*-nvidia-.*\.service", r".", "an NVIDIA card"),
    (r"(?:tpm2|tcsd|systemd-tpm2).*\.service", r".", "a TPM"),
)


@dataclass(frozen=True)
class Trouble:
    """A unit that has failed, or does not stay up, with what it has said."""

    name: str
    what: str  # failed (result: exit-code, exit status 1)
    file: str
    said: str
    excuse: str = ""  # why it is no defect of the machine; "" if it may be one

    def __str__(self) -> str:
        lines = [f"{self.name} {self.what}" + (f", from {self.file}" if self.file else "")]
        lines += [f"    {line}" for line in self.said.splitlines()[-LINES:]]
        if not self.said.strip():
            lines.append("    It has logged nothing since the boot.")
        return "\n".join(lines)


def excuse(name: str, said: str, *, isolated: bool) -> str:
    """Say why a unit's failure is no defect of the machine, "" if it may be one."""
    if isolated and (match := _NO_NETWORK.search(said)):
        return f"it wants the network, which the VM has not ({match[0]!r}; --nixvm-network=nat)"
    for unit, words, missing in _HARDWARE:
        if re.fullmatch(unit, name) and re.search(words, said):
            return f"the VM has not what it looks for: {missing}"
    return ""


def trouble(vm: Machine, name: str, *, isolated: bool) -> Trouble:
    """Find out what has become of a unit."""
    unit = vm.unit(name)
    shown = vm.systemd().properties(
        name, "ActiveState", "SubState", "Result", "ExecMainStatus", "NRestarts", "FragmentPath"
    )
    said = "\n".join(unit.journal(lines=40).messages)
    parts = [f"result: {shown.get('Result', 'unknown')}"]
    if shown.get("ExecMainStatus", "0") != "0":
        parts.append(f"exit status {shown['ExecMainStatus']}")
    if shown.get("NRestarts", "0") != "0":
        parts.append(f"restarted {shown['NRestarts']} times")
    what = "has failed" if shown.get("ActiveState") == "failed" else "does not stay up"
    return Trouble(
        name,
        f"{what} ({', '.join(parts)})",
        shown.get("FragmentPath", ""),
        said,
        excuse(name, said, isolated=isolated),
    )


def sort_out(checked: Checked, vm: Machine, names: Iterable[str]) -> list[Trouble]:
    """Return the units that may be defects; warn of those that are none."""
    found = []
    for name in names:
        each = trouble(vm, name, isolated=checked.isolated)
        if each.excuse:
            checked.warn(f"{each.name} {each.what}, which is not counted: {each.excuse}.")
        else:
            found.append(each)
    return found


def failed_units(checked: Checked) -> None:
    """No unit has failed. Those that only miss the network or hardware are told, not counted."""
    found = sort_out(checked, checked.vm, checked.vm.failed_units())
    if found:
        names = and_more(each.name for each in found)
        raise finding(
            f"{len(found)} unit{'s have' if len(found) > 1 else ' has'} failed on "
            f"{checked.name}: {names}.",
            *map(str, found),
            todo="Each is made of systemd.services.NAME, or of the module that owns it.",
        )


def restart_loops(checked: Checked) -> None:
    """No service is restarted over and over in the first minute."""
    vm = checked.vm
    first = _restarts(vm)
    age = float(vm.run(["cat", "/proc/uptime"], check=True).stdout.split()[0])
    vm.sleep(max(FIRST_MINUTE - age, AGAIN))
    second = _restarts(vm)
    loops = [
        name
        for name, count in second.items()
        if count >= RESTARTS or count > first.get(name, count)
    ]
    found = sort_out(checked, vm, loops)
    if found:
        raise finding(
            f"{and_more(each.name for each in found)} on {checked.name} does not stay up: systemd "
            "starts it again and again.",
            *map(str, found),
            todo="systemd.services.NAME.serviceConfig.Restart only hides that it ends.",
        )


def _restarts(vm: Machine) -> dict[str, int]:
    """Return how often each service that is not given up was restarted by systemd."""
    shown = vm.systemd().call(
        "show", "--no-pager", "-p", "Id,NRestarts,ActiveState", "*.service", timeout=120
    )
    found = {}
    for block in shown.stdout.split("\n\n"):
        unit = parse_properties(block)
        if unit.get("ActiveState") != "failed" and unit.get("NRestarts", "0").isdigit():
            found[unit.get("Id", "")] = int(unit.get("NRestarts", "0"))
    return found


def home_manager(checked: Checked) -> None:
    """Home Manager, where a user has it, has activated that user's configuration."""
    users = checked.declared.home_manager
    if not users:
        raise DoesNotApply(f"{checked.name} has no user with Home Manager (home-manager.users).")
    vm = checked.vm
    wrong = []
    for user in users:
        name = f"home-manager-{_escaped(user)}.service"
        shown = vm.systemd().properties(name, "LoadState", "ActiveState", "Result")
        if shown.get("LoadState") == "not-found":
            wrong.append(f"{name} does not exist: home-manager.users.{user} has come to nothing")
        elif shown.get("ActiveState") != "active" or shown.get("Result") != "success":
            wrong += map(str, sort_out(checked, vm, [name]))
    if wrong:
        raise finding(
            f"Home Manager is not activated on {checked.name}.",
            *wrong,
            todo="A file that is in the way is the usual reason: "
            "home-manager.backupFileExtension moves it.",
        )


def _escaped(name: str) -> str:
    """Return a name as systemd.unit(5) has it in the name of a unit."""
    return re.sub(r"[^A-Za-z0-9:_.]", lambda match: rf"\x{ord(match[0]):02x}", name)
