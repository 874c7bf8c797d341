"""A difference between two generations, as lines for a person."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_nixvm.errors import FlakeError
from pytest_nixvm.flake.packages import PackageChange
from pytest_nixvm.flake.units import UnitChange
from pytest_nixvm.flake.words import listed

if TYPE_CHECKING:
    from pytest_nixvm.flake.difference import BeforeAfter, Difference
    from pytest_nixvm.flake.etc_files import Names

_SIGNS = {"added": "+", "removed": "-", "upgraded": "↑", "downgraded": "↓", "changed": "~"}
# What the switch does to a unit that runs, and to several.
_KINDS = {
    "restart": ("restarts", "restart"),
    "reload": ("reloads", "reload"),
    "keep": ("goes on as it was until it is restarted", "go on as they were until restarted"),
    "none": ("goes on", "go on"),
}


def render(difference: Difference, *, options: bool, rows: int | None) -> str:
    """Return the whole text; no list is longer than `rows` lines."""
    if difference.is_empty:
        return f"Nothing differs: both are {difference.base}."
    sections = [
        ("", _system(difference)),
        (_packages_title(difference), _packages(difference, rows)),
        ("Units", _units(difference, rows)),
        ("/etc", _names(difference.etc, rows)),
        ("Specialisations", _names(difference.specialisations, rows)),
        ("Activation does something else", _cut(list(difference.activation), rows)),
        ("Options", _options(difference, rows) if options else []),
    ]
    blocks = [
        "\n".join([f"{title}:", *(f"  {line}" for line in lines)] if title else lines)
        for title, lines in sections
        if lines
    ]
    if not any(lines for _, lines in sections):
        blocks = [
            "Nothing differs that a user would see: packages, units, /etc, kernel and activation "
            f"are the same.\n  {difference.base}\n  {difference.candidate}"
        ]
    return "\n".join(blocks)


def _system(difference: Difference) -> list[str]:
    lines = []
    if difference.release:
        lines.append(f"NixOS {_arrow(difference.release)}")
    if difference.systemd:
        lines.append(f"systemd {_arrow(difference.systemd)}: a switch executes it again")
    boot = []
    if difference.kernel:
        boot.append(f"kernel {_arrow(difference.kernel)}")
    if difference.kernel_params:
        boot.append(f"kernel parameters {_parameters(difference.kernel_params)}")
    if difference.initrd:
        boot.append("initrd")
    if difference.init:
        boot.append(f"init interface {_arrow(difference.init)}")
    if boot:
        lines.append(f"Only after a reboot: {'; '.join(boot)}")
    return lines


def _arrow(pair: BeforeAfter) -> str:
    if pair.before == pair.after:
        return f"{pair.after} (the same version, built anew)"
    return f"{pair.before or 'none'} → {pair.after or 'none'}"


def _parameters(pair: BeforeAfter) -> str:
    before, after = _words(pair.before), _words(pair.after)
    changes = [f"-{word}" for word in before if word not in after]
    changes += [f"+{word}" for word in after if word not in before]
    return " ".join(changes) or "in another order"


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def _packages_title(difference: Difference) -> str:
    before, after = difference.size_before, difference.size_after
    grown = f", {_size(after - before, sign=True)}" if before != after else ""
    return f"Packages (the whole system: {_size(before)} → {_size(after)}{grown})"


def _packages(difference: Difference, rows: int | None) -> list[str]:
    changes = difference.packages.changes
    # First what the configuration names: that is what its owner changed, or looks for.
    chosen = [change for change in changes if change.chosen]
    others = [change for change in changes if not change.chosen]
    width = min(48, max((len(_package(change)) for change in changes), default=0))
    lines = _cut([_row(change, width) for change in (*chosen, *others)], rows)
    rebuilt = difference.packages.rebuilt
    if rebuilt:
        lines.append(f"built anew in the same version: {listed(rebuilt, 8)}")
    return lines


def _row(change: PackageChange, width: int) -> str:
    size = f"  {_size(change.size, sign=True)}" if change.size else ""
    return f"{_package(change):{width}}{size}".rstrip()


def _package(change: PackageChange) -> str:
    versions = [_versions(side) for side in (change.before, change.after) if side]
    return f"{_SIGNS[change.kind]} {change.name} {' → '.join(versions)}".rstrip()


def _versions(versions: Sequence[str]) -> str:
    if tuple(versions) == ("",):
        return ""
    return ", ".join(version or "(no version)" for version in versions)


def _units(difference: Difference, rows: int | None) -> list[str]:
    units = difference.units
    own = [change for change in units.changed if not change.only_rebuilt]
    lines = [f"+ {name}" for name in units.added] + [f"- {name}" for name in units.removed]
    lines = _cut(lines + [_unit(change) for change in own], rows)
    for kind, (one, several) in _KINDS.items():
        names = [c.name for c in units.changed if c.only_rebuilt and c.kind == kind]
        if names:
            verb = one if len(names) == 1 else several
            lines.append(f"~ {listed(names, 8)}: {verb}, only for what was built anew")
    return lines


def _unit(change: UnitChange) -> str:
    differing = [*change.keys, *change.files, *(f"{key} (built anew)" for key in change.rebuilt)]
    return f"~ {change.name} {_KINDS[change.kind][0]}: {listed(differing, 6)}"


def _names(names: Names, rows: int | None) -> list[str]:
    lines = [
        *(f"+ {name}" for name in names.added),
        *(f"- {name}" for name in names.removed),
        *(f"~ {name}" for name in names.changed),
    ]
    return _cut(lines, rows)


def _options(difference: Difference, rows: int | None) -> list[str]:
    try:
        options = difference.options
    except FlakeError as error:
        return [f"can't be told: {str(error).splitlines()[0]}"]
    lines = []
    for name, (before, after) in options.items():
        lines.append(f"{name}: {_short(before)} → {_short(after)}")
    return _cut(lines, rows)


def _short(value: str | None) -> str:
    if value is None:
        return "not set"
    line = " ".join(value.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def _cut(lines: Iterable[str], rows: int | None) -> list[str]:
    every = list(lines)
    if rows is None or len(every) <= rows:
        return every
    return [*every[: rows - 1], f"… and {len(every) - rows + 1} more"]


def _size(size: int, *, sign: bool = False) -> str:
    number, unit = abs(size) / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if number < 1000:
            break
        number, unit = number / 1024, larger
    mark = ("+" if size > 0 else "-" if size < 0 else "") if sign else ""
    return f"{mark}{number:.1f} {unit}"
