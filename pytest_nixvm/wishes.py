"""What a person wants of a VM to use: forwarded ports, shared directories, a window.

All is checked before anything is built, but for QEMU's windows: its QEMU comes with what is built.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm import running
from pytest_nixvm.errors import SettingsError
from pytest_nixvm.qemu.drives import escape
from pytest_nixvm.qemu.network import LOOPBACK

_WINDOWS = ("gtk", "sdl")
"""QEMU's displays that are a window, the better one first."""

_HELP_TIMEOUT = 20.0


@dataclass(frozen=True)
class Forward:
    """A TCP port of 127.0.0.1 that leads to one of the guest."""

    host: int
    guest: int

    @classmethod
    def parse(cls, text: str) -> Forward:
        """Read HOST:GUEST, or PORT for both. Raises `SettingsError`."""
        host, colon, guest = text.partition(":")
        ports = [host, guest if colon else host]
        if not all(re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536 for port in ports):
            raise SettingsError(
                f"--port {text!r} should be HOST:GUEST, two ports from 1 to 65535, as in 8080:80."
            )
        return cls(int(ports[0]), int(ports[1]))


@dataclass(frozen=True)
class Share:
    """A directory of this computer that the guest has at `target`."""

    source: Path
    target: str
    readonly: bool = False

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read DIR[:GUESTPATH][:ro]; without GUESTPATH it is /mnt/NAME. Raises `SettingsError`."""
        rest, readonly = text, False
        if rest.endswith(":ro"):
            rest, readonly = rest.removesuffix(":ro"), True
        name, _, target = rest.partition(":")
        if not name:
            raise SettingsError(f"--share {text!r} should be DIR[:GUESTPATH][:ro].")
        # Not expanduser(): it raises for the home of somebody who is not here.
        source = Path(os.path.normpath(Path.cwd() / os.path.expanduser(name)))  # noqa: PTH111
        if not os.path.isdir(source):  # noqa: PTH112 - never raises
            there = os.path.lexists(source)
            why = f"{source} is no directory" if there else f"there is no directory {source}"
            raise SettingsError(f"--share {text!r}: {why}.")
        if not os.access(source, os.R_OK | os.X_OK):
            raise SettingsError(f"--share {text!r}: {source} can't be read.")
        target = target or f"/mnt/{source.name or 'root'}"
        normal = os.path.normpath(target)
        if not target.startswith("/") or normal in ("/", "//") or "\0" in target:
            raise SettingsError(
                f"--share {text!r}: {target!r}, the place in the guest, should be an absolute "
                "path other than /."
            )
        return cls(source, normal, readonly)


def forwards(texts: Sequence[str]) -> tuple[Forward, ...]:
    """Read the ports. Raises `SettingsError`."""
    found = tuple(dict.fromkeys(Forward.parse(text) for text in texts))
    for number, each in enumerate(found):
        if any(each.host == other.host for other in found[:number]):
            raise SettingsError(
                f"--port {each.host}:{each.guest}: port {each.host} of {LOOPBACK} is to be "
                "forwarded twice."
            )
    return found


def check_free(wanted: Sequence[Forward]) -> None:
    """Try whether the ports are free. Raises `SettingsError`."""
    for each in wanted:
        why = _taken(each.host)
        if why:
            raise SettingsError(
                f"--port {each.host}:{each.guest}: port {each.host} of {LOOPBACK} can't be had: "
                f"{why}."
            )


def check_display(window: bool | None) -> None:
    """Look whether there is a desktop for a window that was asked for. Raises `SettingsError`."""
    if window and (why := _no_display()):
        raise _no_window(why)


def shares(texts: Sequence[str]) -> tuple[Share, ...]:
    """Read the shared directories. Raises `SettingsError`."""
    found = tuple(Share.parse(text) for text in texts)
    targets = [share.target for share in found]
    for target in targets:
        if targets.count(target) > 1:
            raise SettingsError(f"--share: two directories are to be at {target} in the guest.")
    return found


def share_arguments(wanted: Sequence[Share]) -> tuple[str, ...]:
    """Return what QEMU needs for shared directories.

    With security model "none" files that the guest makes are this user's, with the modes that they
    have in there. What is read-only is so for whatever the guest does.
    """
    result: list[str] = []
    for number, share in enumerate(wanted):
        readonly = ",readonly=on" if share.readonly else ""
        result += [
            "-fsdev",
            f"local,id=nixvm-share{number},path={escape(str(share.source))},"
            f"security_model=none,multidevs=remap{readonly}",
            "-device",
            f"virtio-9p-pci,fsdev=nixvm-share{number},mount_tag={tag(number)}",
        ]
    return tuple(result)


def tag(number: int) -> str:
    """Return the name by which the guest mounts a share; QEMU's limit is 31 characters."""
    return f"nixvm-share{number}"


@dataclass(frozen=True)
class Screen:
    """Whether there is a window, what QEMU is told of it, and what the person is told."""

    window: bool
    arguments: tuple[str, ...] = ()
    note: str = ""


def screen(qemu: Path, window: bool | None, script: str) -> Screen:
    """Decide on a window: `window` is what was asked for, None is as the machine has it.

    Raises `SettingsError` if a window was asked for and can't be.
    """
    headless = re.search(r"(?<=\s)-nographic(?=\s)", script) is not None
    if window is False or (window is None and headless):
        return Screen(False)
    why = _no_display()
    kind = None if why else _window_of(qemu)
    if kind is None:
        why = why or f"{qemu} can't open one: it was built without {' and '.join(_WINDOWS)}"
        if window:
            raise _no_window(why)
        return Screen(False, note=f"No window: {why}.")
    # The script's -nographic takes more than the window away.
    more = ("-machine", "graphics=on") if headless else ()
    return Screen(True, ("-display", kind, *more))


def _no_display() -> str:
    """Say why no window can be shown; "" if one can."""
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return ""
    return "neither DISPLAY nor WAYLAND_DISPLAY is set, so there is no desktop to show one on"


def _no_window(why: str) -> SettingsError:
    return SettingsError(f"--window: {why}. --headless does without.")


def _window_of(qemu: Path) -> str | None:
    try:
        done = subprocess.run(
            [qemu, "-display", "help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_HELP_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    offered = done.stdout.split()
    return next((kind for kind in _WINDOWS if kind in offered), None)


def _taken(port: int) -> str:
    """Say why a port can't be listened on; "" if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)  # two may be bound to it with that option, but not listen
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"{_listener(port)} listens there"
            if error.errno == errno.EACCES:
                return "ports this low are the system's; take one above 1023"
            return error.strerror or str(error)
    return ""


def _listener(port: int) -> str:
    for each in running.every():
        if any(host == port for host, _ in each.forwards):
            return f"{each.name}, run by process {each.pid},"
    return "another process"
