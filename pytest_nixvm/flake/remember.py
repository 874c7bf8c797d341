"""What earlier evaluations gave, as long as nothing they saw has changed.

A record holds the digests of every local tree that nix read. Its name covers the rest: nix and
its options, the reference, the overrides, this plugin. Damaged records count as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pytest_nixvm.flake.fingerprint import fingerprint, write_private

MODULES = Path(__file__).parent / "modules"

# Raise it whenever answers of the same question get another meaning.
_FORMAT = 1

_RECENT = 1.0  # seconds

_KEEP = 500  # records; a busy flake with ten machines adds twenty a day at most


class Memory:
    """Answers to questions about one flake, in `directory`."""

    def __init__(self, directory: Path, about: object) -> None:
        self._directory = directory
        self._about = json.dumps([_FORMAT, _plugin(), about], sort_keys=True)
        self._known: dict[str, tuple[float, str | None]] = {}

    def name(self, question: str) -> str:
        """Return a file name for a question, the same in every process."""
        text = f"{self._about}\0{question}"
        return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=20).hexdigest()

    def digests(self, urls: Iterable[str]) -> dict[str, str | None]:
        """Return the digest of each reference as it is now."""
        return {url: fingerprint(url, self._directory) for url in urls}

    def _recent(self, url: str) -> str | None:
        """Return a digest that may be a second old: a session asks for many machines at once."""
        when, digest = self._known.get(url, (-math.inf, None))
        if time.monotonic() - when > _RECENT:
            digest = fingerprint(url, self._directory)
            self._known[url] = (time.monotonic(), digest)
        return digest

    def recall(self, question: str) -> dict[str, Any] | None:
        """Return the answer if there is one and everything it was made of is unchanged."""
        path = self._directory / f"{self.name(question)}.json"
        try:
            record = json.loads(path.read_text())
            trees, answer = record["trees"], record["answer"]
            if record["question"] != question or not isinstance(answer, dict):
                return None
            if not trees or any(self._recent(url) != digest for url, digest in trees.items()):
                return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return answer

    def record(self, question: str, trees: Mapping[str, str], answer: Mapping[str, Any]) -> None:
        """Keep an answer.

        Raises:
            OSError: the cache can't be written.
        """
        text = json.dumps({"question": question, "trees": dict(trees), "answer": dict(answer)})
        write_private(self._directory / f"{self.name(question)}.json", text)
        self._prune()

    def forget(self, question: str) -> None:
        """Drop an answer that turned out to be of no use."""
        with contextlib.suppress(OSError):
            (self._directory / f"{self.name(question)}.json").unlink()

    def _prune(self) -> None:
        with contextlib.suppress(OSError):
            records = list(self._directory.glob("*.json"))
            if len(records) > _KEEP:
                records.sort(key=lambda path: path.stat().st_mtime)
                for path in records[: len(records) - _KEEP]:
                    path.unlink(missing_ok=True)


@cache
def _plugin() -> list[str]:
    """Return what identifies this plugin: its version and the Nix it ships."""
    digest = hashlib.blake2b()
    for path in sorted(path for path in MODULES.iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        version = metadata.version("pytest-nixvm")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return [version, digest.hexdigest()]
