"""The fast channel: bash in the guest, on virtio ports, started through the guest agent.

It needs neither network, nor sshd, nor room on a disk, and changes nothing in the configuration.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from pytest_nixvm.errors import (
    ChannelError,
    CommandTimeoutError,
    GuestFaultError,
    MachineError,
    MachineGoneError,
    NoShellError,
    QmpError,
    ShellError,
)
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.agent_exec import Started
from pytest_nixvm.guest.result import Command, CommandResult, display
from pytest_nixvm.guest.shell_script import Places, compose
from pytest_nixvm.guest.shell_slot import START_TIMEOUT, Slot, Starting, State
from pytest_nixvm.guest.shell_stream import Collected, ShellGoneError
from pytest_nixvm.qemu.monitor import Event, Monitor
from pytest_nixvm.qemu.ports import Pair, Ports
from pytest_nixvm.wait import Deadline

_KILL_TIMEOUT = 20.0
_HELP_TIMEOUT = 10.0
_GRACE = 1.0


class Shell:
    r"""The shells of one VM. May be used from several threads at once.

        shell = Shell(qemu.monitor, qemu.ports, agent)
        shell.run("hostname").stdout
        shell.run(["cat"], stdin=b"binary \0 too").stdout_bytes
        with open("big", "rb") as source:
            shell.run("cat >/big", stdin=source)        # of any size, in bounded memory
        shell.close()

    Each command has a shell to itself. The first shell is on ports that are always there; when all
    are busy another pair of ports is plugged in, `qemu.ports.MOST` at most. All times are in
    seconds. Every method raises `MachineGoneError` when QEMU has ended, and after `interrupt` what
    that was given.
    """

    def __init__(
        self, monitor: Monitor, ports: Ports, agent: Agent, places: Places | None = None
    ) -> None:
        self._ports = ports
        self._agent = agent
        self._places = places or Places()
        self._changed = threading.Condition()
        self._fault: MachineError | None = None
        self._closed = False
        first = self._slot(ports.first)
        self._slots = [first]
        self._idle = [first]
        self._starting = False
        self._full = False
        self._stop_listening = monitor.on_event(self._on_event)

    def _slot(self, pair: Pair) -> Slot:
        return Slot(pair, self._launch, self._ports.is_open, self._places)

    # --- commands ----------------------------------------------------------------------------

    def run(
        self,
        command: Command,
        *,
        stdin: str | bytes | BinaryIO | None = None,
        stdout: BinaryIO | None = None,
        stderr: BinaryIO | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float = 900.0,
        check: bool = False,
    ) -> CommandResult:
        """Run a command as root (or `user`) and wait for its end.

        A string is run by bash in a subshell, in the environment of a log-in; a sequence is an
        argv that no shell interprets. `env` is added to the environment, `cwd` is the directory
        (/ if it is not given; 125 is the exit status if it can't be entered). `stdin` may be a
        binary file that is read as it is needed; `stdout` and `stderr` are binary files that get
        the output as it comes, which the result then does not have.

        The command's end counts, not that of its output: a process that it leaves in the
        background lives on, and what that writes later than a quarter of a second after the
        command's end is dropped.

        After `timeout` seconds the command is killed with its children, also those in the
        background, and `CommandTimeoutError` raised. What earlier commands have left is spared.
        The time that it takes to start a shell does not count.

        Raises `NoShellError` if there is no shell to be had (no bash in the guest, say);
        `ShellError` if the shell was ended while it ran the command; `AgentError` if the agent
        can't start one; with `check` `CommandFailedError` for an exit status other than 0.
        """
        began = time.monotonic()
        text = partial(_compose, command, env, cwd, user)
        text(None)  # a mistake of the caller's is found before anything is begun
        data = stdin.encode() if isinstance(stdin, str) else stdin
        out, err = Collected(stdout), Collected(stderr)
        try:
            slot, deadline = self._take(command, timeout)
        except ShellError as error:
            raise NoShellError(str(error)) from None
        try:
            try:
                status = slot.run(text, data, out.write, err.write, deadline)
            except TimeoutError:
                how = self._end(slot, out, err)
                raise CommandTimeoutError(
                    f"`{display(command)}` did not end within {timeout:g} s. {how}",
                    command=command,
                    stdout=out.text,
                    stderr=err.text,
                ) from None
            except ShellGoneError:
                self._end(slot, out, err)
                raise ShellError(
                    f"The shell that ran `{display(command)}` was ended before the command was. "
                    "The next command gets a new one.",
                    stdout=out.text,
                    stderr=err.text,
                ) from None
            except (GuestFaultError, MachineGoneError):
                raise
            except BaseException:
                # Interrupted by a person, or a sink that takes no more: the command must not go
                # on behind our back.
                self._end(slot, out, err)
                raise
        finally:
            self._give_back(slot)
        result = CommandResult(
            command, status, out.bytes, err.bytes, time.monotonic() - began, channel="shell"
        )
        return result.check() if check else result

    def prepare(self) -> None:
        """Start the first shell, so that the first command need not wait for it."""
        slot, _ = self._take("", START_TIMEOUT)
        self._give_back(slot)

    def answers(self, timeout: float) -> bool:
        """Whether a shell that has nothing to do answers. Starts none, and ends none."""
        with self._changed:
            ready = [slot for slot in self._idle if slot.state is State.READY]
            if not ready:
                return False
            slot = ready[0]
            self._idle.remove(slot)
        out, err = Collected(None), Collected(None)
        try:
            text = partial(_compose, ":", None, None, None)
            slot.run(text, None, out.write, err.write, Deadline(timeout))
        except (TimeoutError, ShellGoneError, MachineError):
            slot.state = State.STALE
            return False
        finally:
            self._give_back(slot)
        return True

    def _end(self, slot: Slot, out: Collected, err: Collected) -> str:
        """Kill what runs in the slot by starting it anew; say how that went."""
        out.patient = err.patient = True
        try:
            slot.start(_KILL_TIMEOUT, out.write, err.write)
        except (ChannelError, QmpError) as error:
            return f"It can't be killed: {error}"
        return "It was killed with all that it had started."

    # --- slots -------------------------------------------------------------------------------

    def _take(self, command: Command, timeout: float) -> tuple[Slot, Deadline]:
        """Return a slot with a shell that waits for a command, and the command's deadline.

        Only one shell is started at a time: a slow guest that has to start eight of them is of no
        use to anybody meanwhile, and a command may well end before that.
        """
        waited = 0.0
        with self._changed:
            while True:
                self._raise_fault()
                ready = [slot for slot in self._idle if slot.state is State.READY]
                if ready:
                    slot = min(ready, key=lambda slot: slot.number)
                    if slot.is_there():
                        self._idle.remove(slot)
                        return slot, Deadline(timeout - waited)
                    continue
                if not self._starting and (self._idle or not self._full):
                    self._starting = True
                    stale = self._idle.pop(0) if self._idle else None
                    break
                if waited >= timeout:
                    raise CommandTimeoutError(
                        f"`{display(command)}` could not begin within {timeout:g} s: all "
                        f"{len(self._slots)} shells of the VM were busy.",
                        command=command,
                    )
                began = time.monotonic()
                self._changed.wait(None if self._starting else timeout - waited)
                waited += 0.0 if self._starting else time.monotonic() - began
        try:
            new = stale or self._grow()
            if new is not None:
                try:
                    new.start(START_TIMEOUT)
                except BaseException:
                    self._give_back(new)
                    raise
        finally:
            with self._changed:
                self._starting = False
                self._changed.notify_all()
        return (new, Deadline(timeout - waited)) if new else self._take(command, timeout)

    def _grow(self) -> Slot | None:
        """Return another slot, or None if there are as many as there may be."""
        pair = self._ports.plug()
        with self._changed:
            if pair is None:
                self._full = True
                return None
            slot = self._slot(pair)
            slot.stream.fail(self._fault)
            self._slots.append(slot)
            return slot

    def _give_back(self, slot: Slot) -> None:
        with self._changed:
            if self._closed:
                slot.stream.dispose()
            self._idle.append(slot)
            self._changed.notify_all()

    def _raise_fault(self) -> None:
        if self._closed:
            raise MachineGoneError("The shell is closed: the VM was ended by the tests.")
        if self._fault is not None:
            raise self._fault.again()

    # --- starting ----------------------------------------------------------------------------

    def _launch(self, text: str) -> Starting:
        """Run a starter: with another shell that is idle, else with the agent."""
        with self._changed:
            ready = [slot for slot in self._idle if slot.state is State.READY]
            helper = ready[-1] if ready else None
            if helper is not None:
                self._idle.remove(helper)
        if helper is not None:
            out, err = Collected(None), Collected(None)
            run = partial(_compose, ["bash", "-c", text], None, None, None)
            try:
                status = helper.run(run, None, out.write, err.write, Deadline(_HELP_TIMEOUT))
                return _Ended("" if status == 0 else err.text or f"exit status {status}")
            except (TimeoutError, ShellGoneError):
                pass  # it may be stale without knowing, after a reset: the agent knows better
            finally:
                self._give_back(helper)
        bash = self._agent.shell_argv("")[0]
        if not bash.endswith("/bash"):
            raise ShellError("The guest has no bash, so there is no shell on its virtio ports.")
        return _ByAgent(self._agent.start([bash, "-c", text]))

    def _on_event(self, event: Event) -> None:
        # It may come late, or not at all after a reset: whoever is told looks for himself.
        if event.name == "RESET" or (
            event.name == "VSERPORT_CHANGE" and not event.data.get("open")
        ):
            for slot in list(self._slots):
                ids = [port.id for port in slot.pair.both]
                if event.name == "RESET" or event.data.get("id") in ids:
                    slot.doubt()

    # --- the guest's ends --------------------------------------------------------------------

    def interrupt(self, error: MachineError) -> None:
        """End every command that is under way, and every later one until `revive`, with `error`."""
        self._set_fault(error)

    def revive(self) -> None:
        """Take commands again after `interrupt`: the guest was started anew."""
        self.forget()
        self._set_fault(None)

    def _set_fault(self, error: MachineError | None) -> None:
        with self._changed:
            self._fault = error
            for slot in self._slots:
                slot.stream.fail(error)
            self._changed.notify_all()

    def forget(self) -> None:
        """Take no shell for alive any more: the guest was reset or has rebooted.

        The next commands start new ones on the same ports.
        """
        with self._changed:
            for slot in self._idle:
                slot.state = State.STALE

    def unplug(self, timeout: float = 30.0) -> None:
        """Take away all ports that are not on QEMU's command line, with their shells.

        Waits for commands that run on them. Raises `ShellError` after `timeout` seconds.
        """
        deadline = Deadline(timeout)
        with self._changed:
            while True:
                added = [slot for slot in self._slots if slot.number > 0]
                idle = [slot for slot in added if slot in self._idle]
                if not self._starting and len(idle) == len(added):
                    break
                if deadline.expired:
                    raise ShellError(
                        f"{len(added) - len(idle)} commands still ran on ports that were to be "
                        f"unplugged after {timeout:g} s."
                    )
                self._changed.wait(deadline.remaining())
            for slot in added:
                self._slots.remove(slot)
                self._idle.remove(slot)
            self._full = False
        for slot in added:
            # An end of file for the shell: it ends, and the relays behind it. Those that have
            # something to say to nobody end when the port is gone.
            slot.stream.dispose()
        grace = Deadline(_GRACE)
        for slot in added:
            while self._ports.is_open(slot.pair) and not grace.expired:
                time.sleep(0.005)
            self._ports.unplug(slot.pair)

    def remembered(self) -> dict[str, Any]:
        """Return what `adopt` needs in a clone; call it when the machine is about to be frozen.

        Only the first shell is left then, and it waits for a command. Raises as `run`, and
        `ShellError` if commands go on for half a minute.
        """
        deadline = Deadline(START_TIMEOUT)
        with self._changed:
            while self._slots[0] not in self._idle:
                if deadline.expired:
                    raise ShellError(
                        f"A command still ran after {deadline.seconds:g} s: the machine can't be "
                        "frozen meanwhile."
                    )
                self._changed.wait(deadline.remaining())
        self.unplug()
        # Also takes what earlier commands have left on their way out of the guest.
        self.run(":", timeout=START_TIMEOUT, check=True)
        return self._slots[0].remembered()

    def adopt(self, remembered: Mapping[str, Any]) -> None:
        """Go on with the shell that was there when the machine was frozen.

        Called before the clone runs. Raises `MachineGoneError`.
        """
        self._slots[0].adopt(remembered)

    def close(self) -> None:
        """Hang up; commands that are under way end with `MachineGoneError`. May be called twice."""
        self._stop_listening()
        with self._changed:
            if self._closed:
                return
            self._closed = True
            gone = MachineGoneError("The shell was closed: the VM was ended by the tests.")
            for slot in self._slots:
                slot.stream.fail(gone)
                if slot in self._idle:
                    slot.stream.dispose()
            self._changed.notify_all()


@dataclass
class _Ended:
    """A starter that has ended."""

    trouble: str

    def poll(self) -> str | None:
        return self.trouble or None


@dataclass
class _ByAgent:
    """A starter that the agent runs."""

    started: Started

    def poll(self) -> str | None:
        result = self.started.poll(5)
        if result is None or result.ok:
            return None
        return result.stderr or f"exit status {result.returncode}"


def _compose(
    command: Command,
    env: Mapping[str, str] | None,
    cwd: str | None,
    user: str | None,
    mark: str | None,
) -> bytes:
    return compose(command, env=env, cwd=cwd, user=user, mark=mark)
