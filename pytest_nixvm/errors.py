"""One exception tree.

Everything the plugin raises on purpose is a `NixvmError`, and its text is written for whoever
reads it in a terminal: what was wrong, where, what to do. Two branches tell who has to act:

* `UserError`: an option, a flake, a missing program. Nothing was tested. The plugin turns it
  into pytest's usage error (exit status 4) without a traceback.
* `MachineError` and its children: something happened to a VM. A test or a fixture fails with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class NixvmError(Exception):
    """Base class of all errors of pytest-nixvm."""


# --- what the user has to mend before anything can be tested ---------------------------------


class UserError(NixvmError):
    """A mistake in what was given: nothing was tested, the message says what to change."""


class SettingsError(UserError):
    """An option, ini value or marker argument that means nothing, or a place that can't be used."""


class MissingProgramError(UserError):
    """A program that must be on the machine (nix, git, QEMU) is not there."""


class FlakeError(UserError):
    """The flake reference, its attribute or its evaluation is at fault."""


class EvaluationError(FlakeError):
    """Nix could not evaluate the flake; the message is Nix's own, without its trace."""


class BuildError(FlakeError):
    """Nix evaluated the machine but could not build it; the message ends with the log's tail."""


class NotAVirtualMachineError(FlakeError):
    """The attribute exists, but its build has no `bin/run-*-vm`."""


class ChangeError(UserError):
    """The deployed generation and the candidate can't be compared; nothing was switched."""


class NothingToTestError(ChangeError):
    """Nothing is wrong, but this machine has no change to test: it is new, equal, or fixed."""


class ScriptError(UserError):
    """A test script has a syntax error, or wants what only the NixOS test driver has."""


# --- what happened to a VM ---------------------------------------------------------------------


class MachineError(NixvmError):
    """Something went wrong with a VM or with what runs in it."""

    def again(self) -> MachineError:
        """Return a copy to raise: one error object must not be raised in two places.

        For the kinds that have nothing but a message.
        """
        return type(self)(str(self))


class QemuError(MachineError):
    """QEMU did not start, refused something, or ended without being asked to."""


class MachineGoneError(QemuError):
    """The VM is not running (any more): QEMU has ended."""


class QmpError(QemuError):
    """QEMU answered a QMP command with an error, or not in time.

    `error_class` and `description` are QMP's own ("GenericError", "CommandNotFound", ...).
    """

    def __init__(self, message: str, *, error_class: str = "", description: str = "") -> None:
        super().__init__(message)
        self.error_class = error_class
        self.description = description


class BootError(MachineError):
    """The VM did not get ready.

    `stage` is the last stage that was reached, `console_tail` the end of the serial console,
    `console_log` the file with all of it.
    """

    def __init__(
        self, message: str, *, stage: str, console_tail: str = "", console_log: Path | None = None
    ) -> None:
        text = f"{message}\nStage reached: {stage}."
        if console_tail.strip():
            text += "\nThe console's last lines:\n" + _indent(console_tail)
        if console_log is not None:
            text += f"\nThe whole console: {console_log}"
        super().__init__(text)
        self.stage = stage
        self.console_tail = console_tail
        self.console_log = console_log


class GuestFaultError(MachineError):
    """Something in the guest ended what was under way; the VM is not to be trusted any more.

    It ends every running call on the VM at once. A later test gets a fresh VM.
    """


class GuestPanicError(GuestFaultError):
    """The guest's kernel panicked."""


class EmergencyModeError(GuestFaultError):
    """systemd, or the initrd, has given up and waits for a person at the console."""


class OutOfMemoryError(GuestFaultError):
    """The guest's kernel has killed what was being tested because memory ran out."""


class GuestRebootError(MachineError):
    """The guest was reset while a command ran, by something other than `vm.reboot()`."""


class GuestHungError(GuestFaultError):
    """The guest does not answer any more, though QEMU runs it."""


class ChannelError(MachineError):
    """A channel into the guest (agent, SSH, serial) can't be used; the message says why."""


class AgentError(ChannelError):
    """The guest agent answered with an error, or not in time (`error_class` as in `QmpError`)."""

    def __init__(self, message: str, *, error_class: str = "", description: str = "") -> None:
        super().__init__(message)
        self.error_class = error_class
        self.description = description


class SshError(ChannelError):
    """No SSH connection, or one that broke."""


class ShellError(ChannelError):
    """There is no shell on a virtio port, or it ended while it was running a command.

    `stdout` and `stderr` are what that command had written.
    """

    def __init__(self, message: str, *, stdout: str = "", stderr: str = "") -> None:
        text = message
        for name, stream in (("stdout", stdout), ("stderr", stderr)):
            if stream.strip():
                text += f"\n{name}:\n" + _indent(tail(stream))
        super().__init__(text)
        self.stdout = stdout
        self.stderr = stderr


class NoShellError(ShellError):
    """No shell can be started on a virtio port: the command has not begun."""


class SerialError(ChannelError):
    """The serial console is not what was expected (no prompt, log-in refused, closed)."""


class CommandError(MachineError):
    """A command in the guest did not end as asked.

    Attributes: `command` (as given), `returncode` (None if it was not known), `stdout`, `stderr`
    (what had arrived), all rendered in the message.
    """

    def __init__(
        self,
        message: str,
        *,
        command: str | Sequence[str],
        returncode: int | None = None,
        stdout: str = "",
        stderr: str = "",
    ) -> None:
        text = message
        for name, stream in (("stdout", stdout), ("stderr", stderr)):
            if stream.strip():
                text += f"\n{name}:\n" + _indent(tail(stream))
        super().__init__(text)
        self.command = command
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class CommandFailedError(CommandError):
    """The command's exit status was not the one that was asked for."""


class CommandTimeoutError(CommandError):
    """The command did not end in time; it was killed where the channel allows that."""


class WaitTimeoutError(MachineError):
    """A bounded wait ended without what it waited for; the message says what it saw instead."""


class SwitchError(MachineError):
    """A switch, a rollback or the reboot into it did not go well; `result` says all of it."""

    def __init__(self, message: str, *, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class CheckFailedError(MachineError):
    """A machine is not as it should be; the text says what, where from, and what to do."""


class PollingConditionError(MachineError):
    """A condition that a test script wants to hold all the time does not hold any more."""


def tail(text: str, lines: int = 40) -> str:
    """Return the last `lines` lines of `text`, saying how many were left out."""
    every = text.rstrip().splitlines()
    if len(every) <= lines:
        return "\n".join(every)
    return "\n".join([f"[{len(every) - lines} lines before this]", *every[-lines:]])


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines())
