"""What a whole session leaves behind: the timeline, GitHub's summary and annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_nixvm.report import github
from pytest_nixvm.report.timeline import Span

if TYPE_CHECKING:
    from pytest_nixvm.run import Run


class Session:
    """A plugin of the process that has the terminal: it sees every test's reports."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._failures: list[github.Failure] = []
        self._passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a test's time, and why it failed."""
        self._run.record(report)
        if report.when == "call" and report.passed:
            self._passed.add(report.nodeid)
        if report.when == "call" or (report.failed and report.duration > 0):
            began = getattr(report, "start", 0.0)
            title = report.nodeid.rpartition("::")[2]
            self._run.timeline.add(Span("test", title, began, report.duration, not report.failed))
        if report.failed:
            self._passed.discard(report.nodeid)
            self._failures.append(_failure(report))

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write what the session leaves behind; the VMs have ended by now."""
        run = self._run
        if not run.account.overrides:
            return
        picture = run.timeline.svg()
        if picture and self._failures:
            run.fleet.out.file("timeline.svg").write_text(picture, encoding="utf-8")
        github.write_summary(github.summary(self._failures, run.account, len(self._passed)))
        if github.is_here():
            for failure in self._failures:
                terminalreporter.line(github.annotation(failure))

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        """Show the timeline above pytest-html's table."""
        if self._run.account.overrides:
            prefix.append(f"<h2>Timeline</h2>{self._run.timeline.svg()}")


def _failure(report: pytest.TestReport) -> github.Failure:
    file, line, _ = report.location
    if line is None:  # a check: it is in no file
        file = ""
    crash = getattr(report.longrepr, "reprcrash", None)
    reason = crash.message if crash is not None else str(report.longrepr or "")
    folder = dict(report.user_properties).get("nixvm_output", "")
    first = reason.strip().splitlines()[0] if reason.strip() else "failed"
    return github.Failure(report.nodeid, file, (line or 0) + 1, first, str(folder))
