"""Which systems have passed their tests: what `nixvm deploy` looks at before it touches a host.

A record belongs to a system's store path, the *real* machine's and not the one that its VM runs:
whatever would change the system gives it another path, which nothing is known of. It has the last
outcome of each test that used the machine, over all sessions.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import platformdirs
from filelock import FileLock, Timeout

from pytest_nixvm.errors import NixvmError, NotAVirtualMachineError, SettingsError
from pytest_nixvm.flake.fingerprint import write_private

FORMAT = 1

_KEEP = 500  # records
_LOCK_TIMEOUT = 30.0  # seconds; a record is written in milliseconds
_ASK_TIMEOUT = 900.0  # seconds for all evaluations at the end of a session
_STORE_NAME = re.compile(r"[0-9a-z]{32}-[0-9A-Za-z+._?=-]+")

Outcome = Literal["passed", "failed"]


@dataclass(frozen=True)
class Verdict:
    """What the tests say of one system. `when` is the newest outcome's time, seconds since 1970."""

    passed: int = 0
    failed: tuple[str, ...] = ()  # node ids
    when: float = 0.0

    @property
    def kind(self) -> Literal["passed", "failed", "none"]:
        """Whether it has passed: no test has failed last, and there is one."""
        if self.failed:
            return "failed"
        return "passed" if self.passed else "none"

    def __str__(self) -> str:
        if self.kind == "none":
            return "not tested"
        ago = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        if self.failed:
            return f"{len(self.failed)} of {self.passed + len(self.failed)} tests failed, {ago}"
        return f"{self.passed} test{'s' if self.passed != 1 else ''} passed, {ago}"


@dataclass(frozen=True)
class Record:
    """All that is kept of one system."""

    toplevel: str
    machine: str
    flake: str
    tests: Mapping[str, tuple[Outcome, float]] = field(default_factory=dict)
    forced: tuple[Mapping[str, Any], ...] = ()  # deploys in spite of it: to, reason, when

    @property
    def verdict(self) -> Verdict:
        """What the tests say."""
        failed = tuple(sorted(name for name, (how, _) in self.tests.items() if how == "failed"))
        when = max((when for _, when in self.tests.values()), default=0.0)
        return Verdict(len(self.tests) - len(failed), failed, when)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {
            "format": FORMAT,
            "toplevel": self.toplevel,
            "machine": self.machine,
            "flake": self.flake,
            "tests": {
                name: {"outcome": how, "when": when} for name, (how, when) in self.tests.items()
            },
            "forced": list(self.forced),
        }

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Read what `to_json` gave. Raises `ValueError`, `KeyError` or `TypeError` for others."""
        if data["format"] != FORMAT:
            raise ValueError("another format")
        tests: dict[str, tuple[Outcome, float]] = {}
        for name, entry in data["tests"].items():
            if entry["outcome"] not in ("passed", "failed"):
                raise ValueError("an outcome that is none")
            tests[name] = (entry["outcome"], float(entry["when"]))
        return cls(data["toplevel"], data["machine"], data["flake"], tests, tuple(data["forced"]))


class Tested:
    """The records of this user's computer; the default directory is the user's state."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or platformdirs.user_state_path("pytest-nixvm") / "tested"

    def verdict(self, toplevel: str) -> Verdict:
        """Return what the tests say of a system. What can't be read counts as not tested."""
        record = self.record(toplevel)
        return record.verdict if record is not None else Verdict()

    def record(self, toplevel: str) -> Record | None:
        """Return what is kept of a system, if anything."""
        try:
            record = Record.from_json(json.loads(self.file(toplevel).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return record if record.toplevel == toplevel else None

    def records(self) -> list[Record]:
        """Return every record, the one that was written last first."""
        found = []
        for path in self._files():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                found.append(Record.from_json(json.loads(path.read_text(encoding="utf-8"))))
        return found

    def add(
        self, toplevel: str, *, machine: str, flake: str, outcomes: Mapping[str, Outcome]
    ) -> None:
        """Take a session's outcomes into a system's record.

        Raises:
            SettingsError: the directory can't be written, or another session holds it.
        """
        now = time.time()
        new: dict[str, tuple[Outcome, float]] = {name: (how, now) for name, how in outcomes.items()}
        with self._changing(toplevel) as old:
            tests = {**(old.tests if old else {}), **new}
            forced = old.forced if old else ()
            self._write(Record(toplevel, machine, flake, tests, forced))

    def force(self, toplevel: str, *, machine: str, flake: str, to: str, reason: str) -> None:
        """Note that a system was deployed in spite of its tests. Raises as `add` does."""
        entry = {"to": to, "reason": reason, "when": time.time()}
        with self._changing(toplevel) as old:
            tests = old.tests if old else {}
            forced = (*(old.forced if old else ()), entry)
            self._write(Record(toplevel, machine, flake, tests, forced))

    @contextlib.contextmanager
    def _changing(self, toplevel: str) -> Iterator[Record | None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(self.directory / ".lock", timeout=_LOCK_TIMEOUT):
                yield self.record(toplevel)
                self._prune()
        except Timeout:
            raise SettingsError(
                f"The record of tested systems, {self.directory}, has been locked by another "
                f"session for {_LOCK_TIMEOUT:g} s."
            ) from None
        except OSError as error:
            raise SettingsError(
                f"The record of tested systems, {self.directory}, can't be written: "
                f"{error.strerror}."
            ) from error

    def _write(self, record: Record) -> None:
        text = json.dumps(record.to_json(), indent=1, ensure_ascii=True)
        write_private(self.file(record.toplevel), text + "\n")

    def file(self, toplevel: str) -> Path:
        """Return where a system's record is. Raises `ValueError` for what is no store path."""
        name = Path(toplevel).name
        if not _STORE_NAME.fullmatch(name):
            raise ValueError(f"{toplevel!r} is no store path")
        return self.directory / f"{name}.json"

    def _files(self) -> list[Path]:
        dated = []
        with contextlib.suppress(OSError):
            for path in self.directory.glob("*.json"):
                with contextlib.suppress(OSError):
                    dated.append((path.stat().st_mtime, path))
        return [path for _, path in sorted(dated, reverse=True)]

    def _prune(self) -> None:
        for path in self._files()[_KEEP:]:
            path.unlink(missing_ok=True)


class Recorder:
    """One session's tests, until they are recorded. Plain calls; knows no pytest.

    recorder = Recorder("/home/me/config", flake.real_toplevel)
    recorder.expect(["dev-vm"])                     # before anything is built: asks in a thread
    recorder.machine_used(nodeid, "dev-vm")         # in any order with what follows
    recorder.outcome(nodeid, "call", "passed")      # of each phase: setup, call, teardown
    notes = recorder.finish()                       # sentences for the terminal

    `real_toplevel` is asked twice for each machine, before its tests and after them: only where
    both answers are the same is it known which system was tested. The second is remembered by the
    evaluator unless the flake was changed meanwhile. As the first may come later than the VM's own
    build, `is_current` is asked as well, at the end: whether the VM would be the same now.
    """

    def __init__(
        self,
        flake: str,
        real_toplevel: Callable[[str], str],
        *,
        is_current: Callable[[str], bool] = lambda _: True,
        tested: Tested | None = None,
    ) -> None:
        self._flake = flake
        self._ask = real_toplevel
        self._is_current = is_current
        self._changed: set[str] = set()
        self._tested = tested or Tested()
        self._used: dict[str, set[str]] = {}  # node id -> machines
        self._outcomes: dict[str, Outcome] = {}
        self._early: dict[str, Future[str]] = {}
        self._queue: list[str] = []
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def expect(self, names: Iterable[str]) -> None:
        """Have the systems of these machines evaluated meanwhile; each once."""
        with self._lock:
            for name in map(_plain, names):
                if name not in self._early:
                    self._early[name] = Future()
                    self._queue.append(name)
            if self._queue and self._thread is None:
                # A daemon: what is not ready when Python ends is not waited for. nix goes with it.
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                name = self._queue.pop(0)
            try:
                self._early[name].set_result(self._ask(name))
            except BaseException as error:
                self._early[name].set_exception(error)

    def machine_used(self, nodeid: str, name: str) -> None:
        """Note that a test uses a machine (`dev-vm@qcow2` is dev-vm, booted from an image)."""
        self._used.setdefault(nodeid, set()).add(_plain(name))
        self.expect([name])

    def changed(self, names: Iterable[str]) -> None:
        """Note that these machines were changed while another process tested them."""
        self._changed.update(map(_plain, names))

    def outcome(self, nodeid: str, when: str, outcome: str) -> None:
        """Note how a phase of a test ended, in pytest's words.

        A test that was skipped, or fails as expected, says nothing. One that runs again, because
        a plugin repeats it, counts as it ended the last time.
        """
        if when == "setup":
            self._outcomes.pop(nodeid, None)
        if outcome == "failed":
            self._outcomes[nodeid] = "failed"
        elif when == "call" and outcome == "passed":
            self._outcomes.setdefault(nodeid, "passed")

    def finish(self, *, interrupted: bool = False) -> list[str]:
        """Write the records; return what the user should know, none if all is well.

        With `interrupted` nobody wants to wait: only failures are written, and only those of
        machines whose system is known already.
        """
        by_machine: dict[str, dict[str, Outcome]] = {}
        for nodeid, names in self._used.items():
            how = self._outcomes.get(nodeid)
            if how is None or (interrupted and how != "failed"):
                continue
            for name in names:
                by_machine.setdefault(name, {})[nodeid] = how
        notes = []
        end = time.monotonic() + (0 if interrupted else _ASK_TIMEOUT)
        for name, outcomes in by_machine.items():
            try:
                toplevel = self._early[name].result(max(0.0, end - time.monotonic()))
                if not interrupted and (
                    name in self._changed
                    or self._ask(name) != toplevel
                    or not self._is_current(name)
                ):
                    notes.append(
                        f"{name} was changed while its tests ran: they are not recorded for nixvm "
                        "deploy."
                    )
                    continue
                self._tested.add(toplevel, machine=name, flake=self._flake, outcomes=outcomes)
            except NotAVirtualMachineError:
                continue  # a bare derivation: nothing that could be deployed
            except TimeoutError:
                if not interrupted:
                    notes.append(
                        f"{name}: its tests are not recorded for nixvm deploy, for its system was "
                        f"not evaluated within {_ASK_TIMEOUT:g} s."
                    )
            except (NixvmError, ValueError) as error:
                first = str(error).partition("\n")[0]
                notes.append(f"{name}: its tests are not recorded for nixvm deploy: {first}")
        return notes


def _plain(name: str) -> str:
    return name.partition("@")[0]
