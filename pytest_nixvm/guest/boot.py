"""From power-on to "ready": the agent answers and the units have settled.

Trouble (see `watch`) ends the wait at once, with the stage that was reached.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from pytest_nixvm.errors import AgentError, BootError, ChannelError, MachineGoneError
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.console import Console
from pytest_nixvm.guest.systemd import Systemd
from pytest_nixvm.guest.watch import Watch
from pytest_nixvm.progress import Step
from pytest_nixvm.qemu.launch import Qemu
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


def stage(console: Console, since: int) -> str:
    """Return the furthest stage that the console shows after the offset `since`."""
    text = console.text(since)
    for pattern, name in reversed(_STAGES):
        if pattern.search(text):
            return name
    return POWER_ON


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
    reached = ""
    try:
        step.update("waiting for the guest agent")
        try:
            _wait_for_agent(agent, watch, deadline)
        except (ChannelError, MachineGoneError) as error:
            raise _failure(watch, console, deadline, "its guest agent answers", error) from error
        answered = deadline.elapsed
        watch.wake = lambda: None
        reached = AGENT
        state, failed = _settle(agent, watch, deadline, step)
        return BootReport(deadline.elapsed, answered, state, failed)
    except (AgentError, MachineGoneError) as error:
        raise _failure(watch, console, deadline, "its units settle", error, reached) from error
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
            raise _Unsettled(_jobs(agent) if watch.trouble is None else watch.trouble.reason)
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
    reached: str = "",
) -> BootError:
    name = watch.qemu.spec.name
    reached = reached or stage(console, watch.since)
    if isinstance(error, MachineGoneError):
        watch.pause(1.0)  # QEMU's sockets close a moment before it is known how it ended
    if watch.trouble is not None:
        time.sleep(0 if not watch.qemu.alive else SETTLE_GRACE)
        message = f"{name} did not boot: {watch.trouble.reason}."
    elif deadline.expired:
        message = f"{name} was not ready after {deadline.seconds:g} s: before {goal}. "
        message += "--nixvm-boot-timeout sets that time."
        if isinstance(error, _Unsettled):
            message += f"\n{error}"
        elif reached == "log-in prompt on the console":
            message += (
                "\nIt shows a log-in prompt, so it runs, without a guest agent: "
                "services.qemuGuest.enable starts one."
            )
    else:
        message = f"{name} did not boot: {error}"
    return BootError(
        message, stage=reached, console_tail=console.tail(25), console_log=watch.qemu.console_log
    )
