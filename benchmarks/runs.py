"""Whole runs of pytest, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machines import FLAKE, MACHINE, MEMORY

_TEST = """
import time

import pytest


@pytest.mark.parametrize("number", range({tests}))
def test_true({fixtures}number):
    with open({stamps!r}, "a") as file:
        print(time.time(), file=file)
    {body}
"""


@dataclass(frozen=True)
class Run:
    """A run of pytest. `begins` are the first lines of its tests, seconds from the shell on."""

    seconds: float
    begins: tuple[float, ...]

    @property
    def per_test(self) -> float:
        """Seconds from the first line of a test to that of the next."""
        return (self.begins[-1] - self.begins[0]) / (len(self.begins) - 1)


class Runs:
    """Runs tests that do nothing but run a command. `cache` is what they share."""

    def __init__(self, directory: Path, arguments: list[str], cache: Path) -> None:
        self._directory = directory
        self._arguments = arguments
        self._cache = cache
        (directory / "pytest.ini").write_text("[pytest]\n")

    def run(
        self,
        tests: int,
        isolation: str = "test",
        *,
        command: str = "true",
        cache: Path | None = None,
    ) -> Run:
        """Run that many tests with the plugin."""
        arguments = [
            f"--nixvm-flake={FLAKE}", f"--nixvm-memory={MEMORY}",
            f"--nixvm-machine={MACHINE}", f"--nixvm-isolation={isolation}",
            f"--nixvm-cache={cache or self._cache}", f"--nixvm-output={self._directory / 'out'}",
            *self._arguments,
        ]  # fmt: skip
        return self._run(tests, "vm, ", f"vm.run({command!r}, check=True)", arguments, {})

    def empty_cache(self) -> Run:
        """Run one test with a cache that is empty: the machine is built and booted."""
        place = Path(tempfile.mkdtemp(prefix="first-", dir=self._directory))
        try:
            return self.run(1, cache=place)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def bare(self) -> Run:
        """Run one such test without any plugin: what Python and pytest themselves take."""
        return self._run(1, "", "pass", [], {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})

    def _run(
        self, tests: int, fixtures: str, body: str, arguments: list[str], more: dict[str, str]
    ) -> Run:
        stamps = self._directory / "stamps"
        stamps.unlink(missing_ok=True)
        text = _TEST.format(tests=tests, fixtures=fixtures, body=body, stamps=str(stamps))
        test = self._directory / "test_bench.py"
        if not test.exists() or test.read_text() != text:
            test.write_text(text)
        environment = {**os.environ, **more}
        environment.pop("PYTEST_ADDOPTS", None)
        began, clock = time.time(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test), *arguments],
            cwd=self._directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - clock
        if done.returncode != 0:
            raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        begins = tuple(float(line) - began for line in stamps.read_text().split())
        return Run(seconds, begins)
