"""switch-to-configuration in the guest, in a unit of its own, as nixos-rebuild runs it.

A switch may restart the guest agent, and end our shell with it, or stop sshd: so it runs where
nothing of ours can take it along, and its end is looked for on whatever channel there is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pytest_nixvm.errors import ChannelError, CommandTimeoutError, MachineError
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.guest.waits import TIMED_OUT, GuestWait
from pytest_nixvm.wait import Deadline

PROFILE = "/nix/var/nix/profiles/system"
"""The profile with the system's generations."""

SLICE = 30.0
"""Seconds of one wait in the guest: a channel that is stuck is noticed after that."""

GRACE = 15.0
RECONNECT = 45.0
"""Seconds for the guest agent to come back."""

GIVE_UP = 2
"""How many channels in a row may fail before the machine counts as unreachable."""

_COMMAND_TIMEOUT = 60.0

# What the unit runs is a file: of a script among its arguments systemd would complain when it reads
# the unit again, in a switch. /run is a tmpfs: a full disk does not take the result away.
_START = r"""
mkdir -p -- "$1" || exit
place=$1 unit=$2
shift 2
printf '%s\n' "$EPOCHREALTIME"
cat >"$place/job" <<'END' || exit
place=$1
shift
exec </dev/null >"$place/output" 2>&1
echo "$BASHPID" >"$place/pid"
"$@"
echo "$?" >"$place/status"
END
exec systemd-run --quiet --no-ask-password --collect --unit="$unit" --service-type=exec -- \
  "$BASH" "$place/job" "$place" "$@"
"""

_ENDED = r"""
place=@place@
happened() {
  local pid=
  [[ -s $place/status ]] && return 0
  [[ -s $place/pid ]] || return 1
  read -r pid <"$place/pid"
  kill -0 "$pid" 2>/dev/null && return 1
  [[ -s $place/status ]] || echo '?' >"$place/status"
}
"""


class Connected(Protocol):
    """The part of a machine that runs a switch."""

    name: str

    def run(self, command: Command, *, check: bool = False, timeout: float = 900) -> CommandResult:
        """Run a command on whatever channel there is."""

    def reconnect(self, timeout: float = 60) -> None:
        """Open the channels anew. Raises `ChannelError`."""


@dataclass(frozen=True)
class Ended:
    """How a job ended; `returncode` is None if it did not, or if nobody can tell."""

    returncode: int | None
    output: str
    seconds: float
    finished: bool  # whether it has ended, or was ended
    began: float = 0.0  # by the guest's clock, in seconds since the epoch
    unreachable: str = ""  # why nobody can tell


def run_job(vm: Connected, number: int, argv: Sequence[str], timeout: float) -> Ended:
    """Run an argv in a transient unit and wait for its end, over the loss of any channel.

    It is not ended after `timeout` seconds: that would leave the machine half switched. Raises
    `MachineError` if the unit can't be started, and a fault of the guest.
    """
    place, unit = f"/run/nixvm-switch-{number}", f"nixvm-switch-{number}"
    began = time.monotonic()
    start = ["bash", "-c", _START, "nixvm-switch", place, unit, *argv]
    started = vm.run(start, timeout=_COMMAND_TIMEOUT)
    if not started.ok:
        said = started.stderr.strip() or f"exit status {started.returncode}"
        raise MachineError(f"systemd-run on {vm.name} can't start {argv[0]}: {said}")
    # The first line; its decimal point is the locale's.
    clock = started.stdout.partition("\n")[0].replace(",", ".")
    since = float(clock) if re.fullmatch(r"[0-9.]+", clock) else time.time()
    deadline = Deadline(timeout)
    condition = _ENDED.replace("@place@", place)
    failures = 0
    while True:
        seconds = min(SLICE, max(1.0, deadline.remaining()))
        wait = GuestWait(f"{argv[0]} to end", condition)
        try:
            waited = vm.run(wait.script(seconds), timeout=seconds + GRACE)
            failures = 0
            if waited.returncode not in (0, TIMED_OUT):
                said = waited.stderr.strip() or f"exit status {waited.returncode}"
                raise MachineError(f"The end of {argv[0]} on {vm.name} can't be seen: {said}")
            if waited.ok or deadline.expired:
                return replace(_read(vm, place, began), began=since)
        except (ChannelError, CommandTimeoutError) as error:
            failures += 1
            if failures > GIVE_UP or deadline.expired:
                gone = time.monotonic() - began
                return Ended(None, "", gone, finished=False, unreachable=str(error))
            _try_to_reconnect(vm, deadline)


def _read(vm: Connected, place: str, began: float) -> Ended:
    script = 'cat -- "$1/status" 2>/dev/null || echo; cat -- "$1/output"'
    argv = ["bash", "-c", script, "nixvm-switch", place]
    for attempt in range(GIVE_UP):
        try:
            shown = vm.run(argv, timeout=_COMMAND_TIMEOUT).stdout
            break
        except (ChannelError, CommandTimeoutError) as error:
            if attempt + 1 == GIVE_UP:
                gone = time.monotonic() - began
                return Ended(None, "", gone, finished=False, unreachable=str(error))
            _try_to_reconnect(vm, Deadline(RECONNECT))
    status, _, output = shown.partition("\n")
    code = int(status) if status.isdigit() else None
    return Ended(code, output, time.monotonic() - began, finished=bool(status))


def _try_to_reconnect(vm: Connected, deadline: Deadline) -> None:
    try:
        vm.reconnect(max(1.0, deadline.remaining(RECONNECT)))
    except ChannelError:
        return  # an SSH connection may still be there: the next command takes that


# --- the profile ------------------------------------------------------------------------------


class Profile:
    """The system's generations in the guest."""

    def __init__(self, run: Callable[[Command, float], CommandResult], where: str) -> None:
        self._run = run
        self._where = where

    def resolved(self) -> str:
        """Return the store path of the current generation; "" if there is none yet."""
        return resolve(self._run, PROFILE)

    def set(self, toplevel: str) -> None:
        """Make a generation of a toplevel, and make it the current one.

        Raises `MachineError` with what nix-env said.
        """
        self._nix_env("--set", toplevel)

    def rollback(self) -> None:
        """Make the generation before the current one the current one. Raises `MachineError`."""
        self._nix_env("--rollback")

    def _nix_env(self, *words: str) -> None:
        argv = ["nix-env", "--profile", PROFILE, *words]
        done = self._run(argv, _COMMAND_TIMEOUT)
        if done.returncode == 127:
            raise MachineError(
                f"{self._where} has no nix-env (nix.enable = false?), so it has no generations: "
                'only a switch with mode="test" can be tried on it.'
            )
        if not done.ok:
            said = done.stderr.strip() or f"exit status {done.returncode}"
            raise MachineError(f"`{' '.join(argv)}` on {self._where} failed: {said}")


def resolve(run: Callable[[Command, float], CommandResult], path: str) -> str:
    """Return where a link leads to in the guest; "" if it leads nowhere."""
    found = run(["readlink", "-e", "--", path], _COMMAND_TIMEOUT)
    return found.stdout.strip() if found.ok else ""
