"""What pytest's terminal says of the VMs: a header before the tests, a few lines after them."""

from __future__ import annotations

import contextlib
import platform
import shutil
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nixvm.errors import UserError

if TYPE_CHECKING:
    import pytest

    from pytest_nixvm.run import Run

TCG_COST = "software emulation: expect boots of 10 s and more, several times slower than KVM"


def header(run: Run) -> list[str]:
    """Return the header's lines: the flake, how guests run, what Nix needed."""
    settings = run.settings
    if settings.flake is None or run.is_worker:
        return []
    lines = [f"nixvm: flake {settings.flake}, isolation {settings.isolation}"]
    if settings.from_ is not None:
        lines.append(f"nixvm: deployed generation {settings.from_}")
    if run.is_controller:  # which collects nothing itself
        lines += left_out(run)
    lines.append(f"nixvm: accelerator {_accelerator(run)}")
    with contextlib.suppress(UserError):  # said as a usage error as soon as a test needs it
        lines += [f"nixvm: {note}" for note in run.fleet.nix.notes]
    return lines


def left_out(run: Run) -> list[str]:
    """Return what is said behind the number of collected tests: the machines that are unchanged."""
    unchanged = run.fleet.unchanged if run.nothing_changed else ()
    if not unchanged or run.is_worker:
        return []
    names = ", ".join(unchanged)
    return [f"nixvm: unchanged since {run.settings.changed}, left out: {names}"]


def _accelerator(run: Run) -> str:
    from pytest_nixvm.qemu.accelerator import choose

    settings = run.settings
    qemu = shutil.which(f"qemu-system-{platform.machine()}")
    if qemu is None:
        return f"{settings.accel} (tried with the first machine's own QEMU)"
    try:
        found = choose(Path(qemu), settings.accel, settings.cache)
    except UserError as error:
        return f"{settings.accel} ({error})"
    text = f"{found.name} ({found.reason})"
    return f"{text}; {TCG_COST}" if found.name == "tcg" else text


def _short(seconds: float) -> str:
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "less than 1 ms"


def summary(reporter: pytest.TerminalReporter, run: Run) -> None:
    """Write one line for each VM that was booted, and one for each machine that was cloned."""
    account = run.account
    if run.is_worker or not account.overrides or reporter.verbosity < 0:
        return
    reporter.section("nixvm")
    for vm in account.booted:
        steps = []
        if vm["evaluated"] >= 0.05:
            steps.append(f"evaluated in {vm['evaluated']:.1f} s")
        if vm["built"] >= 0.05:
            steps.append(f"built in {vm['built']:.1f} s")
        booted = [f"{seconds:.1f} s" for seconds in vm["boots"]]
        steps.append(f"booted in {', '.join(booted)}" if booted else "did not boot")
        if vm["frozen"]:
            steps.append("frozen")
        line = f"{vm['name']} ({vm['accelerator']}): {', '.join(steps)}; output: {vm['output']}"
        reporter.line(line)
        if vm["commands"]:
            reporter.line(f"    {vm['commands']}", yellow=True)
        if vm["failed_units"]:
            reporter.line(f"    failed units: {', '.join(vm['failed_units'])}", yellow=True)
    for name, seconds in account.cloned.items():
        middle = statistics.median(seconds)
        clones = "1 clone" if len(seconds) == 1 else f"{len(seconds)} clones"
        reporter.line(f"{name}: {clones}, ready after {_short(middle)} (median)")
    for name, reason in account.unfreezable.items():
        text = f"{name}: each test booted a VM of its own, for it can't be frozen: {reason}"
        reporter.line(text, yellow=True)
    for name in account.alike:
        text = (
            f"{name}: its clones may draw the same random numbers: its kernel does not know "
            "vmgenid (Linux 5.18, CONFIG_VMGENID), and it has neither perl nor python3"
        )
        reporter.line(text, yellow=True)
    for name, overrides in account.overrides.items():
        for override in overrides:
            reporter.line(f"{name} was not as configured: {override}", yellow=True)
    for note in account.notes:
        reporter.line(note, yellow=True)
    for lines in account.kept:
        for line in lines:
            reporter.line(line, bold=not line.startswith(" "))
    if run.settings.fidelity:
        _fidelity(reporter, run)


def _fidelity(reporter: pytest.TerminalReporter, run: Run) -> None:
    """Say for each machine that ran what its VM does not test: in short here, all in a file."""
    from pytest_nixvm.errors import NixvmError
    from pytest_nixvm.fidelity import lines, text

    whole = ""
    for name in run.account.overrides:
        try:
            entries = run.fleet.fidelity(name)
        except NixvmError as error:
            reporter.line(f"{name}: what it does not test can't be told: {error}", yellow=True)
            continue
        reporter.section(f"not tested of {name}", sep="-")
        for line in lines(entries):
            reporter.line(line)
        whole += f"{name}\n{'=' * len(name)}\n\n{text(entries)}\n"
    if whole:
        place = run.fleet.out.file("fidelity.txt")
        place.write_text(whole, encoding="utf-8")
        reporter.line(f"With the reasons: {place}")
