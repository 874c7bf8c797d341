"""A store with small templates in it, and processes that share it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_nixvm.store import Building, Entry, Store, key_of

MIB = 2**20
COMPONENTS = {"machine": "dev-vm", "qemu": "7.2", "memory": 1024}
KEY = key_of(COMPONENTS)
DATA = {"argv": ["qemu", "-m", "1024"], "facts": {"port": 22}}


def fill(directory: Path, size: int = 16 * MIB) -> None:
    """Write what a frozen machine leaves, most of its memory holes."""
    with (directory / "ram").open("wb") as ram:
        ram.truncate(size)
        ram.seek(3 * MIB + 5)
        ram.write(b"memory " * 1000)
    (directory / "state").write_bytes(b"state" * 99)
    (directory / "disk-0").write_bytes(b"disk" * 5000)
    (directory / "console.log").write_text("")


@contextmanager
def begun(store: Store) -> Iterator[Building]:
    """An entry that is being made; what is not sealed at the end is removed."""
    building = store.begin(KEY, COMPONENTS, timeout=5)
    assert isinstance(building, Building)
    try:
        yield building
    finally:
        building.abandon()


def make(store: Store, components: dict[str, object] | None = None) -> str:
    """Make an entry that nobody uses; return its key."""
    components = components or COMPONENTS
    building = store.begin(key_of(components), components, timeout=5)
    assert isinstance(building, Building)
    fill(building.directory)
    building.seal(DATA).close()
    return building.key


def opened(store: Store) -> Entry:
    entry = store.open(KEY, COMPONENTS)
    assert entry is not None
    return entry


class Process:
    """A Python process that has `store`, `fill` and the rest, and is told lines to run."""

    def __init__(self, directory: Path, *wrapper: str) -> None:
        program = (
            "import sys, code\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from _store import *\n"
            f"store = Store(Path({str(directory)!r}))\n"
            "def say(*words): print(*words, flush=True)\n"
            "for line in sys.stdin: exec(line)\n"
        )
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
