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
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.wait import Deadline

CLOCK_TOLERANCE = 0.08
"""Seconds that the clock of a clone may be off; the rest of a tenth is for measuring it."""

TRIES = 5
"""Times that the shell may try; on a busy computer one may come late."""

VMGENID, IOCTL, NONE = "vmgenid", "ioctl", "none"
"""How a clone gets random numbers of its own."""

# EPOCHREALTIME is bash's, since 5.0: no program has to be started for it.
_SET = "date -s @{:.6f} >/dev/null; echo ${{EPOCHREALTIME:-$(date +%s.%N)}}"

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
    """The guest's clock, set over the shell if there is one: that is one command, and no other.

    `run` runs a command string in the guest's shell, None if it has none. What a clone does the
    first time takes long, under software emulation above all, so the time that is sent is the one
    at which it is expected to be set: `leads` is what that took, for all clones of this process.
    """

    leads: ClassVar[dict[bool, float]] = {True: 0.1, False: 0.01}  # by whether it is the first time

    def __init__(self, agent: Agent, run: Callable[[str], CommandResult] | None) -> None:
        self._agent = agent
        self._run = run
        self._first = True

    def set(self, timeout: float = 30) -> None:
        """Set the guest's clock to the host's, and make sure of it.

        Raises `AgentError` if it is still more than `CLOCK_TOLERANCE` off after `timeout` seconds.
        """
        deadline = Deadline(timeout)
        lead, off = self.leads[self._first], float("inf")
        for _ in range(TRIES if self._run is not None else 0):
            off = self._by_shell(lead)
            if abs(off) < 1 and lead == self.leads[self._first]:
                # Half of the difference: one that was unusually slow must not spoil the next.
                self.leads[self._first] = min(max(lead - off / 2, 0.0), 1.0)
            lead = max(0.0, lead - off) if abs(off) < 1 and not self._first else self.leads[False]
            self._first = False
            if abs(off) <= CLOCK_TOLERANCE or deadline.expired:
                break
        while abs(off) > CLOCK_TOLERANCE:  # again where the computer is busy
            self._agent.set_time(timeout=max(1.0, deadline.remaining()))
            off = _clock_off(self._agent)
            if abs(off) > CLOCK_TOLERANCE and deadline.expired:
                raise AgentError(f"The guest's clock is {off:+.2f} s off, and can't be set better.")

    def _by_shell(self, lead: float) -> float:
        """Try to set it; return by how many seconds it is ahead then, infinity for a failure."""
        if self._run is None:
            return float("inf")
        result = self._run(_SET.format(time.time() + lead))
        try:
            return float(result.stdout.replace(",", ".")) - time.time()
        except ValueError:
            return float("inf")


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
