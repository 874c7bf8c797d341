"""Contenders that take turns, their medians, and a table of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Contender:
    """Something that is timed. `run` does it once; what it returns is not looked at.

    `before` and `after` are not timed. A slow one takes part in each `every`th round only.
    """

    name: str
    run: Callable[[], object]
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    every: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(contenders: Sequence[Contender], rounds: int, warm_up: int = 3) -> None:
    """Let each contender run once a round."""
    for number in range(-warm_up, rounds):
        for each in contenders:
            if number % each.every:
                continue
            each.before()
            start = time.perf_counter()
            each.run()
            took = time.perf_counter() - start
            each.after()
            if number >= 0:
                each.seconds.append(took)


def show(
    title: str, contenders: Sequence[Contender], base: Contender, limit: float | None = None
) -> None:
    """Print the medians, and how many times each is the base's (and the limit's)."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for heading in ("median ms", "5 %", "95 %", f"× {base.name}"):
        table.add_column(heading, justify="right")
    if limit is not None:
        table.add_column("× limit", justify="right")
    table.add_column("note")
    for each in contenders:
        ordered = sorted(each.seconds)
        low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
        row = [each.name, *(f"{1000 * value:.1f}" for value in (each.median, low, high))]
        row.append(f"{each.median / base.median:.1f}")
        if limit is not None:
            row.append(f"{each.median / limit:.1f}")
        table.add_row(*row, each.note)
    Console(width=140, highlight=False).print(table)
