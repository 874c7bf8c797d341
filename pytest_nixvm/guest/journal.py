"""The guest's journal: as typed entries, and as the text that a report keeps.

The format is systemd's "Journal JSON Format" (https://systemd.io/JOURNAL_EXPORT_FORMATS): one
object a line; a value is a string, an array of bytes where it is not UTF-8, an array of such values
where a field is there several times, and null where it was too long to be shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pytest_nixvm.errors import MachineError
from pytest_nixvm.guest.result import Command, CommandResult

TIMEOUT = 120.0
"""Seconds for one reading of the journal."""

Since = datetime | float | str
"""A time with its zone, seconds since the epoch, or what systemd.time(7) takes ("-5min")."""

# What a process has just written may still be on its way to journald. That logs the request, which
# is nothing that the reader of the journal has done, and is left out.
_FLUSHED = 'journalctl --sync 2>/dev/null; exec "$@"'
_FLUSH_LOGGED = re.compile(
    r"^.* systemd-journald\[\d+\]: Received client request to sync journal\.\n", re.MULTILINE
)
_FLUSH_MESSAGE = ("systemd-journald", "Received client request to sync journal.")

_CURSOR = "-- cursor: "

PRIORITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")

Run = Callable[[Command, float], CommandResult]


@dataclass(frozen=True)
class JournalEntry:
    """One entry. What an entry lacks is an empty text, or None.

    `time` is in UTC, `priority` 0 (emerg) to 7 (debug). `unit` is the unit that logged it or, for
    systemd's own words, the one they are about. `fields` has all fields as text; of a field that
    is there several times, `all_of` has every value.
    """

    time: datetime
    unit: str
    identifier: str
    pid: int | None
    priority: int | None
    message: str
    cursor: str
    fields: Mapping[str, str] = field(repr=False)
    all_fields: Mapping[str, tuple[str, ...]] = field(repr=False)

    def __str__(self) -> str:
        """Return it as `journalctl -o short-precise` does, in UTC and without the host's name."""
        pid = "" if self.pid is None else f"[{self.pid}]"
        head = f"{self.time:%b %d %H:%M:%S.%f} {self.identifier or 'unknown'}{pid}: "
        return head + self.message.rstrip("\n").replace("\n", "\n" + " " * len(head))


class Journal(tuple[JournalEntry, ...]):
    """Entries, oldest first: a tuple that is text as well."""

    __slots__ = ()

    @property
    def text(self) -> str:
        """All entries, a line each (more for a message that has more), as journalctl shows them."""
        return "".join(f"{entry}\n" for entry in self)

    @property
    def messages(self) -> tuple[str, ...]:
        """The messages alone."""
        return tuple(entry.message for entry in self)


def read_journal(
    run: Run,
    *,
    where: str,
    matches: Sequence[str] = (),
    since: Since | None = None,
    until: Since | None = None,
    priority: int | str | None = None,
    boot: int | str | None = 0,
    grep: str | None = None,
    lines: int | None = None,
    timeout: float = TIMEOUT,
) -> Journal:
    """Return the entries that fit all of it; see `vm.journal`."""
    words = ["journalctl", "--quiet", "--no-pager", "--all", "--output=json"]
    if boot is not None:
        words.append(f"--boot={boot}")
    for option, moment in (("since", since), ("until", until)):
        if moment is not None:
            words.append(f"--{option}={_moment(moment)}")
    if priority is not None:
        words.append(f"--priority={_priority(priority)}")
    if grep is not None:
        words.append(f"--grep={grep}")
    if lines is not None:
        words.append(f"--lines={lines + 1}")  # one may be ours
    result = _journalctl(run, [*words, *matches], where, timeout)
    entries = [parse_entry(line) for line in result.stdout_bytes.splitlines() if line]
    if _is_backwards(entries):  # with --grep and --lines journalctl searches from the end
        entries.reverse()
    entries = [e for e in entries if (e.identifier, e.message) != _FLUSH_MESSAGE]
    return Journal(entries if lines is None else entries[max(0, len(entries) - lines) :])


def cursor(run: Run, *, where: str, timeout: float = TIMEOUT) -> str:
    """Return the cursor of the newest entry; empty if the journal is."""
    words = ["journalctl", "--quiet", "--no-pager", "--lines=1", "--output=cat", "--show-cursor"]
    result = _journalctl(run, words, where, timeout, flush=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith(_CURSOR)]
    return lines[-1].removeprefix(_CURSOR) if lines else ""


def text_after(run: Run, after: str, *, where: str, timeout: float = TIMEOUT) -> str:
    """Return everything that was logged after a cursor, as `journalctl -o short-precise` does."""
    words = ["journalctl", "--quiet", "--no-pager", "--all", "--output=short-precise"]
    # An empty cursor was taken when there was no entry yet.
    words.append(f"--after-cursor={after}" if after else "--boot=0")
    return _FLUSH_LOGGED.sub("", _journalctl(run, words, where, timeout).stdout)


def _journalctl(
    run: Run, words: Sequence[str], where: str, timeout: float, *, flush: bool = True
) -> CommandResult:
    result = run(words if not flush else ["sh", "-c", _FLUSHED, "sh", *words], timeout)
    said = result.stderr.strip()
    # --grep that finds nothing ends with 1 and no word, and so does nothing else.
    if result.returncode > 1 or (result.returncode == 1 and said):
        raise MachineError(f"The journal of {where} could not be read: {said or result.returncode}")
    return result


def _moment(moment: Since) -> str:
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise ValueError("a time in the guest's journal needs a zone: datetime.now(UTC)")
        moment = moment.timestamp()
    return moment if isinstance(moment, str) else f"@{moment:.6f}"


def _priority(priority: int | str) -> str:
    # A range is "err..emerg"; journalctl knows what is none.
    if isinstance(priority, int) and not 0 <= priority < len(PRIORITIES):
        raise ValueError(f"{priority} is no priority: they are 0 (emerg) to 7 (debug)")
    return str(priority)


def _is_backwards(entries: Sequence[JournalEntry]) -> bool:
    def number(entry: JournalEntry) -> tuple[str, int]:
        parts = dict(part.partition("=")[::2] for part in entry.cursor.split(";"))
        return parts.get("s", ""), int(parts.get("i", "0"), 16)

    if len(entries) < 2:
        return False
    (first_file, first), (last_file, last) = number(entries[0]), number(entries[-1])
    if first_file == last_file:
        return first > last
    return entries[0].time > entries[-1].time


# --- one entry --------------------------------------------------------------------------------


def parse_entry(line: bytes | str) -> JournalEntry:
    """Return the entry that a line of `journalctl -o json` holds."""
    raw: dict[str, object] = json.loads(line)
    every = {name: _values(value) for name, value in raw.items()}
    # journalctl's own output has the last value of such a field as well.
    fields = {name: values[-1] for name, values in every.items() if values}

    def first(*names: str) -> str:
        return next((fields[name] for name in names if fields.get(name)), "")

    return JournalEntry(
        time=datetime.fromtimestamp(int(first("__REALTIME_TIMESTAMP") or 0) / 1e6, UTC),
        unit=first("UNIT", "USER_UNIT", "_SYSTEMD_USER_UNIT", "_SYSTEMD_UNIT"),
        identifier=first("SYSLOG_IDENTIFIER", "_COMM"),
        pid=_number(first("_PID", "SYSLOG_PID")),
        priority=_number(first("PRIORITY")),
        message=fields.get("MESSAGE", ""),
        cursor=first("__CURSOR"),
        fields=fields,
        all_fields=every,
    )


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _values(value: object) -> tuple[str, ...]:
    """Return a field's values as text: what is not UTF-8 is replaced, what is null left out."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        return ()
    # An array of numbers is one value, in bytes; any other array holds values.
    if value and all(isinstance(part, int) for part in value):
        return (bytes(part & 0xFF for part in value).decode("utf-8", "replace"),)
    return tuple(text for part in value for text in _values(part))
