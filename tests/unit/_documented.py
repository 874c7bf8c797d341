"""What docs/commands.md says that `--json` writes."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "commands.md"


def documented(command: str) -> set[str]:
    """Return the names in the row of a command, those of a list in it (in brackets) left out."""
    [row] = [
        cells[1]
        for line in GUIDE.read_text().partition("## `--json`")[2].splitlines()
        if len(cells := line.strip("| ").split(" | ", 1)) == 2 and command in cells[0].split(", ")
    ]
    return set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", row)))
