"""What nix says on stderr with `--log-format internal-json`.

Lines `@nix {…}` with the actions start, stop, result and msg; other lines may be mixed in (what
git prints, messages from before the logger is set up). The numbers are ActivityType and
ResultType of nix, src/libutil/logging.hh, unchanged from 2.8 to 2.34. Unknown ones are skipped.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

_COPY_PATH, _FILE_TRANSFER, _COPY_PATHS, _BUILDS, _BUILD, _SUBSTITUTE = 100, 101, 103, 104, 105, 108
_LOG_LINE, _PROGRESS, _SET_EXPECTED, _POST_BUILD_LOG_LINE = 101, 105, 106, 107

_ANSI = re.compile(r"\x1b(?:\[[0-9;:?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_WRAPPER = "/pytest_nixvm/flake/modules'"  # copied at every call, of no interest to anybody
_STORE_PATH = re.compile(r"/nix/store/[0-9a-z]{32}-([^/'\"\s]+)")


def plain(text: str) -> str:
    """Return `text` without terminal control sequences."""
    return _ANSI.sub("", text).replace("\r\n", "\n")


def first_line(text: str) -> str:
    """Return the first line that says something, without its full stop."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "").rstrip(".")


def store_name(path: str) -> str:
    """Return the readable part of a store path: `linux-6.1` of `/nix/store/…-linux-6.1.drv`."""
    match = _STORE_PATH.search(path)
    return (match[1] if match else path).removesuffix(".drv")


@dataclass(frozen=True)
class NixError:
    """One message of level "error": nix's own words, and the place they are about, if any."""

    text: str  # without "error:", trace and excerpt
    full: str  # all that was printed
    file: str | None = None
    line: int | None = None
    column: int | None = None


class Watcher(Protocol):
    """Who wants to know how it goes on: a detail, and `done` of `total` where that is known."""

    def __call__(self, detail: str, done: int | None = None, total: int | None = None) -> None:
        """Take the news."""


@dataclass
class Log:
    """Collects the messages of one nix call; `feed` it every line of stderr."""

    watch: Watcher | None = None
    write: Callable[[str], None] | None = None  # gets each line worth keeping
    errors: list[NixError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    other: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    logs: dict[str, deque[str]] = field(default_factory=dict)  # derivation → its log's tail
    now: str = ""
    _activities: dict[int, tuple[int, str]] = field(default_factory=dict)
    _counts: dict[int, tuple[int, int]] = field(default_factory=dict)  # type → done, expected
    _bytes: dict[int, tuple[int, int]] = field(default_factory=dict)  # download → done, expected
    _expected_bytes: int = 0
    _downloaded: int = 0

    def feed(self, line: str) -> None:
        """Take one line of stderr."""
        if not line.startswith("@nix "):
            self._plain_line(plain(line))
            return
        try:
            event = json.loads(line[5:])
        except ValueError:
            self._plain_line(plain(line))
            return
        if not isinstance(event, dict):
            return
        match event.get("action"):
            case "msg":
                self._message(event)
            case "start":
                self._start(event)
            case "stop":
                self._stop(event)
            case "result":
                self._result(event)
            case _:
                pass

    @property
    def error(self) -> NixError:
        """The error that ended the call: nix prints it last."""
        if self.errors:
            return self.errors[-1]
        text = "\n".join(self.other).strip() or "nix ended without saying why"
        return NixError(text, text)

    def _keep(self, line: str) -> None:
        if self.write is not None:
            self.write(line)

    def _plain_line(self, line: str) -> None:
        self._keep(line)
        if line.startswith("error: "):
            self.errors.append(NixError(line.removeprefix("error: "), line))
        elif line.startswith("warning: "):
            self.warnings.append(line.removeprefix("warning: "))
        elif line.strip():
            self.other.append(line)

    def _message(self, event: dict[str, Any]) -> None:
        full = plain(str(event.get("msg", "")))
        if event.get("level", 0) <= 3 and _WRAPPER not in full:
            self._keep(full)
        raw = event.get("raw_msg")
        if full.startswith("error:") and event.get("level") == 0:
            text = plain(str(raw)) if raw is not None else full.removeprefix("error:")
            line, column = event.get("line"), event.get("column")
            self.errors.append(
                NixError(text.strip(), full.strip(), event.get("file") or None, line, column)
            )
        elif full.startswith("warning:"):
            self.warnings.append(full.removeprefix("warning:").strip())

    def _start(self, event: dict[str, Any]) -> None:
        kind, fields = event.get("type"), event.get("fields") or []
        name = str(fields[0]) if fields else ""
        self._activities[event.get("id", 0)] = (int(kind or 0), name)
        text = plain(str(event.get("text", "")))
        if kind == _BUILD:
            self.logs.setdefault(name, deque(maxlen=200))
            self._say(f"building {store_name(name)}")
        elif kind in (_SUBSTITUTE, _COPY_PATH) and name:
            self._say(f"fetching {store_name(name)}")
        elif kind == _FILE_TRANSFER and name:
            self._say(f"downloading {name}")
        elif text.startswith(("fetching", "copying '", "evaluating")) and _WRAPPER not in text:
            self._say(text)
        if kind in (_BUILD, _SUBSTITUTE, _FILE_TRANSFER) and text:
            self._keep(text)

    def _stop(self, event: dict[str, Any]) -> None:
        identity = event.get("id", 0)
        self._activities.pop(identity, None)
        self._downloaded += self._bytes.pop(identity, (0, 0))[0]

    def _result(self, event: dict[str, Any]) -> None:
        identity, fields = event.get("id", 0), event.get("fields") or []
        kind, name = self._activities.get(identity, (0, ""))
        match event.get("type"):
            case 101 | 107 if fields:  # _LOG_LINE, _POST_BUILD_LOG_LINE
                line = plain(str(fields[0]))
                self.logs.setdefault(name, deque(maxlen=200)).append(line)
                self._keep(f"{store_name(name)}> {line}")
            case 105 if len(fields) >= 2:  # _PROGRESS
                done, expected = int(fields[0]), int(fields[1])
                if kind in (_BUILDS, _COPY_PATHS):
                    if self._counts.get(kind) != (done, expected):
                        self._counts[kind] = (done, expected)
                        self._say(self.now)
                elif kind == _FILE_TRANSFER:
                    self._bytes[identity] = (done, expected)
                    self._say(self.now)
            case 106 if len(fields) >= 2 and fields[0] == _FILE_TRANSFER:  # _SET_EXPECTED
                self._expected_bytes = int(fields[1])
            case _:
                pass

    def _say(self, detail: str) -> None:
        self.now = detail
        if self.watch is None or not detail:
            return
        done = sum(count[0] for count in self._counts.values())
        total = sum(count[1] for count in self._counts.values())
        have = self._downloaded + sum(count[0] for count in self._bytes.values())
        if self._bytes and have:
            expected = max(self._expected_bytes, have)
            detail += f" ({have / 2**20:.1f} of {expected / 2**20:.1f} MiB)"
        if total:
            self.watch(detail, done, total)
        else:
            self.watch(detail)
