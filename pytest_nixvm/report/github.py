"""GitHub Actions: a summary of the step, and annotations at the failed tests.

Formats: https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm.report.account import Account


@dataclass(frozen=True)
class Failure:
    """A failed test, as much of it as a line holds; a check of --nixvm-check has no `file`."""

    nodeid: str
    file: str
    line: int
    reason: str
    folder: str = ""


def summary(failures: list[Failure], account: Account, passed: int) -> str:
    """Return the step's summary in Markdown."""
    machines = ", ".join(account.overrides) or "none"
    verdict = f"{len(failures)} failed" if failures else "all passed"
    lines = [
        f"### NixOS machines: {verdict}",
        "",
        f"{passed} tests passed; machines: {_cell(machines)}",
        "",
    ]
    if failures:
        lines += ["| failed test | reason | its folder |", "|---|---|---|"]
        lines += [
            f"| `{_cell(each.nodeid)}` | {_cell(each.reason)} | `{_cell(each.folder)}` |"
            for each in failures
        ]
        lines.append("")
    lines += ["| machine | accelerator | boots | failed units |", "|---|---|---|---|"]
    for vm in account.booted:
        boots = ", ".join(f"{seconds:.1f} s" for seconds in vm["boots"]) or "did not boot"
        units = _cell(", ".join(vm["failed_units"]))
        lines.append(f"| {_cell(vm['name'])} | {vm['accelerator']} | {boots} | {units} |")
    for name, seconds in account.cloned.items():
        lines.append(f"| {_cell(name)} | {len(seconds)} clones | | |")
    return "\n".join(lines) + "\n\n"


def annotation(failure: Failure) -> str:
    """Return the workflow command that marks a failed test in the change's view."""
    place = f"file={_property(failure.file)},line={failure.line}," if failure.file else ""
    return f"::error {place}title={_property(failure.nodeid)}::{_data(failure.reason)}"


def write_summary(text: str, environment: Mapping[str, str] = os.environ) -> None:
    """Append to the step's summary, where there is one."""
    path = environment.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)


def is_here(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a workflow of GitHub's."""
    return environment.get("GITHUB_ACTIONS") == "true"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
