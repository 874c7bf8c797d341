"""Figures with their goals and limits: the table of them, and what goes into JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """A figure, of samples that are all in `unit`.

    `goal` is the most that it may be, or with `least` the least. `limit` is what could be reached
    at best, as it was measured in the same run; `limit_name` says what that is.
    """

    name: str
    samples: Sequence[float]
    unit: str = "ms"
    goal: float | None = None
    least: bool = False
    limit: float | None = None
    limit_name: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.median >= self.goal if self.least else self.median <= self.goal

    @property
    def spread(self) -> tuple[float, float]:
        """The 5th and the 95th percentile."""
        ordered = sorted(self.samples)
        cut = len(ordered) // 20
        return ordered[cut], ordered[-1 - cut]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        low, high = self.spread
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "5%": low,
            "95%": high,
            "goal": self.goal,
            "goal is the least": self.least,
            "met": self.met,
            "limit": self.limit,
            "limit is": self.limit_name,
            "samples": list(self.samples),
        }


@dataclass(frozen=True)
class Line:
    """The straight line through points, by least squares; `r2` is 1 where all are on it."""

    slope: float
    intercept: float
    r2: float


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """Return the line through points (x, y). Raises `ValueError` if they have fewer than two x."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(set(xs)) < 2:
        raise ValueError("a line needs two different x")
    slope, intercept = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    total = sum((y - mean) ** 2 for y in ys)
    rest = sum((y - slope * x - intercept) ** 2 for x, y in points)
    return Line(slope, intercept, 1.0 if total == 0 else 1 - rest / total)


def table(title: str, figures: Sequence[Figure]) -> Table:
    """Return the table of figures."""
    result = Table(title=title, title_justify="left")
    result.add_column("what")
    for heading in ("median", "5 %", "95 %", "runs", "goal", "limit", "× limit"):
        result.add_column(heading, justify="right")
    result.add_column("the limit is")
    for each in figures:
        low, high = each.spread
        goal = ""
        if each.goal is not None:
            goal = f"{'≥' if each.least else '≤'} {each.goal:g} {'✓' if each.met else '✗'}"
        limit = ratio = ""
        if each.limit is not None:
            limit = number(each.limit)
            ratio = f"{each.median / each.limit:.1f}" if each.limit > 0 else ""
        result.add_row(
            each.name,
            f"{number(each.median)} {each.unit}",
            number(low),
            number(high),
            str(len(each.samples)),
            goal,
            limit,
            ratio,
            each.limit_name,
        )
    return result


def number(value: float) -> str:
    """Return a number as a table has it: what is measured has no more than three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def show(title: str, figures: Sequence[Figure]) -> None:
    """Print the table of figures."""
    Console(width=150, highlight=False).print(table(title, figures))
