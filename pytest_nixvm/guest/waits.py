r"""Waits that run in the guest: one bash loop, so that an event is seen within a twentieth second.

A loop starts no program for its pause, and none for its condition where bash can do that itself:
`read -t` on a pipe that nobody writes to is the pause, `/dev/tcp` tries a port, `/proc/net/unix`
lists sockets. Time is `/proc/uptime`, which runs on evenly when the clock is set.

A loop's exit status: 0 it has happened, TIMED_OUT the time was over, anything else: it can't be
waited for, and stderr says why.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from pytest_nixvm.errors import (
    ChannelError,
    CommandTimeoutError,
    MachineError,
)
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.wait import timed_out

TIMED_OUT = 75
"""EX_TEMPFAIL of sysexits.h."""

GRACE = 15.0
"""Seconds that the host waits longer than the guest: for a channel that is slow, or stuck."""

LOOK_TIMEOUT = 30.0
LOOK_LINES = 40

_PLACE = re.compile(r"\S+: (?:eval: )?(?:line \d+: )+")

# A shell that is not bash reads the first line only: it stops before what it could not parse.
_LOOP = r"""
[ -n "${BASH_VERSION-}" ] || { echo 'the guest has no bash, and the wait needs it' >&2; exit 1; }
set -u
exec {never}<> <(:)
now=0
uptime() { local up; read -r up _ </proc/uptime; now=$((10#${up/./})); }
refuse() { printf '%s\n' "$1" >&2; exit 2; }
@condition@
uptime
end=$((now + @centiseconds@))
until happened; do
  uptime
  ((now < end)) || exit @timed_out@
  read -rt 0.05 -u "$never"
done
exit 0
"""


@dataclass(frozen=True)
class GuestWait:
    """Something to wait for in the guest.

    `goal` ends the sentence "Waited for …". `condition` is bash text that defines the function
    `happened`; it may call `refuse` with a reason to wait no longer. `look` is bash text that
    prints what is there instead.
    """

    goal: str
    condition: str
    look: str = ""

    def script(self, timeout: float) -> str:
        """Return the bash text of the loop."""
        values = {
            "condition": self.condition.strip(),
            "centiseconds": str(max(0, round(timeout * 100))),
            "timed_out": str(TIMED_OUT),
        }
        text = _LOOP.strip()
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        return text


def wait_in_guest(
    wait: GuestWait,
    run: Callable[[str, float], CommandResult],
    *,
    where: str,
    timeout: float,
    saw: Callable[[], str] | None = None,
) -> CommandResult:
    """Wait for something. `run` runs bash text in the guest, with a timeout in seconds.

    `saw` tells what is there instead, in the place of `wait.look`. Returns the loop's result.

    Raises `WaitTimeoutError` after `timeout` seconds of guest time, with what is there instead;
    `MachineError` at once for what can't be waited for.
    """
    goal = f"{wait.goal} on {where}"
    try:
        result = run(wait.script(timeout), timeout + GRACE)
    except CommandTimeoutError:
        raise timed_out(goal, timeout, saw() if saw else look(wait.look, run)) from None
    if result.returncode == TIMED_OUT:
        raise timed_out(goal, timeout, saw() if saw else look(wait.look, run))
    if not result.ok:
        # bash says where in a text that the reader never sees.
        lines = [_PLACE.sub("", line) for line in result.stderr.strip().splitlines()]
        said = lines[0] if lines else f"the loop ended with exit status {result.returncode}"
        raise MachineError(f"{goal} can't be waited for: {said}.")
    return result


def look(script: str, run: Callable[[str, float], CommandResult]) -> str:
    """Return what a script shows. A wait's own error must not be lost to the look around."""
    try:
        result = run(script, LOOK_TIMEOUT)
    except (ChannelError, CommandTimeoutError) as error:
        return f"What is there instead could not be seen: {error}"
    lines = f"{result.stdout.rstrip()}\n{result.stderr.rstrip()}".strip().splitlines()
    left = len(lines) - LOOK_LINES
    return "\n".join([*lines[:LOOK_LINES], *([f"[and {left} lines more]"] if left > 0 else [])])


# --- files ------------------------------------------------------------------------------------

# The driver's `test -e {filename}`, without its trap: a second match of a glob, or a blank, would
# make it a malformed test that is never true.
_FILE = r"""
name=@name@
happened() {
  local words word
  eval "words=($name)" || exit 2
  ((${#words[@]})) || refuse 'the name is empty'
  if ((${#words[@]} > 1)) && [[ $name != *[*?[{]* ]]; then
    refuse "$name is ${#words[@]} words to the shell: put it in quotes, within the string"
  fi
  for word in "${words[@]}"; do [[ -e $word ]] && return 0; done
  return 1
}
"""

_FILE_LOOK = r"""
eval "words=(@raw@)"
path=${words[0]-}
[[ $path == /* ]] || path=$PWD/$path
if [[ -e $path ]]; then
  echo "It came when the time was over: $path"
elif [[ -L $path ]]; then
  echo "$path is a symbolic link to what does not exist:"
  ls -ld -- "$path"
else
  place=${path%/*}
  until [[ -e ${place:-/} ]]; do place=${place%/*}; done
  place=${place:-/}
  if [[ ! -d $place ]]; then
    echo "$place is not a directory:"
    ls -ld -- "$place"
  elif [[ $place == "${path%/*}" || $place == / && $path != /*/* ]]; then
    echo "It is not there. Its directory $place holds, newest first:"
    ls -lAt -- "$place"
  else
    echo "Its directory is not there either. The nearest one, $place, holds, newest first:"
    ls -lAt -- "$place"
  fi
fi
"""


def file_wait(filename: str) -> GuestWait:
    """Wait for a file. `filename` is shell text: globs, `~` and variables are expanded."""
    quoted = shlex.quote(filename)
    return GuestWait(
        f"the file {filename}",
        _FILE.replace("@name@", quoted),
        f"name={quoted}\n" + _FILE_LOOK.replace("@raw@", "$name"),
    )
