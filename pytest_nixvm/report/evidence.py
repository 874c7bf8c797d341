"""What a failed test's folder holds: everything of that test's time, gathered while it is there.

Each piece is gathered by itself, in bounded time; what can't be had leaves a line that says why.
A VM with a fault, or without QEMU, is not asked anything: what it has left behind is read instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.errors import NixvmError, tail
from pytest_nixvm.guest.console import Cleaner
from pytest_nixvm.qemu.template import CONSOLE
from pytest_nixvm.transcript import Entry
from pytest_nixvm.wait import Deadline

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

TIME = 30.0
"""Seconds for all that a VM is asked."""

PATIENCE = 10.0
"""Seconds for one question."""

SLOW_BOOT = 60.0
"""Seconds of a boot from which on systemd's own account of it is kept."""

SHOWN_CONSOLE, SHOWN_COMMANDS, SHOWN_UNITS, SHOWN_JOURNAL = 8, 6, 2, 4
"""What the terminal shows: the console's lines, commands, failed units and lines of their journal.

The folder has all of it.
"""

_UPTIME = "read -r up rest </proc/uptime && echo $up"
_UNITS = (
    "systemctl list-units --failed --no-pager --full; "
    "for unit in $(systemctl list-units --failed --plain --no-legend --full | cut -d' ' -f1); do "
    # The journal of the whole boot: status has that of the last start only, which may have been
    # refused for those before.
    'echo; systemctl status --no-pager --full --lines 0 "$unit"; '
    'echo; journalctl --no-pager --quiet -b --lines 50 --unit "$unit"; done'
)
_GUEST = (
    "echo NixOS: $(cat /run/current-system/nixos-version 2>/dev/null || echo unknown); "
    "echo system: $(readlink /run/current-system); uname -srmo; systemctl --version | head -n 1"
)


@dataclass
class Mark:
    """A machine at the moment a test began to use it."""

    machine: Machine
    began: float
    uptime: float  # seconds since the guest's boot: later clock changes do not matter to it
    boots: int
    logs: dict[Path, int]  # what the console logs held already
    failed_units: tuple[str, ...] = ()

    @classmethod
    def set(cls, machine: Machine, *, fresh: bool) -> Mark:
        """Take note of a machine; `fresh` is one that was started for this test."""
        uptime = 0.0
        logs: dict[Path, int] = {}
        failed = machine.boot.failed_units if machine.boot is not None else ()
        if machine.template is not None and not machine.boots and not machine.is_up():
            # A clone that is about to wake; its template's boot is not this test's.
            uptime = machine.uptime
            shown = machine.template.directory / CONSOLE
            logs = {machine.spec.console_log: shown.stat().st_size if shown.exists() else 0}
        elif not fresh:
            try:
                uptime = float(machine.run(_UPTIME, timeout=10).stdout)
            except (NixvmError, ValueError):
                uptime = 0.0
            logs = {log: log.stat().st_size for log in console_logs(machine)}
        return cls(machine, time.time(), uptime, len(machine.boots), logs, failed)

    def console(self, *, news: bool = False) -> str:
        """Return what the console has shown since, as plain text; `news` is without its boot."""
        parts = []
        for log in console_logs(self.machine):
            cleaner = Cleaner()
            with log.open("rb") as file:
                start = self.logs.get(log, 0)
                file.seek(max(start, self.machine.settled.get(log, 0)) if news else start)
                parts.append(cleaner.feed(file.read()))
        return "".join(parts)

    def known_failures(self) -> tuple[str, ...]:
        """Return the units that had failed already: those of the boot, if that is the test's."""
        boots = self.machine.boots
        return boots[0].failed_units if self.boots == 0 and boots else self.failed_units

    def commands(self) -> list[Entry]:
        """Return what was done to the machine since."""
        began = 0.0 if not self.logs else self.began
        return self.machine.transcript.since(began)


def console_logs(machine: Machine) -> list[Path]:
    """Return the console logs of a machine, one for each power-on, in their order."""
    return sorted(machine.output.glob("console*.log"), key=lambda log: (len(log.name), log.name))


@dataclass
class Evidence:
    """What was found out of one machine; `lines` is what the terminal shows."""

    machine: str
    folder: Path
    lines: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    screenshot: Path | None = None


def gather(mark: Mark, folder: Path, *, screenshot: bool) -> Evidence:
    """Fill `folder` with what a machine has to say of a test's time. Never raises."""
    machine = mark.machine
    found = Evidence(machine.build.name, folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline = Deadline(TIME)
    silent = ""

    def keep(name: str, content: Callable[[], str]) -> str:
        try:
            text = content()
        except (NixvmError, OSError, ValueError) as error:
            text = f"[could not be had: {error}]\n"
        (folder / name).write_text(text, encoding="utf-8", errors="replace")
        found.files.append(name)
        return text

    def ask(command: str) -> str:
        nonlocal silent
        if silent or deadline.expired:
            raise ValueError(silent or f"{TIME:g} s were over")
        try:
            return machine.run(command, timeout=max(1.0, deadline.remaining(PATIENCE))).stdout
        except NixvmError as error:
            silent = str(error).splitlines()[0]  # it is not asked again
            raise

    commands = mark.commands()
    keep("console.log", mark.console)
    keep("transcript.txt", lambda: "\n".join(render(entry) for entry in commands) + "\n")
    keep("transcript.json", lambda: json.dumps([asdict(entry) for entry in commands], indent=1))
    if screenshot:
        _photograph(machine, folder, found)
    new: dict[str, list[str]] = {}  # with the end of its journal
    if machine.is_up():
        keep("journal.log", lambda: _journal(mark, ask))
        units = keep("units.txt", lambda: ask(_UNITS))
        failed = (unit for unit in _failed(units) if unit not in mark.known_failures())
        new = {unit: said_by(units, unit) for unit in failed}
        keep("guest.txt", lambda: ask(_GUEST))
        if machine.boots and machine.boots[-1].seconds > SLOW_BOOT:
            keep("blame.txt", lambda: ask("systemd-analyze; systemd-analyze blame --no-pager"))
    found.lines = _lines(machine, mark.console(news=True), commands, new)
    return found


def _photograph(machine: Machine, folder: Path, found: Evidence) -> None:
    try:
        found.screenshot = machine.qemu.screenshot(folder / "screenshot.png")
        found.files.append("screenshot.png")
    except (NixvmError, OSError):
        return  # no display, or no QEMU: then there is no picture


def _journal(mark: Mark, ask: Callable[[str], str]) -> str:
    """Return the journal since the mark, over the reboots in between.

    By the time since the boot, because a test may set the clock.
    """
    reboots = len(mark.machine.boots) - mark.boots
    parts = []
    for back in range(reboots, -1, -1):
        text = ask(f"journalctl --no-pager --quiet -o short-monotonic -b -{back} 2>&1")
        if back == reboots:
            text = "".join(_since(text, mark.uptime))
        parts.append(text)
    return "".join(parts)


def _since(text: str, uptime: float) -> list[str]:
    """Return the lines from a time on; each begins "[   12.345678] host …", or continues one."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        stamp = line[1:].partition("]")[0].strip() if line.startswith("[") else ""
        try:
            if float(stamp) >= uptime:
                return lines[number:]
        except ValueError:
            continue
    return []


def _failed(units: str) -> list[str]:
    """Return the units of a `systemctl list-units --failed` table."""
    names = []
    for line in units.splitlines():
        words = line.replace("●", " ").replace("*", " ").split()
        if len(words) > 3 and words[2] == "failed":
            names.append(words[0])
    return names


def said_by(units: str, unit: str) -> list[str]:
    """Return the last lines of a unit's journal, from the text that has the status of each."""
    lines = units.splitlines()
    headings = [at for at, line in enumerate(lines) if line.startswith(("×", "●", "*", "○"))]
    for at in headings:
        if lines[at].split()[1:3] == [unit, "-"]:
            end = next((each for each in headings if each > at), len(lines))
            status = "\n".join(lines[at:end]).strip()
            said = status.partition("\n\n")[2].splitlines()
            # What systemd has to say of it is that it failed; why, it says itself.
            return ([line for line in said if " systemd[1]: " not in line] or said)[-SHOWN_JOURNAL:]
    return []


def render(entry: Entry) -> str:
    """Return an entry of a transcript as a person reads it, with the end of its output."""
    at = time.strftime("%H:%M:%S", time.localtime(entry.began))
    via = f" [{entry.channel}]" if entry.channel else ""
    what = entry.what.replace("\n", "\n" + " " * 12)
    text = f"{at} {'  ' * entry.depth}{entry.kind}{via} {what}\n"
    text += f"{' ' * 9}{'  ' * entry.depth}-> {entry.outcome or 'under way'}, {entry.seconds:.2f} s"
    for name, stream in (("stdout", entry.stdout), ("stderr", entry.stderr)):
        if stream.strip():
            text += f"\n{' ' * 12}{name}:"
            text += "".join(f"\n{' ' * 14}{line}" for line in stream.rstrip().splitlines())
    return text


def _lines(
    machine: Machine, console: str, commands: list[Entry], new: dict[str, list[str]]
) -> list[str]:
    lines = []
    if machine.fault is not None:
        lines.append(str(machine.fault).splitlines()[0])
    if new:
        lines.append(f"newly failed units: {', '.join(new)}")
        for unit in list(new)[:SHOWN_UNITS]:
            lines += [f"    {line}" for line in new[unit]]
    said = [line for line in tail(console, SHOWN_CONSOLE).splitlines() if line.strip()]
    if said:
        lines += ["its console's last lines:", *("    " + line for line in said)]
    last = [entry for entry in commands if entry.depth == 0][-SHOWN_COMMANDS:]
    if last:
        lines.append("what was done last:")
        for entry in last:
            first = entry.what.strip().splitlines()[0] if entry.what.strip() else ""
            more = " …" if len(entry.what.strip().splitlines()) > 1 else ""
            lines.append(f"    {entry.kind} {first[:70]}{more} -> {entry.outcome[:70]}")
    return lines
