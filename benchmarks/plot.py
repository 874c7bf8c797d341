"""A picture of contenders: a bar for each, over a logarithmic axis of seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, LABEL, ROW, VALUE = 720, 260, 30, 70
_OURS, _OTHERS = "#2563eb", "#a3a3a3"


def bars(title: str, values: Sequence[tuple[str, float, bool]]) -> str:
    """Return an SVG of (name, seconds, whether it is ours), in that order from the top."""
    low = 10 ** math.floor(math.log10(min(seconds for _, seconds, _ in values)))
    high = 10 ** math.ceil(math.log10(max(seconds for _, seconds, _ in values)))
    decades = round(math.log10(high / low)) or 1
    room = WIDTH - LABEL - VALUE
    top, height = 56, 56 + ROW * len(values) + 8
    rows = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-weight="bold" fill="#171717">{escape(title)}</text>',
    ]
    for decade in range(decades + 1):
        x = LABEL + room * decade / decades
        rows.append(
            f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{height - 6}" stroke="#e5e5e5"/>'
            f'<text x="{x:.1f}" y="{top - 12}" text-anchor="middle" fill="#525252" font-size="11">'
            f"{in_words(low * 10**decade)}</text>"
        )
    for at, (name, seconds, ours) in enumerate(values):
        y = top + ROW * at
        width = max(2.0, room * math.log10(seconds / low) / decades)
        rows.append(
            f'<text x="{LABEL - 10}" y="{y + 16}" text-anchor="end" fill="#171717">'
            f"{escape(name)}</text>"
            f'<rect x="{LABEL}" y="{y + 2}" width="{width:.1f}" height="{ROW - 10}" rx="2" '
            f'fill="{_OURS if ours else _OTHERS}"/>'
            f'<text x="{LABEL + width + 6:.1f}" y="{y + 16}" fill="#171717">'
            f"{in_words(seconds)}</text>"
        )
    return "\n".join([*rows, "</svg>\n"])


def in_words(seconds: float) -> str:
    """Return a time with two digits and its unit."""
    if seconds < 0.9995:
        return f"{float(f'{seconds * 1000:.2g}'):g} ms"
    return f"{float(f'{seconds:.2g}'):g} s"
