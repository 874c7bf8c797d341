"""The serial console as a person uses it: log in, run a command, expect a text."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path

from pytest_nixvm.errors import CommandTimeoutError, MachineGoneError, SerialError, WaitTimeoutError
from pytest_nixvm.guest.console import Console
from pytest_nixvm.guest.result import Command, CommandResult, display
from pytest_nixvm.guest.spawn import Spawn
from pytest_nixvm.guest.terminal import (
    KERNEL_LINE,
    LOGIN,
    PASSWORD,
    PROMPT,
    QUESTION,
    REFUSED,
    command_lines,
    settle_in,
    whose_shell,
)
from pytest_nixvm.wait import Deadline

__all__ = ["Console", "Serial", "Spawn"]

QUIET = 0.25
"""Seconds without output after which the last line is taken for a prompt."""

NUDGE = 1.0
"""Seconds without output after which an empty line is sent to get a prompt, before the log-in."""


class Serial:
    """The serial console of one VM.

    serial.login("alice", "secret")
    serial.run("systemctl --user is-system-running").stdout
    serial.wait_for(r"Reached target .*Multi-User")     # in all output since power-on
    serial.spawn.expect("login: ")                      # the pexpect object
    serial.log                                          # the file with everything

    All times are in seconds.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._spawn: Spawn | None = None
        self._user: str | None = None

    @property
    def log(self) -> Path:
        """The file with all output since power-on, as QEMU wrote it."""
        return self.console.log

    @property
    def spawn(self) -> Spawn:
        """The pexpect object. It sees the output that comes after its first use."""
        if self._spawn is None or self._spawn.closed:
            self._spawn = Spawn(self.console)
        return self._spawn

    @property
    def user(self) -> str | None:
        """Who `login` has logged in; None before, and after `logout`."""
        return self._user

    def send(self, text: str) -> None:
        """Type `text` as it is; end it with a newline to press Return."""
        self.console.send(text.replace("\n", "\r").encode())

    def wait_for(
        self, pattern: str | re.Pattern[str], timeout: float = 60, since: int = 0
    ) -> re.Match[str]:
        """Wait until the console has shown `pattern`, since power-on or the offset `since`.

        Raises `WaitTimeoutError` with the console's tail, `MachineGoneError` if QEMU ends first.
        """
        return self.console.wait_for(pattern, timeout, since)

    # --- log-in --------------------------------------------------------------------------------

    def login(self, user: str = "root", password: str | None = None, timeout: float = 60) -> None:
        """Get a shell as `user`, from a log-in prompt or a shell that is there already.

        A log-in prompt is waited for; a console that is logged in as somebody else is logged out
        first. The shell's prompt becomes a short one, and the echo is switched off. Raises
        `SerialError` when the log-in is refused, or a password is asked for and none was given.
        """
        deadline = Deadline(timeout)
        self._user = None
        # A prompt that is there already counts; nothing has to be typed to get one.
        since = self.console.mark() - len(self.console.last_line())
        named = asked = left = 0
        while True:
            where = self._at_prompt(deadline, since, patience=10 if named else NUDGE)
            since = self.console.mark()
            if where == "refused" and named:
                raise self._refused(user, password)
            if where == "login":
                if asked or named >= 3:
                    raise self._refused(user, password)
                named += 1
                self.send(user + "\n")
            elif where == "password" and named == 0:
                self.send("\n")  # somebody else's log-in, half finished
            elif where == "password":
                if password is None:
                    self.send("\n")
                    raise SerialError(
                        f"The serial console asks for {user}'s password, and none was given: "
                        "serial.login(user, password)."
                    )
                asked += 1
                self.send(password + "\n")
            elif where == "shell":
                found = self._settle_in(deadline)
                if found == user:
                    self._user = user
                    return
                if found is not None:
                    if left:
                        raise SerialError(
                            f"The serial console logs {found} in by itself: no log-in as {user}."
                        )
                    left += 1
                    since = self.console.mark()
                    self.send("exit\n")

    def logout(self, timeout: float = 30) -> None:
        """Leave the shell and wait for the next log-in prompt, or the next automatic log-in."""
        self._user = None
        since = self.console.mark()
        self.console.send(b"\x15exit\r")
        self._at_prompt(Deadline(timeout), since, patience=timeout)

    def _at_prompt(self, deadline: Deadline, since: int, patience: float) -> str:
        """Wait until the console waits for somebody: "login", "password", "shell" or "refused".

        After `patience` seconds without any output an empty line is sent, which brings a prompt
        back; not earlier, because it would be taken for an empty password. A line that comes back
        unchanged is taken for the prompt of a shell, whatever it looks like.
        """
        asked = ""
        while True:
            deadline.check("a log-in prompt or a shell on the serial console", self._saw())
            if self.console.closed:
                raise MachineGoneError("The serial console closed before it had a prompt.")
            mark = self.console.mark()
            line = self.console.last_line()
            if REFUSED.search(self.console.text(since)):
                return "refused"
            if mark > since and not self.console.wait_beyond(mark, 0.05):
                if LOGIN.search(line):
                    return "login"
                if PASSWORD.search(line):
                    return "password"
                prompt = PROMPT.search(line) or (line.strip() and line == asked)
                if prompt and not self.console.wait_beyond(mark, QUIET):
                    return "shell"
            if not self.console.wait_beyond(mark, deadline.remaining(patience)):
                patience = min(patience * 2, 10)
                if not QUESTION.search(line) or LOGIN.search(line):
                    asked = line
                    self.console.send(b"\x15\r")

    def _settle_in(self, deadline: Deadline) -> str | None:
        """Make the shell at the prompt ours; return its user, None if that was no shell."""
        token = secrets.token_hex(6)
        since = self.console.mark()
        seconds = deadline.remaining(15)
        try:
            self.console.send(b"\x15")
            self.send(whose_shell(token) + "\n")
            found = self.console.wait_for(rf"nixvm-{token}-shell-(.*)-\n", seconds, since)
            if found.group(1):
                # fish has another language; whoever has fish has bash on NixOS.
                prompt = rf"nixvm-{token}-shell-.*-\n(?:.*\n)*.*{PROMPT.pattern}"
                self.console.wait_for(prompt, seconds, since)
                since = self.console.mark()
                self.send("exec env PS1='$ ' bash --norc --noprofile\n")
                self.console.wait_for(PROMPT, seconds, since)
            since = self.console.mark()
            self.send(settle_in(token) + "\n")
            found = self.console.wait_for(
                rf"nixvm-{token}-user-(\S*)-\n(?:.*\n)*nixvm\$ \Z", seconds, since
            )
        except WaitTimeoutError:
            return None
        return found.group(1)

    def _refused(self, user: str, password: str | None) -> SerialError:
        how = "with the given password" if password is not None else "without a password"
        return SerialError(f"The serial console refused to log {user} in {how}.\n{self._saw()}")

    def _saw(self) -> str:
        return "Its last lines:\n" + self.console.tail(15)

    # --- commands ------------------------------------------------------------------------------

    def run(self, command: Command, timeout: float = 60, check: bool = False) -> CommandResult:
        """Run a command in the shell that `login` has opened; `cd` and variables stay.

        The result has stdout and stderr in one, as a terminal has them. What the kernel prints in
        between is left out, unless the command asks for the kernel's messages itself. Raises
        `SerialError` without a shell; `CommandTimeoutError` after `timeout` seconds, when Control-C
        has been pressed; `CommandFailedError` with `check` and an exit status other than 0.
        """
        if self._user is None:
            raise SerialError("Nobody is logged in on the serial console: serial.login() first.")
        began = time.monotonic()
        deadline = Deadline(timeout)
        token = secrets.token_hex(6)
        *first, last = command_lines(display(command), token)
        for line in first:
            mark = self.console.mark()
            self.send(line + "\n")
            self.console.wait_for(r"nixvm\$ \Z", deadline.remaining(10), mark)
        since = self.console.mark()
        self.send(last + "\n")
        output, status = self._outcome(command, token, since, deadline)
        duration = time.monotonic() - began
        result = CommandResult(command, status, output.encode(), b"", duration, channel="serial")
        return result.check() if check else result

    def _outcome(
        self, command: Command, token: str, since: int, deadline: Deadline
    ) -> tuple[str, int]:
        """Wait for the second mark; return what was between the two, and the exit status."""
        keep_kernel = re.search(r"dmesg|journalctl|kmsg", display(command)) is not None
        end = re.compile(rf"nixvm-{token}-end-(\d+)\n")
        pause = 0.1
        while True:
            mark = self.console.mark()
            try:
                self.console.wait_for(end, deadline.remaining(pause), since)
            except WaitTimeoutError:
                pause = min(pause * 1.5, 2.0)
            except MachineGoneError:
                raise MachineGoneError(
                    f"The serial console closed during `{display(command)}`."
                ) from None
            text = self.console.text(since)
            found = end.search(text)
            if found is None or not keep_kernel:
                # The kernel may have printed a message in the middle of our mark.
                text = KERNEL_LINE.sub("", text)
                found = end.search(text)
            if found is not None:
                begin = re.search(rf"nixvm-{token}-begin\n", text)
                # A newline was printed so that the mark has a line of its own.
                output = text[begin.end() if begin else 0 : found.start()].removesuffix("\n")
                return output, int(found.group(1))
            if LOGIN.search(self.console.last_line()) and self.console.mark() == mark:
                self._user = None
                raise SerialError(
                    f"`{display(command)}` ended the shell: the serial console is back at its "
                    f"log-in prompt.\n{self._saw()}"
                )
            if deadline.expired:
                raise self._timed_out(command, token, since, deadline.seconds)

    def _timed_out(
        self, command: Command, token: str, since: int, seconds: float
    ) -> CommandTimeoutError:
        """Press Control-C and return the error."""
        text = self.console.text(since).partition(f"nixvm-{token}-begin\n")[2]
        mark = self.console.mark()
        self.console.send(b"\x03")
        outcome = "Control-C ended it."
        try:
            self.console.wait_for(r"nixvm\$ \Z", 5, mark)
        except (WaitTimeoutError, MachineGoneError):
            self._user = None
            outcome = "Control-C did not bring the prompt back: log in again."
        return CommandTimeoutError(
            f"`{display(command)}` did not end within {seconds:g} s on the serial console. "
            + outcome,
            command=command,
            stdout=text,
        )
