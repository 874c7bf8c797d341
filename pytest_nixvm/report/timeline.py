"""What a session spent its time on: evaluations, builds, boots, tests and waits, as a picture."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from pytest_nixvm.progress import Progress, Step
from pytest_nixvm.transcript import Entry

LEAST_WAIT = 0.5
"""Seconds of a wait from which on it is shown."""

WIDTH, ROW, LABEL = 960, 18, 220
_COLOURS = {
    "Evaluating": "#8c6bb1",
    "Building": "#d95f0e",
    "Booting": "#2b8cbe",
    "test": "#41ab5d",
    "wait": "#bdbdbd",
}
_OTHER, _BAD = "#737373", "#cb181d"


@dataclass
class Span:
    """Something that took time. `began` is in seconds since the epoch."""

    kind: str
    title: str
    began: float
    seconds: float
    ok: bool = True


@dataclass
class Timeline:
    """The spans of a session, from this process and from xdist's workers. For any thread."""

    spans: list[Span] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, span: Span) -> None:
        """Take a span in."""
        with self._lock:
            self.spans.append(span)

    def add_waits(self, machine: str, entries: list[Entry]) -> None:
        """Take in the longer waits of a machine's transcript."""
        for entry in entries:
            if entry.kind == "wait" and entry.depth == 0 and entry.seconds >= LEAST_WAIT:
                title = f"{machine}: {entry.what}"
                self.add(Span("wait", title, entry.began, entry.seconds, entry.ok))

    def told(self) -> list[dict[str, Any]]:
        """Return the spans as plain data."""
        return [asdict(span) for span in self.spans]

    def hear(self, told: list[dict[str, Any]]) -> None:
        """Take in what another process has told."""
        for span in told:
            self.add(Span(**span))

    def svg(self) -> str:
        """Return the picture: a bar for each span, over one axis of seconds. Empty if no span."""
        spans = sorted(self.spans, key=lambda span: span.began)
        if not spans:
            return ""
        start = spans[0].began
        total = max(span.began + span.seconds for span in spans) - start or 1.0
        height = ROW * (len(spans) + 2)
        rows = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="11">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        ]
        room = WIDTH - LABEL - 20
        for tick in _ticks(total):
            x = LABEL + room * tick / total
            rows.append(
                f'<line x1="{x:.1f}" y1="{ROW}" x2="{x:.1f}" y2="{height}" stroke="#e5e5e5"/>'
                f'<text x="{x:.1f}" y="12" text-anchor="middle" fill="#525252">{tick:g} s</text>'
            )
        for number, span in enumerate(spans, 1):
            x = LABEL + room * (span.began - start) / total
            width = max(1.5, room * span.seconds / total)
            colour = _BAD if not span.ok else _COLOURS.get(span.kind, _OTHER)
            label = span.title if len(span.title) <= 38 else f"{span.title[:37]}…"
            y = ROW * number + 4
            rows.append(
                f"<g><title>{escape(span.title)}: {span.seconds:.2f} s"
                f"{'' if span.ok else ', failed'}</title>"
                f'<text x="{LABEL - 8}" y="{y + 10}" text-anchor="end">{escape(label)}</text>'
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 5}" '
                f'fill="{colour}" rx="2"/></g>'
            )
        return "\n".join([*rows, "</svg>\n"])


def _ticks(total: float) -> list[float]:
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600)
    step = next((step for step in steps if total / step <= 10), 7200)
    return [step * number for number in range(int(total / step) + 1)]


class Recorded:
    """A progress that keeps what it shows in a timeline."""

    def __init__(self, progress: Progress, timeline: Timeline) -> None:
        self._progress = progress
        self._timeline = timeline

    def step(self, title: str) -> Step:
        """Begin a step, shown and recorded."""
        return _RecordedStep(title, self._progress.step(title), self._timeline)

    def close(self) -> None:
        """Show nothing any more."""
        self._progress.close()


class _RecordedStep:
    def __init__(self, title: str, step: Step, timeline: Timeline) -> None:
        self._title = title
        self._step = step
        self._timeline = timeline
        self._began = time.time()
        self._start = time.monotonic()

    def update(self, detail: str, done: int | None = None, total: int | None = None) -> None:
        self._step.update(detail, done, total)

    def finish(self, detail: str = "") -> None:
        self._record(True)
        self._step.finish(detail)

    def fail(self, detail: str = "") -> None:
        self._record(False)
        self._step.fail(detail)

    def _record(self, ok: bool) -> None:
        kind = self._title.split(maxsplit=1)[0]
        seconds = time.monotonic() - self._start
        self._timeline.add(Span(kind, self._title, self._began, seconds, ok))
