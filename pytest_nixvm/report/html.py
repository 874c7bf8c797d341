"""pytest-html: the screenshot, the logs and the session's timeline, inline.

https://pytest-html.readthedocs.io/en/latest/user_guide.html#enhancing-reports
"""

from __future__ import annotations

import base64
from typing import Any

import pytest

from pytest_nixvm.report.evidence import Evidence

LONGEST = 200_000
"""Characters of a log that a page holds; the folder has all of it."""


def add(report: pytest.TestReport, found: list[Evidence]) -> None:
    """Attach what was gathered of a failed test to its row."""
    import pytest_html

    extras: list[Any] = list(getattr(report, "extras", []))
    for evidence in found:
        if evidence.screenshot is not None:
            picture = base64.b64encode(evidence.screenshot.read_bytes()).decode()
            extras.append(pytest_html.extras.png(picture, f"{evidence.machine}: screen"))
        for name in evidence.files:
            if name.endswith((".log", ".txt")):
                text = (evidence.folder / name).read_text("utf-8", "replace")
                if len(text) > LONGEST:
                    text = f"[the end of {len(text)} characters]\n{text[-LONGEST:]}"
                extras.append(pytest_html.extras.text(text, f"{evidence.machine}: {name}"))
    report.extras = extras  # type: ignore[attr-defined]
