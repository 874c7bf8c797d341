"""A clone wakes: its clock and its random numbers must not be those of its template.

A frozen kernel goes on with the time at which it was frozen, and every clone with the same random
numbers. QEMU's vmgenid tells the kernel that it was cloned, and it reseeds at once (Linux 5.18,
drivers/virt/vmgenid.c); where the kernel does not know that device, random bytes of the host's
are put in and the kernel is told to reseed, by whatever of the guest's can call ioctl.

Sources: random(4), drivers/char/random.c.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import ClassVar

from pytest_nixvm.errors import AgentError
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.wait import Deadline

CLOCK_TOLERANCE = 0.08
"""Seconds that the clock of a clone may be off at most, what is not known of it included."""

TRIES = 5
"""Times that the shell may try; on a busy computer one may come late."""

USUAL = 0.02
"""Seconds that a command takes; the error of the clock is half of the difference."""

VMGENID, IOCTL, NONE = "vmgenid", "ioctl", "none"
"""How a clone gets random numbers of its own."""

# EPOCHREALTIME is bash's, since 5.0: no program has to be started for it.
_NOW = "echo ${EPOCHREALTIME:-$(date +%s.%N)}"

_VMGENID = """
for bus in acpi platform; do
  for device in /sys/bus/$bus/drivers/vmgenid/*:*; do [ -e "$device" ] && echo vmgenid && exit; done
done
for program in perl python3; do command -v $program >/dev/null && echo ioctl && exit; done
echo none
"""

# RNDADDENTROPY is _IOW('R', 3, int[2]), RNDRESEEDCRNG is _IO('R', 7): include/uapi/linux/random.h.
_RESEED = """
if command -v perl >/dev/null; then exec perl -e '
  local $/; my $bytes = <STDIN>;
  open(my $random, ">", "/dev/random") or die $!;
  my $pool = pack("ii", 8 * length $bytes, length $bytes) . $bytes;
  ioctl($random, 0x40085203, $pool) or die $!; ioctl($random, 0x5207, 0) or die $!;'
else exec python3 -c '
import fcntl, struct, sys
data = sys.stdin.buffer.read()
with open("/dev/random", "wb", 0) as random:
    fcntl.ioctl(random, 0x40085203, struct.pack("ii", 8 * len(data), len(data)) + data)
    fcntl.ioctl(random, 0x5207)'
fi
"""


def entropy_source(agent: Agent) -> str:
    """Return how clones of this machine will get random numbers of their own, or `NONE`."""
    return agent.exec(_VMGENID, timeout=30).stdout.strip() or NONE


def reseed(agent: Agent) -> None:
    """Put random bytes of the host's into the guest's kernel. Raises `AgentError`."""
    result: CommandResult = agent.exec(_RESEED, stdin=secrets.token_bytes(64), timeout=30)
    if not result.ok:
        raise AgentError(f"The guest's kernel can't be reseeded: {result.stderr.strip()}")


class Clock:
    """The guest's clock, set over the shell if there is one: a program more takes its time.

    `run` runs a command in the guest's shell, None if it has none. What a clone does the first time
    takes long, under software emulation above all; so the time that is sent then is the one at
    which it is likely to be set: `lead` is what that took, for all clones of this process.
    """

    lead: ClassVar[float] = 0.1

    def __init__(self, agent: Agent, run: Callable[[Command], CommandResult] | None) -> None:
        self._agent = agent
        self._run = run
        self._first = True

    def set(self, timeout: float = 30) -> None:
        """Set the guest's clock to the host's, and make sure of it.

        Raises `AgentError` if it may still be more than `CLOCK_TOLERANCE` off after `timeout`
        seconds.
        """
        deadline = Deadline(timeout)
        for _ in range(TRIES):
            if self._run is not None and self._by_shell(self._run):
                return
        off = _clock_off(self._agent)
        while abs(off) > CLOCK_TOLERANCE:  # again where the computer is busy
            self._agent.set_time(timeout=max(1.0, deadline.remaining()))
            off = _clock_off(self._agent)
            if abs(off) > CLOCK_TOLERANCE and deadline.expired:
                raise AgentError(f"The guest's clock is {off:+.2f} s off, and can't be set better.")

    def _by_shell(self, run: Callable[[Command], CommandResult]) -> bool:
        """Set it, and return whether it is known to be right."""
        first, self._first = self._first, False
        lead = Clock.lead if first else USUAL / 2
        began = time.monotonic()
        done = run(["date", "-s", f"@{time.time() + lead:.6f}"])
        took = time.monotonic() - began
        if not done.ok:
            return False
        if not first and took <= CLOCK_TOLERANCE:
            return True  # it was right at some moment between the question and the answer
        before = time.time()
        said = run(_NOW).stdout.replace(",", ".")
        took = time.time() - before
        try:
            off = float(said) - (before + took / 2)
        except ValueError:
            return False
        if first and abs(off) < 1:
            # Half of the difference: one that was unusually slow must not spoil the next.
            Clock.lead = min(max(lead - off / 2, 0.0), 1.0)
        return abs(off) + took / 2 <= CLOCK_TOLERANCE


def _clock_off(agent: Agent) -> float:
    """Return by how many seconds the guest's clock is ahead, as exactly as can be known."""
    best, off = float("inf"), 0.0
    for _ in range(3):
        before = time.time()
        guest = agent.time()
        took = time.time() - before
        if took < best:
            best, off = took, guest - (before + took / 2)
        if best < CLOCK_TOLERANCE / 2:
            break
    return off
