"""Which attribute is meant: where one is looked for, and what to say if there is none."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pytest_nixvm.flake.reference import attribute_path, attribute_text
from pytest_nixvm.flake.words import listed


def candidates(attribute: str, system: str) -> list[list[str]]:
    """Return where an attribute is looked for: machines first, then as nix does.

    Raises:
        FlakeError: it is no attribute path.
    """
    path = attribute_path(attribute.removeprefix("."))
    if attribute.startswith(".") or path[0] == "nixosConfigurations":
        return [path]
    machine = [["nixosConfigurations", *path]] if len(path) == 1 else []
    return [*machine, ["packages", system, *path], ["legacyPackages", system, *path], path]


def no_such_attribute(what: str, attribute: str, siblings: Sequence[Sequence[str]]) -> str:
    """Say that a flake has no such attribute, and which one was probably meant.

    `siblings` are the attributes that stand where it was looked for.
    """
    wanted = attribute_path(attribute.removeprefix("."))
    machines = sorted({p[1] for p in siblings if len(p) == 2 and p[0] == "nixosConfigurations"})
    others = [attribute_text(list(path)) for path in siblings]
    by_last_name = {path[-1]: attribute_text(list(path)) for path in siblings}
    is_machine = len(wanted) == 1 or wanted[0] == "nixosConfigurations"
    found = difflib.get_close_matches(wanted[-1], machines, 3, 0.6) if is_machine else []
    found = found or difflib.get_close_matches(attribute, others, 3, 0.7)
    found = found or [
        by_last_name[last]
        for last in difflib.get_close_matches(wanted[-1], list(by_last_name), 3, 0.7)
    ]
    text = f"{what} has no {attribute}."
    if found:
        text += f" Did you mean {' or '.join(found)}?"
    if is_machine and machines:
        text += f" Its machines are: {listed(machines)}."
    elif others and not found:
        text += f" There is: {listed(others)}."
    return text
