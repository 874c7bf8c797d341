"""From power-on to "ready": the agent answers and the units have settled.

Three sources are watched at once, none by polling: QEMU's end, QMP events (a panic that the guest
reports through pvpanic) and the serial console (what Linux, the initrd and systemd print when they
give up). The first of them to report ends the wait, with the stage that was reached.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pytest_nixvm.errors import AgentError, BootError, ChannelError, MachineGoneError
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.console import Console
from pytest_nixvm.guest.systemd import Systemd
from pytest_nixvm.progress import Step
from pytest_nixvm.qemu.launch import Qemu
from pytest_nixvm.qemu.monitor import Event
from pytest_nixvm.wait import Deadline

STAGES = (
    # (what the console shows, the stage's name), in the order of a boot
    (r"SeaBIOS|iPXE|UEFI|GRUB", "firmware"),
    (r"Booting from ROM|Linux version |\[ +\d+\.\d+\] ", "kernel"),
    (r"NixOS Stage 1|Running in initrd|initrd-switch-root|systemd-initrd", "initrd (stage 1)"),
    (r"NixOS Stage 2|Welcome to |systemd \d+.* running in system mode", "systemd (stage 2)"),
    (r"^\S+ login: ", "log-in prompt on the console"),
)
POWER_ON, AGENT = "QEMU started", "guest agent answers"

# What is printed by whoever gives up, with what it means. Sources: Linux' kernel/panic.c and
# init/do_mounts.c, NixOS' stage-1-init.sh, systemd's sulogin-shell.c, SeaBIOS' boot.c, GRUB.
FATAL = (
    (r"Kernel panic - not syncing: (?P<what>[^\r\n]*)", "the kernel panicked"),
    (r"An error occurred in stage 1 of the boot process", "the initrd could not go on"),
    (r"VFS: Unable to mount root fs", "the kernel could not mount the root file system"),
    (
        r"You are in (?P<what>emergency|rescue) mode|Cannot open access to console, the root "
        r"account is locked|Give root password for maintenance",
        "systemd fell into emergency mode",
    ),
    (r"No bootable device|Boot failed: not a bootable disk", "the firmware found nothing to boot"),
    (r"(?m)^grub rescue>", "GRUB could not go on"),
)
_FATAL = tuple((re.compile(pattern, re.MULTILINE), meaning) for pattern, meaning in FATAL)
_STAGES = tuple((re.compile(pattern, re.MULTILINE), name) for pattern, name in STAGES)

SLICE = 5.0
"""Seconds of one wait for the agent."""

SETTLE_GRACE = 0.3
"""Seconds given to the console after a fatal line: the details come behind it."""


@dataclass(frozen=True)
class BootReport:
    """How a boot went.

    `state` is systemd's own word, "running" or "degraded"; `failed_units` names the units that
    failed. `seconds` counts from power-on to settled units, `agent_seconds` to the agent's answer.
    """

    seconds: float
    agent_seconds: float
    state: str
    failed_units: tuple[str, ...] = ()


@dataclass
class Watch:
    """Notices, until `close`, that a VM will not get any further.

    `trouble` is None or the reason in words; `wake` is called, from any thread, when it is set.
    """

    qemu: Qemu
    console: Console
    since: int = 0
    wake: Callable[[], None] = lambda: None
    trouble: str | None = None
    _read: int = 0
    _happened: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def open(self) -> Watch:
        """Start to watch, beginning with what the console has shown already."""
        self._undo.append(self.console.on_output(self._read_console))
        self._undo.append(self.qemu.monitor.on_event(self._read_event))
        self.qemu.process.on_exit(lambda _: self.report(self.qemu.cause_of_death()))
        self._read_console()
        return self

    def close(self) -> None:
        """Stop watching."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.wake = lambda: None

    def report(self, reason: str) -> None:
        """Take note of a reason; the first one stays."""
        with self._lock:
            if self.trouble is None:
                self.trouble = reason
        self._happened.set()
        self.wake()

    def pause(self, seconds: float) -> None:
        """Wait for trouble, at most `seconds`."""
        self._happened.wait(seconds)

    def stage(self) -> str:
        """Return the furthest stage that the console shows."""
        text = self.console.text(self.since)
        for pattern, name in reversed(_STAGES):
            if pattern.search(text):
                return name
        return POWER_ON

    def _read_console(self) -> None:
        # Once more from a little before what was read: a line may come in two parts.
        text = self.console.text(max(self.since, self._read - 512))
        self._read = self.console.mark()
        for pattern, meaning in _FATAL:
            found = pattern.search(text)
            if found:
                what = found.groupdict().get("what")
                self.report(f"{meaning}: {what.strip()}" if what else meaning)
                return

    def _read_event(self, event: Event) -> None:
        if event.name == "GUEST_PANICKED":
            self.report("the kernel panicked")
        elif event.name == "BLOCK_IO_ERROR" and event.data.get("nospace"):
            self.report("the disk under the VM's overlay is full")


def wait_ready(
    qemu: Qemu,
    console: Console,
    agent: Agent,
    *,
    deadline: Deadline,
    step: Step,
    since: int = 0,
) -> BootReport:
    """Wait until the agent answers and systemd has nothing left to start.

    `deadline` is the boot's; `since` is the console's offset at which this boot began.
    Raises `BootError` as soon as it is known that the VM won't get there.
    """
    watch = Watch(qemu, console, since)
    watch.wake = agent.cancel
    watch.open()
    stage = ""
    try:
        step.update("waiting for the guest agent")
        try:
            _wait_for_agent(agent, watch, deadline)
        except (ChannelError, MachineGoneError) as error:
            raise _failure(watch, console, deadline, "its guest agent answers", error) from error
        answered = deadline.elapsed
        watch.wake = lambda: None
        stage = AGENT
        state, failed = _settle(agent, watch, deadline, step)
        return BootReport(deadline.elapsed, answered, state, failed)
    except (AgentError, MachineGoneError) as error:
        raise _failure(watch, console, deadline, "its units settle", error, stage) from error
    finally:
        watch.close()


def _wait_for_agent(agent: Agent, watch: Watch, deadline: Deadline) -> None:
    """Wait in slices: a wake-up that comes just before a wait begins is lost to it."""
    while True:
        try:
            agent.wait_ready(deadline.remaining(SLICE))
        except AgentError as error:
            if watch.trouble is not None or deadline.expired or error.error_class != "Timeout":
                raise
        else:
            return


class _Unsettled(AgentError):
    """The units did not settle; the text says what was seen."""


def _settle(
    agent: Agent, watch: Watch, deadline: Deadline, step: Step
) -> tuple[str, tuple[str, ...]]:
    """Wait for systemd's own "nothing left to start" and return its state and failed units."""
    step.update("waiting for units to settle")
    # --wait blocks in the guest until the boot's queue is empty (systemctl(1), since v240).
    waiting = agent.start(["systemctl", "is-system-running", "--wait"])
    pause = 0.02
    while (result := waiting.poll()) is None:
        watch.pause(deadline.remaining(pause))
        if watch.trouble is not None or deadline.expired:
            raise _Unsettled(_jobs(agent) if watch.trouble is None else watch.trouble)
        pause = min(pause * 1.5, 0.25)
    state = result.stdout.strip()
    if state == "running":
        return state, ()
    if state == "degraded":
        systemd = Systemd(lambda argv, seconds: agent.exec(argv, timeout=seconds), where="the VM")
        return state, systemd.failed_units()
    raise _Unsettled(f"systemd's state is {state or result.stderr.strip()!r}.")


def _jobs(agent: Agent) -> str:
    try:
        jobs = agent.exec(["systemctl", "list-jobs", "--no-legend", "--no-pager"], timeout=10)
    except (AgentError, MachineGoneError) as error:
        return f"The agent has stopped answering: {error}"
    return "systemd still works on:\n" + jobs.stdout.rstrip()


def _failure(
    watch: Watch,
    console: Console,
    deadline: Deadline,
    goal: str,
    error: Exception,
    stage: str = "",
) -> BootError:
    name = watch.qemu.spec.name
    stage = stage or watch.stage()
    if watch.trouble is not None:
        time.sleep(0 if not watch.qemu.alive else SETTLE_GRACE)
        message = f"{name} did not boot: {watch.trouble}."
    elif deadline.expired:
        message = f"{name} was not ready after {deadline.seconds:g} s: before {goal}. "
        message += "--nixvm-boot-timeout sets that time."
        if isinstance(error, _Unsettled):
            message += f"\n{error}"
        elif stage == "log-in prompt on the console":
            message += (
                "\nIt shows a log-in prompt, so it runs, without a guest agent: "
                "services.qemuGuest.enable starts one."
            )
    else:
        message = f"{name} did not boot: {error}"
    return BootError(
        message, stage=stage, console_tail=console.tail(25), console_log=watch.qemu.console_log
    )
