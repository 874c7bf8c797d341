"""What a test script tells whoever reads its output: nested, with the time since it began."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__tracebackhide__ = True  # the script's own lines are what its author reads


class ScriptLog:
    """The `log` of a test script. Lines go to stdout, which pytest shows for a test that failed.

        [   0.0] subtest: users log in
        [   0.1]     machine.succeed('id alice')
        [   0.1] (finished: subtest: users log in, in 0.12 seconds)

    For any thread; each has its own nesting.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._level = threading.local()

    def log(self, message: str, attributes: Mapping[str, str] | None = None) -> None:  # noqa: ARG002 - the driver's signature
        """Print a message."""
        indent = " " * 4 * getattr(self._level, "value", 0)
        head = f"[{time.monotonic() - self._began:6.1f}] "
        lines = message.splitlines() or [""]
        rest = "".join(f"\n{' ' * len(head)}{indent}{line}" for line in lines[1:])
        print(f"{head}{indent}{lines[0]}{rest}", flush=True)

    def info(self, *args: object) -> None:
        """Print a message."""
        self.log(" ".join(map(str, args)))

    debug = info

    def warning(self, *args: object) -> None:
        """Print a warning."""
        self.info("warning:", *args)

    def error(self, *args: object) -> None:
        """Print an error. The script goes on."""
        self.info("error:", *args)

    def log_serial(self, message: str, machine: str) -> None:
        """Print a line as if it came from a machine's serial console."""
        self.log(f"{machine} # {message}")

    @contextmanager
    def nested(self, message: str, attributes: Mapping[str, str] | None = None) -> Iterator[None]:  # noqa: ARG002 - the driver's signature
        """Print a message; what is printed in the block is one level deeper; then how long."""
        self.log(message)
        level = getattr(self._level, "value", 0)
        self._level.value = level + 1
        began = time.monotonic()
        ended = "failed"
        try:
            yield
            ended = "finished"
        finally:
            self._level.value = level
            self.log(f"({ended}: {message}, in {time.monotonic() - began:.2f} seconds)")

    @contextmanager
    def subtest(self, name: str, attributes: Mapping[str, str] | None = None) -> Iterator[None]:
        """Name a part of the test. An error of the block goes on with the part's name on it."""
        with self.nested(f"subtest: {name}", attributes):
            try:
                yield
            except Exception as error:
                self.error(f"subtest {name!r} failed: {type(error).__name__}: {error}")
                error.add_note(f"in subtest {name!r}")
                raise
