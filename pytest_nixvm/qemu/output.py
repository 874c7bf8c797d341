"""What a start script and QEMU said, for error messages."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path

from pytest_nixvm.errors import tail

_FULL = re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE)
_A_PAGE = 2 << 20  # bytes, of the larger ones


def full_disk(said: str, places: Iterable[Path], status: int | None = None) -> str:
    """Return a sentence naming which of `places` is full, if that is what `said` is about.

    A `status` of SIGBUS says it as well, of memory that is a file, where one of them is.
    """
    mute = status == -signal.SIGBUS
    if not _FULL.search(said) and not mute:
        return ""
    rooms = {}
    for place in places:
        with contextlib.suppress(OSError):
            path = place
            while not path.exists():
                path = path.parent
            usage = os.statvfs(path)
            rooms[path] = (usage.f_bavail * usage.f_frsize, usage.f_blocks * usage.f_frsize)
    if not rooms:
        return ""
    fullest = min(rooms, key=lambda path: rooms[path][0])
    if mute and rooms[fullest][0] > _A_PAGE:
        return ""
    free, size = (number / (1 << 20) for number in rooms[fullest])
    return (
        f"\nThe disk is full: {fullest} has {free:.0f} of {size:.0f} MiB free. Make room, or use "
        "a directory on another disk."
    )


def read_end(path: Path, last: int = 1 << 16) -> str:
    """Return the last bytes of a file as text, "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - last))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def quote(text: str, lines: int) -> str:
    """Return the last lines of `text`, indented."""
    return "\n".join("    " + line for line in tail(text, lines).splitlines())
