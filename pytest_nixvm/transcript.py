"""What was done to a VM, in order: commands, waits, power, copies, with their outcome and time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

KEPT = 4096
"""Characters of each stream that an entry keeps: its end."""


@dataclass
class Entry:
    """One thing that was done. `began` is in seconds since the epoch, `seconds` how long it took.

    `kind` is "command", "wait", "power", "copy", "keys", …; `what` is as a person would write it;
    `outcome` is empty while it is under way.
    """

    kind: str
    what: str
    began: float
    channel: str = ""
    outcome: str = ""
    seconds: float = 0.0
    stdout: str = ""
    stderr: str = ""
    depth: int = 0
    ok: bool = True

    def output(self, stdout: str, stderr: str) -> None:
        """Keep the end of what a command wrote."""
        self.stdout, self.stderr = stdout[-KEPT:], stderr[-KEPT:]


@dataclass
class Transcript:
    """The entries of one VM. For any thread.

    with transcript.note("wait", "sshd.service") as entry:
        ...                             # what is noted meanwhile is one level deeper
        entry.outcome = "active"        # "done" if it is not set; an error's first line if it fails
    """

    entries: list[Entry] = field(default_factory=list)
    _depth: threading.local = field(default_factory=threading.local, repr=False)

    @contextmanager
    def note(self, kind: str, what: str, *, channel: str = "") -> Iterator[Entry]:
        """Note what the block does. An exception is noted as its outcome, and goes on."""
        depth = getattr(self._depth, "value", 0)
        entry = Entry(kind, what, time.time(), channel, depth=depth)
        self.entries.append(entry)
        self._depth.value = depth + 1
        start = time.monotonic()
        try:
            yield entry
        except BaseException as error:
            entry.ok = False
            lines = str(error).splitlines()
            entry.outcome = lines[0] if lines else type(error).__name__
            raise
        finally:
            self._depth.value = depth
            entry.seconds = time.monotonic() - start
            entry.outcome = entry.outcome or "done"

    def since(self, began: float) -> list[Entry]:
        """Return what began at `began` or later, or was still under way then."""
        return [e for e in list(self.entries) if e.began + e.seconds >= began or not e.outcome]
