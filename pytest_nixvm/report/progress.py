"""Progress for people: a live table on a terminal, a plain line for each step elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


class TerminalProgress:
    """Shows steps on `stream`; several may run at once, from any thread.

    `before` is called before the first line of a block is written, so that pytest's own line of
    dots can be ended. With `live` the steps under way are a table that disappears; each step that
    ended leaves one line. Without it a step leaves one line when it begins and one when it ends.
    """

    def __init__(self, stream: TextIO, *, live: bool, before: Callable[[], None]) -> None:
        self._console = Console(
            file=stream, force_terminal=live, highlight=False, soft_wrap=not live
        )
        self._before = before
        self._lock = threading.Lock()
        self._running: list[_Step] = []
        self._live: Live | None = None
        self._is_live = live

    def step(self, title: str) -> _Step:
        """Begin a step."""
        step = _Step(title, self)
        with self._lock:
            if not self._running:
                self._before()
            self._running.append(step)
            if not self._is_live:
                self._console.print(f"nixvm: {title} ...", style=None, markup=False)
            elif self._live is None:
                self._live = Live(
                    get_renderable=self._table,
                    console=self._console,
                    refresh_per_second=8,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self._live.start()
        return step

    def end(self, step: _Step, mark: str, style: str, text: str) -> None:
        """Take `step` out of the table and leave its line."""
        with self._lock:
            if step not in self._running:
                return
            self._running.remove(step)
            seconds = time.monotonic() - step.began
            line = Text.assemble((f"nixvm: {mark} ", style), step.title)
            line.append(f": {text}" if text else "")
            line.append(f" ({seconds:.1f} s)", "dim")
            self._console.print(line)
            if not self._running and self._live is not None:
                self._live.stop()
                self._live = None

    def close(self) -> None:
        """Take the live table from the screen, whatever still runs."""
        with self._lock:
            self._running.clear()
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _table(self) -> RenderableType:
        rows: list[RenderableType] = []
        for step in list(self._running):
            row = Table.grid(padding=(0, 1))
            row.add_row(
                step.spinner,
                Text(step.title, "bold"),
                Text(step.counted, "cyan"),
                Text(step.detail, "dim", overflow="ellipsis", no_wrap=True),
                Text(f"{time.monotonic() - step.began:.0f} s", "dim"),
            )
            rows.append(row)
        return Group(*rows)


class _Step:
    """One running step of a `TerminalProgress`."""

    def __init__(self, title: str, owner: TerminalProgress) -> None:
        self.title = title
        self.began = time.monotonic()
        self.detail = ""
        self.counted = ""
        self.spinner = Spinner("dots", style="cyan")
        self._owner = owner

    def update(self, detail: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is going on now."""
        self.detail = detail
        self.counted = f"{done}/{total}" if done is not None and total else ""

    def finish(self, detail: str = "") -> None:
        """End the step well."""
        self._owner.end(self, "✓", "green", detail)

    def fail(self, detail: str = "") -> None:
        """End the step badly."""
        self._owner.end(self, "✗", "red", detail)
