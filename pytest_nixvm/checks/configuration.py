"""Configuration that systemd or the kernel has read and not obeyed."""

from __future__ import annotations

from pytest_nixvm.checks.base import Checked, finding
from pytest_nixvm.guest.ignored import ignored


def ignored_configuration(checked: Checked) -> None:
    """Nothing in the configuration was silently ignored: keys, values, modules, order of units."""
    vm = checked.vm
    toplevel = checked.build.toplevel
    given = ""
    if toplevel is not None and (toplevel / "kernel-params").is_file():
        given = (toplevel / "kernel-params").read_text(errors="replace")
    found = ignored(vm.journal(priority="notice"), given)
    if found:
        raise finding(
            f"{len(found)} thing{'s' if len(found) > 1 else ''} in the configuration of "
            f"{checked.name} {'are' if len(found) > 1 else 'is'} silently ignored.",
            *map(str, found),
            todo="The machine runs without it, and nothing fails: only the journal says so.",
        )
