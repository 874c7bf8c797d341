"""The VM's screen and keyboard, its virtual consoles and its serial console."""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path

from pytest_nixvm.errors import GuestPanicError, MachineError, MissingProgramError, tail
from pytest_nixvm.guest import ocr
from pytest_nixvm.guest.console import Console
from pytest_nixvm.qemu.keyboard import DELAY, Keyboard
from pytest_nixvm.qemu.keymaps import directories
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, Guest
from pytest_nixvm.wait import Deadline, poll, timed_out

INTERVAL = 0.05
"""Seconds between two looks at a virtual console."""

# xwininfo finds the X server by DISPLAY, and its cookie is where the server was told.
_WINDOWS = r"""
export DISPLAY="${DISPLAY:-:0.0}"
if [ -z "${XAUTHORITY:-}" ]; then
    cookie=$(ps -eo args= |
        sed -n '/^[^ ]*X\(org\|wayland\)\{0,1\} /s/.* -auth \([^ ]*\).*/\1/p' | head -n 1)
    if [ -n "$cookie" ]; then export XAUTHORITY="$cookie"; fi
fi
xwininfo -root -tree | sed 's/.*0x[0-9a-f]* \"\([^\"]*\)\".*/\1/; t; d'
"""


class Screen(Guest):
    """The screen, the keyboard, the consoles.

    `keyboard_layout` is what `send_chars` types on unless it is told otherwise: the one that the
    guest uses (docs/keyboard.md).
    """

    keyboard_layout: str = "us"
    _console_read: tuple[Console | None, int] = (None, 0)

    # --- the picture ---

    def screenshot(self, filename: str | Path) -> Path:
        """Save the screen as PNG; a relative name is below the machine's output directory.

        Works on a paused or panicked VM, too. Raises `QmpError` if the machine has no display
        device.
        """
        path = self.output / filename
        if path.suffix != ".png":
            path = path.with_name(path.name + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        return self.qemu.screenshot(path)

    def get_screen_text(self) -> str:
        """Return the text on the screen, by optical character recognition.

        Needs tesseract and the extra `ocr`, else raises `MissingProgramError`.
        """
        return ocr.read(self._picture())

    def get_screen_text_variants(self) -> list[str]:
        """Return several readings of the screen; which and how many may change."""
        return list(ocr.variants(self._picture()))

    def wait_for_text(self, regex: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait until one of the readings of the screen matches a regular expression.

        A screen that has not changed is not read again. Raises `WaitTimeoutError` with the text
        that the screen showed at the end, and where its picture is.
        """
        pattern = _pattern(regex)
        ocr.need()
        deadline = Deadline(timeout)
        read: dict[bytes, list[str]] = {}
        with self.transcript.note("wait", f"{regex!r} on the screen"):
            while True:
                picture = self._picture()
                key = hashlib.sha256(picture.read_bytes()).digest()
                if key not in read:
                    # The cursor blinks: two pictures that alternate are both known.
                    read[key] = []
                    for text in ocr.variants(picture):
                        read[key].append(text)
                        if pattern.search(text):
                            return
                if deadline.expired:
                    saw = "\n---\n".join(tail(text, 30) for text in read[key] if text.strip())
                    raise timed_out(
                        f"{regex!r} on the screen of {self.name}",
                        timeout,
                        f"Its readings at the end, of {picture}:\n{saw or '(no text)'}",
                    )
                time.sleep(deadline.remaining(0.1))

    def _picture(self) -> Path:
        return self.screenshot(f"screen-{self.name}-read.png")

    # --- the keyboard ---

    def send_key(
        self,
        key: str,
        delay: float | None = DELAY,
        log: bool | None = True,
        *,
        layout: str | None = None,
    ) -> None:
        """Press keys together: "ret", "ctrl-alt-f2", "shift-a", or a single character.

        Names are those of QEMU's `sendkey`. `delay` is in seconds, afterwards; without `log` the
        transcript does not show it. Raises `MachineError` for what is no key, and on a VM that
        does not run.
        """
        if log:
            with self.transcript.note("keys", key):
                self._keyboard().press(key, layout or self.keyboard_layout)
        else:
            self._keyboard().press(key, layout or self.keyboard_layout)
        time.sleep(delay or 0.0)

    def send_chars(
        self, chars: str, delay: float | None = DELAY, *, layout: str | None = None
    ) -> None:
        r"""Type text on the keyboard; "\n" is Return.

        The layout must be the guest's: `layout`, or `vm.keyboard_layout`, "us" by default. Raises
        `MachineError` before anything is typed if the layout lacks a character, with the layouts
        that have it.
        """
        with self.transcript.note("keys", repr(chars)):
            self._keyboard().type(chars, layout=layout or self.keyboard_layout, delay=delay)

    def _keyboard(self) -> Keyboard:
        qemu = self.qemu
        # A panicked guest may look like a running one to QEMU. In emergency mode keys are welcome.
        fault = self.console.fault
        if isinstance(fault, GuestPanicError):
            raise fault.again()
        try:
            executable = Path(f"/proc/{qemu.pid}/exe").resolve(strict=True)
        except OSError:
            executable = None  # another user's process, perhaps
        return Keyboard(qemu.monitor, directories(executable))

    # --- virtual consoles ---

    def get_tty_text(self, tty: str | int) -> str:
        """Return what the virtual console /dev/tty`tty` shows, a line for each of its rows.

        Letters that are not ASCII are right where the kernel keeps them (/dev/vcsu, Linux 4.19).
        Raises `MachineError` if there is no such console.
        """
        number = _tty(tty)
        # stty brings up a console that nobody has used; the unicode screen has 4 bytes a cell.
        script = (
            f"stty -F /dev/tty{number} size && "
            f"{{ cat /dev/vcsu{number} 2>/dev/null || cat /dev/vcs{number}; }}"
        )
        result = self.run(script)
        size, _, cells = result.stdout_bytes.partition(b"\n")
        if not result.ok or not re.fullmatch(rb"\d+ \d+", size):
            raise MachineError(
                f"{self.name} has no virtual console tty{number}: {result.stderr.strip()}"
            )
        rows, columns = map(int, size.split())
        wide = len(cells) >= 4 * rows * columns
        text = cells.decode("utf-32-le" if wide else "latin-1", "replace").replace("\0", " ")
        width = columns or 80
        return "\n".join(text[at : at + width] for at in range(0, len(text), width))

    def dump_tty_contents(self, tty: str | int) -> None:
        """Debugging: print what a virtual console shows, and put it into the guest's journal."""
        text = self.get_tty_text(tty)
        print(f"{self.name}, tty{_tty(tty)}:\n{_shown(text)}")
        self.run(["systemd-cat"], stdin=text)

    def wait_until_tty_matches(
        self, tty: str | int, regexp: str, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Wait until what a virtual console shows matches a regular expression.

        Raises `WaitTimeoutError` with what it showed at the end.
        """
        pattern = _pattern(regexp)
        last = ""

        def matches() -> bool:
            nonlocal last
            last = self.get_tty_text(tty)
            return pattern.search(last) is not None

        with self.transcript.note("wait", f"{regexp!r} on tty{tty}"):
            poll(
                matches,
                f"{regexp!r} on tty{tty} of {self.name}",
                timeout=timeout,
                interval=INTERVAL,
                longest=INTERVAL,
                saw=lambda: f"It shows:\n{_shown(last) or '(nothing)'}",
            )

    # --- the serial console ---

    def send_console(self, chars: str) -> None:
        r"""Type text on the serial console; "\n" is Return. See `vm.serial` for more."""
        with self.transcript.note("keys", repr(chars), channel="serial"):
            self.console.send(chars.replace("\n", "\r").encode())

    def get_console_log(self) -> str:
        """Return all that the serial console has shown since power-on, without escape sequences."""
        return self.console.text()

    def wait_for_console_text(self, regex: str, timeout: float | None = None) -> None:
        """Wait until the serial console shows a regular expression; `timeout` None is 900 s.

        What it has shown since power-on counts, up to the line where the last such wait ended, as
        in the NixOS test driver. Raises `WaitTimeoutError` with the console's tail.
        """
        seconds = DEFAULT_TIMEOUT if timeout is None else timeout
        console = self.console
        known, since = self._console_read
        since = since if known is console else 0
        with self.transcript.note("wait", f"{regex!r} on the serial console", channel="serial"):
            mark = console.mark()
            found = console.wait_for(_pattern(regex, re.MULTILINE), seconds, since)
            # The match's own text is found again to learn where it ended.
            text = console.text(since)
            start = text.find(found[0])
            ended = since + start + len(found[0]) if start >= 0 else mark
            newline = text.find("\n", ended - since)
            self._console_read = (console, since + newline + 1 if newline >= 0 else ended)

    # --- X11 ---

    def wait_for_x(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait until a graphical session has begun and the X server's socket is there."""
        script = (
            "[ -e /tmp/.X11-unix/X0 ] && journalctl -b SYSLOG_IDENTIFIER=systemd --no-pager "
            "| grep -q 'Reached target Current graphical'"
        )

        def saw() -> str:
            status = self.run("systemctl status --no-pager --full display-manager.service 2>&1")
            return tail(status.stdout, 20)

        with self.transcript.note("wait", "the X server"):
            poll(
                lambda: self.run(script).ok,
                f"the X server of {self.name}",
                timeout=timeout,
                saw=saw,
            )

    def get_window_names(self) -> list[str]:
        """Return the names of the X11 windows. Needs xwininfo in the guest."""
        result = self.run(f"set -o pipefail\n{_WINDOWS}")
        if result.returncode == 127:
            raise MissingProgramError(
                f"{self.name} has no xwininfo: add pkgs.xorg.xwininfo to its "
                "environment.systemPackages."
            )
        return result.check().stdout.splitlines()

    def wait_for_window(self, regexp: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait until an X11 window has a name that matches a regular expression."""
        pattern = _pattern(regexp)
        names: list[str] = []

        def appeared() -> bool:
            names[:] = self.get_window_names()
            return any(pattern.search(name) for name in names)

        with self.transcript.note("wait", f"a window {regexp!r}"):
            poll(
                appeared,
                f"a window {regexp!r} on {self.name}",
                timeout=timeout,
                saw=lambda: f"Its windows: {', '.join(names) or 'none'}.",
            )


def _pattern(regex: str, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(regex, flags)
    except re.error as error:
        raise MachineError(f"{regex!r} is no regular expression: {error}.") from None


def _tty(tty: str | int) -> str:
    number = str(tty).removeprefix("/dev/").removeprefix("tty")
    if not re.fullmatch(r"[0-9]{1,2}", number):
        raise MachineError(f"{tty!r} is no virtual console: they are numbered, '1' is /dev/tty1.")
    return number


def _shown(text: str) -> str:
    """Return the lines of a screen without the empty space."""
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
