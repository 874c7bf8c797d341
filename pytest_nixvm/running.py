"""The VMs that `nixvm run` has started and that still run: one file for each.

The files are in a directory of this user's alone. An entry whose process has ended, or whose
number another process has got since, is removed by whoever comes across it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs

from pytest_nixvm.errors import SettingsError

FORMAT = 1


@dataclass(frozen=True)
class Running:
    """One VM that is run for a person, and where its `nixvm run` can be asked."""

    name: str  # dev-vm
    flake: str  # the flake as nix has it: git+file:///…
    pid: int  # of `nixvm run`, not of QEMU
    began: str  # when that process began, as the kernel has it
    control: Path  # the socket on which it answers, see `control.py`
    disk: Path | None  # the disk that is kept
    console_log: Path
    forwards: tuple[tuple[int, int], ...] = ()  # ports of 127.0.0.1, and the guest's

    @property
    def alive(self) -> bool:
        """Whether the process is there, and the same that has written this."""
        return bool(self.began) and began(self.pid) == self.began

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {
            **asdict(self),
            "format": FORMAT,
            "control": str(self.control),
            "disk": None if self.disk is None else str(self.disk),
            "console_log": str(self.console_log),
        }

    @classmethod
    def from_json(cls, data: Any) -> Running:
        """Read what `to_json` gave. Raises `ValueError`, `KeyError` or `TypeError` for others."""
        if data["format"] != FORMAT:
            raise ValueError("another format")
        return cls(
            name=str(data["name"]),
            flake=str(data["flake"]),
            pid=int(data["pid"]),
            began=str(data["began"]),
            control=Path(data["control"]),
            disk=None if data["disk"] is None else Path(data["disk"]),
            console_log=Path(data["console_log"]),
            forwards=tuple((int(host), int(guest)) for host, guest in data["forwards"]),
        )


def began(pid: int) -> str:
    """Return when a process began: ticks since the boot, and which boot. "" if there is none."""
    try:
        # "pid (name) state ppid …"; the name may hold anything, even ") R 1" (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    # A zombie runs nothing.
    return "" if fields[0] in (b"Z", b"X") else f"{int(fields[19])}@{boot}"


def directory() -> Path:
    """Return where the entries are.

    Raises `SettingsError` if that is not ours alone: where there is no XDG_RUNTIME_DIR it is in a
    directory that everybody may write to.
    """
    with warnings.catch_warnings():  # that there is no XDG_RUNTIME_DIR
        warnings.simplefilter("ignore")
        path = platformdirs.user_runtime_path("pytest-nixvm") / "running"
    for each in (path.parent.parent, path.parent, path):
        try:
            each.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = each.lstat() if each != path.parent.parent else each.stat()
        except OSError as error:
            raise SettingsError(
                f"The list of running VMs, {path}, can't be kept: {error.strerror}. Set "
                "XDG_RUNTIME_DIR to a directory of your own."
            ) from None
        # Whoever may replace what is in it could tell `nixvm ssh` what to run.
        shared = found.st_mode & 0o022
        if each == path.parent.parent:
            safe = found.st_uid in (os.getuid(), 0) and not (shared and not found.st_mode & 0o1000)
        else:
            safe = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not shared
        if not safe:
            # What is above ours is nobody's to remove: /tmp, or somebody else's /run/user/1000.
            mend = "Set" if each == path.parent.parent else "Remove it, or set"
            raise SettingsError(
                f"{each} is not a directory that only you may write to, so the list of running "
                f"VMs can't be kept there. {mend} XDG_RUNTIME_DIR to a directory of your own."
            )
    return path


def path_of(name: str, pid: int) -> Path:
    """Return the file of an entry. Raises `SettingsError`."""
    return directory() / f"{pid}-{''.join(c if c.isalnum() else '_' for c in name)}.json"


def write(running: Running) -> Path:
    """Write an entry, all of it or nothing, and return its file. Raises `SettingsError`."""
    path = path_of(running.name, running.pid)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(running.to_json(), file)
        Path(temporary).replace(path)
    except OSError as error:
        raise SettingsError(f"{path} can't be written: {error.strerror}.") from None
    return path


def every() -> Sequence[Running]:
    """Return the VMs that run, the one that was started last first. Never an error."""
    found = []
    for path in _files():
        try:
            dated = path.stat().st_mtime_ns
            entry = Running.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # not ours, or of another version
        if entry.alive:
            found.append((dated, entry))
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return [entry for _, entry in sorted(found, key=lambda each: -each[0])]


def running_names(flake: str | None = None) -> Sequence[str]:
    """Return the names of the VMs that run; those of one flake (its URL) if it is given."""
    return sorted({each.name for each in every() if flake in (None, each.flake)})


def holder(disk: Path) -> Running | None:
    """Return the VM that uses a kept disk, if it is known."""
    return next((each for each in every() if each.disk == disk), None)


def find(name: str, flake: str | None, *, strict: bool = False) -> Running:
    """Return the VM of that name; where several flakes have one that runs, that of `flake`.

    With `strict` it has to be that flake's. Raises `SettingsError` if there is none, or if it can't
    be told which is meant.
    """
    running = every()
    named = [each for each in running if each.name == name]
    ours = [each for each in named if each.flake == flake]
    if len(ours) == 1 or (not ours and len(named) == 1 and not strict):
        return (ours or named)[0]
    flakes = ", ".join(sorted({each.flake for each in named}))
    if len(named) > 1 and not strict:
        raise SettingsError(f"{name} runs more than once ({flakes}): say which with --flake.")
    if named:
        raise SettingsError(f"{name} of {flake} does not run, but that of {flakes} does.")
    names = ", ".join(sorted({each.name for each in running}))
    raise SettingsError(
        f"{name} does not run: start it with `nixvm run {name}`. Running: {names or 'nothing'}."
    )


def _files() -> Iterator[Path]:
    with contextlib.suppress(OSError, SettingsError):
        yield from sorted(directory().glob("*.json"))
