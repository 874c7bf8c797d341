"""The tests that use a VM: what each used since when, and what its failure leaves behind."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nixvm.errors import NixvmError

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.output import Output
    from pytest_nixvm.report.evidence import Evidence, Mark
    from pytest_nixvm.settings import Settings

LONGEST = 100
"""Characters of a folder's name."""


_HOME = Path(__file__).parent.parent


@dataclass
class Case:
    """One test. `folder` is None as long as nothing is in it."""

    nodeid: str
    marks: list[Mark] = field(default_factory=list)
    folder: Path | None = None
    failed: bool = False

    def uses(self, machine: Machine) -> bool:
        """Whether the test has used a machine."""
        return any(mark.machine is machine for mark in self.marks)

    def place(self, output: Output) -> Path:
        """Return the test's own folder, made when it is first asked for."""
        if self.folder is None:
            self.folder = output.directory(slug(self.nodeid))
        return self.folder

    def where(self, mark: Mark, output: Output) -> Path:
        """Return the folder for one machine's part: one below, if the test has several."""
        place = self.place(output)
        return place if len(self.marks) == 1 else place / mark.machine.output.name

    def fail(
        self,
        report: pytest.TestReport,
        config: pytest.Config,
        settings: Settings,
        output: Output,
    ) -> list[Evidence]:
        """Gather what there is, and put the few lines that matter into the report."""
        from pytest_nixvm.report import reproduce
        from pytest_nixvm.report.evidence import gather

        place = self.place(output)
        if self.failed:  # its teardown fails after it has: the machines' state is kept already
            (place / f"failure-{report.when}.txt").write_text(report.longreprtext)
            return []
        self.failed = True
        (place / "failure.txt").write_text(
            f"{report.nodeid}, {report.when}\n\n{report.longreprtext}\n"
        )
        again = reproduce.command(config, settings, report.nodeid)
        (place / "reproduce.txt").write_text(again + "\n")
        machines = [mark.machine for mark in self.marks]
        (place / "versions.txt").write_text(reproduce.versions(settings, machines))
        photograph = settings.screenshot != "off"
        found = [
            gather(mark, self.where(mark, output), screenshot=photograph) for mark in self.marks
        ]
        for each in found:
            add_section(report, f"{each.machine}, while this test ran", "\n".join(each.lines))
        add_section(report, "nixvm", f"everything else: {place}\nrun it again: {again}")
        report.user_properties.append(("nixvm_output", str(place)))
        return found

    def photograph(self, mark: Mark, output: Output) -> None:
        """Save a machine's screen in the test's folder, if it has one."""
        with suppress(NixvmError, OSError):
            mark.machine.qemu.screenshot(self.where(mark, output) / "screenshot.png")

    def tidy(self) -> None:
        """Remove the folder of a test that has left nothing in it."""
        if self.folder is not None:
            with suppress(OSError):
                self.folder.rmdir()


def shorten(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Leave our own code out of the traceback of an error of ours: its text says what is wrong.

    By pytest's protocol for that, which wants a name in each module on the way.
    """
    for entry in excinfo.traceback:
        if Path(str(entry.path)).is_relative_to(_HOME):
            entry.frame.f_globals.setdefault("__tracebackhide__", _is_ours)


def _is_ours(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    return isinstance(excinfo.value, NixvmError)


def add_section(report: pytest.TestReport, title: str, text: str) -> None:
    """Add a section to a failure's own text, which the terminal, junit and HTML all show."""
    if not text:
        return
    longrepr: Any = report.longrepr
    if hasattr(longrepr, "addsection"):
        longrepr.addsection(title, text)
    elif isinstance(longrepr, str):
        report.longrepr = f"{longrepr}\n{f' {title} '.center(80, '-')}\n{text}"
    else:
        report.sections.append((title, text))


def slug(nodeid: str) -> str:
    """Return a test's node id as the name of a directory: unique enough, readable, safe."""
    path, _, rest = nodeid.partition("::")
    name = f"{Path(path).stem}-{rest}" if rest else nodeid
    name = re.sub(r"[^A-Za-z0-9_.=+-]+", "-", name).strip("-.")
    return name[:LONGEST].rstrip("-.") or "test"
