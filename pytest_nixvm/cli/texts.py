"""How the commands write: tables, sizes, times, JSON, and errors in a line."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Sequence

import click

# What some command has as an option without its "nixvm-".
_SHORTER = ("flake", "override-input", "nix-option", "cache", "offline", "memory", "cores")
_PYTEST_S = re.compile(rf"--nixvm-(?=(?:{'|'.join(_SHORTER)})\b)")


def emit_json(value: object) -> None:
    """Write a value for scripts to read. Paths and the like become text."""
    click.echo(json.dumps(value, indent=2, default=str))


def table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()
) -> None:
    """Write a table; the columns numbered in `right` are set to the right.

    On a terminal long cells are cut by its width, elsewhere nothing is: grep and awk read it.
    """
    # Not at the top: `--help` does without.
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        made.add_column(title, no_wrap=True, overflow="ignore")
    rows = [*rows]
    # What the row is about is shown whole, however narrow the terminal.
    made.columns[0].min_width = max(map(cell_len, (titles[0], *(row[0] for row in rows))))
    for column in right:
        made.columns[column].justify = "right"
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000
    console.print(made)


def size(count: int) -> str:
    """Return bytes as a person reads them."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def when(seconds: float) -> str:
    """Return a moment (seconds since the epoch) in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def in_words_of_ours(text: str) -> str:
    """Return an error with the options as the commands have them: pytest's are --nixvm-flake, ….

    A pytest command line in it stays one.
    """
    # These commands have no other place for what they leave.
    text = text.replace(
        "--nixvm-cache and --nixvm-output name other places", "--cache names another"
    )
    text = text.replace(" --nixvm-boot-timeout sets that time.", "")  # nor one to set it
    lines = text.split("\n")
    return "\n".join(line if "pytest " in line else _PYTEST_S.sub("--", line) for line in lines)


def one_line(error: click.ClickException) -> str:
    """Return what click has to say, and where there is more."""
    text = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text += f"{'' if text.endswith(('.', '?')) else '.'} See {error.ctx.command_path} --help."
    return text
