r"""What runs in the guest for the shell channel: bash, and nothing that would have to be installed.

Two texts. `starter` is run once for each shell, by the agent: it ends what was on the ports
before, finds them, and puts the shell into a cgroup of its own. `LOOP` is the shell: it reads a
command from its port, runs it in a subshell, and writes a mark behind each of its two outputs.

    host -> guest   run LENGTH NONCE \n SCRIPT              a command with an empty stdin
                    feed LENGTH NONCE \n SCRIPT CHUNKS      a command with stdin; each chunk is
                                                            COUNT \n BYTES, or COUNT text \n
                                                            BYTES if none is 0; 0 \n is the end
                    rotate 0 NONCE \n                       new pipes, see below
    guest -> host   \0 NONCE hello PID HOW \n               on stdout's port, at the start
                    \0 NONCE ready \n                       on both, at the start and after rotate
                    \0 NONCE input \n                       on stdout's: the command takes no more
                    \0 NONCE end STATUS LEFT \n             on both, when the command has ended

The shell costs one fork for each command, and the text is made the way it is for that:

* A port can be opened only once, so that `echo >/dev/stderr` would fail on it. A command gets pipes
  instead, which two `cat`, started once, empty into the ports.
* The cgroup tells without a fork whether a command has left processes behind (LEFT), and kills all
  of them with one write. Those that were left are moved aside, so that they outlive the killing of
  a later command, and get the old pipes for themselves (`rotate`), so that their late output never
  gets between a later one's. The cgroup is in no unit: it outlives the agent's.
* Where there is no cgroup v2, or one without `cgroup.kill` (Linux < 5.14), a mark in the
  environment finds what is to be killed, see `reap`; late output is not kept apart there.

Variables are `__nixvm_…` and not exported, file descriptors are closed before the command begins.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_nixvm.guest import reap
from pytest_nixvm.guest.result import Command

NOT_STARTED = 125
"""The exit status of a command whose directory can't be entered, as with `env --chdir`."""


@dataclass(frozen=True)
class Places:
    """Where the guest has what the scripts need. Other values than these are for tests."""

    system: str = "/sys/class/virtio-ports"
    devices: str = "/dev"
    cgroups: str = "/sys/fs/cgroup"


_STARTER = r"""
PATH=$PATH:$places
exec {never}<> <(:)
pause() { read -rt "$1" -u "$never"; }

own=
base=$cgroups/pytest-nixvm
if [[ -e $cgroups/cgroup.controllers ]]; then
  [[ -d $base/left && -d $base/shell-$slot && -d $base/relay-$slot ]] ||
    mkdir -p -- "$base/left" "$base/shell-$slot" "$base/relay-$slot"
  if [[ -w $base/shell-$slot/cgroup.kill ]]; then own=$base/shell-$slot; fi
fi

# What was there before. Its relays end by themselves when they have written everything.
if [[ $own ]]; then
  echo 1 >"$own/cgroup.kill"
  for ((i = 0; i < 1000; i++)); do
    mapfile -t events <"$own/cgroup.events"
    [[ " ${events[*]} " == *" populated 0 "* ]] && break
    pause 0.01
  done
  if ((i == 1000)); then echo "what runs in $own can't be killed" >&2; exit 1; fi
  echo $$ >"$own/cgroup.procs" || own=
fi
if [[ $own ]]; then
  unset PYTEST_NIXVM_COMMAND
else
  reap
  export PYTEST_NIXVM_COMMAND=$nonce
fi

# A port has its device before it has its name.
out= err=
for ((i = 0; i < 500; i++)); do
  for file in "$system"/*/name; do
    IFS= read -r name 2>/dev/null <"$file"
    place=${file%/name}
    place=$devices/${place##*/}
    case $name in "$main") out=$place ;; "$error") err=$place ;; esac
  done
  [[ $out && $err ]] && break
  pause 0.01
done
if [[ ! $out || ! $err ]]; then
  echo "the guest has no virtio ports named $main and $error in $system" >&2
  exit 1
fi

session=setsid
type -P setsid >/dev/null || session=
$session "$BASH" --noprofile --norc -c "$loop" bash \
  "$out" "$err" "$nonce" "$own" "$base" "$slot" "$places" "$dirty" "$definitions" \
  </dev/null >/dev/null 2>&1 {never}>&- &
"""

# All that the shell itself has open.
_CLOSE = (
    "{__nixvm_port}>&- {__nixvm_error}>&- {__nixvm_out}>&- {__nixvm_err}>&- "
    "{__nixvm_never}>&- {__nixvm_environment}>&-"
)

_DEFINITIONS = r"""
__nixvm_nonce=$3 __nixvm_own=$4 __nixvm_base=$5 __nixvm_slot=$6 __nixvm_places=$7 __nixvm_dirty=$8
__nixvm_port=250 __nixvm_error=250 __nixvm_out=250 __nixvm_err=250 __nixvm_environment=250
cd /
unset OLDPWD
exec {__nixvm_never}<> <(:)
__nixvm_pause() { read -rt "$1" -u "$__nixvm_never"; }

# A port is busy while the relays of the shell before are still writing; those that never end
# have their pipe held open by somebody whom the cgroup did not catch.
__nixvm_open() {
  local try
  for ((try = 0; try < 1000; try++)); do
    exec {__nixvm_port}<>"$1" && break
    if ((try == 250)) && [[ $__nixvm_own ]]; then
      echo 1 >"$__nixvm_base/relay-$__nixvm_slot/cgroup.kill"
    fi
    __nixvm_pause 0.02
  done
  for ((try = 0; try < 500; try++)); do
    exec {__nixvm_error}<>"$2" && return
    __nixvm_pause 0.02
  done
  exit 1
}

__nixvm_login() {
  exec {__nixvm_environment}>&-
  if [[ -r /etc/set-environment ]]; then
    exec {__nixvm_environment}</etc/set-environment
    . /etc/set-environment
  elif [[ -r /etc/profile ]]; then
    . /etc/profile
  fi
  __nixvm_locale=$LC_ALL
  LC_ALL=C  # lengths are in bytes
}

__nixvm_relay() {
  if [[ $__nixvm_own ]]; then echo "$BASHPID" >"$__nixvm_base/relay-$__nixvm_slot/cgroup.procs"; fi
  unset PYTEST_NIXVM_COMMAND
  PATH=$__nixvm_places
  exec cat >&"$1" @CLOSE@
}

__nixvm_relays() {
  exec {__nixvm_out}> >(__nixvm_relay "$__nixvm_port")
  __nixvm_cats=("$!")
  exec {__nixvm_err}> >(__nixvm_relay "$__nixvm_error")
  __nixvm_cats+=("$!")
}

__nixvm_rotate() {
  local cat reader readers=()
  for cat in "${__nixvm_cats[@]}"; do
    exec {reader}<"/proc/$cat/fd/0"
    readers+=("$reader")
  done
  exec {__nixvm_out}>&- {__nixvm_err}>&-
  kill -KILL "${__nixvm_cats[@]}"
  for cat in "${__nixvm_cats[@]}"; do
    while [[ -e /proc/$cat/fd/0 ]]; do __nixvm_pause 0.005; done
  done
  # Somebody has to read on: a daemon must not die of SIGPIPE because nobody listens any more.
  (
    PATH=$__nixvm_places
    cat <&"${readers[0]}" >/dev/null {readers[1]}>&- &
    exec cat <&"${readers[1]}" >/dev/null {readers[0]}>&-
  ) @CLOSE@ &
  if [[ $__nixvm_own ]]; then echo "$!" >"$__nixvm_base/left/cgroup.procs"; fi
  for reader in "${readers[@]}"; do exec {reader}>&-; done
  __nixvm_relays
}

# What a command has left gets a quarter of a second to end by itself, as `>(tee log)` does.
__nixvm_look() {
  local look pid
  __nixvm_left=0
  [[ $__nixvm_own ]] || return
  for ((look = 0; look < 45; look++)); do
    mapfile -t __nixvm_pids <"$__nixvm_own/cgroup.procs"
    ((${#__nixvm_pids[@]} <= 1)) && return
    if ((look < 25)); then
      __nixvm_pause 0.01
      continue
    fi
    for pid in "${__nixvm_pids[@]}"; do
      [[ $pid == "$$" ]] || echo "$pid" >"$__nixvm_base/left/cgroup.procs"
    done
    __nixvm_left=1
  done
}

# Text is passed on without a program start, which would take longer than many a command.
__nixvm_feed() {
  local length text data
  PATH=$__nixvm_places
  while IFS=' ' read -r -u "$__nixvm_port" length text && ((length)); do
    if [[ $text ]]; then
      IFS= read -r -N "$length" -u "$__nixvm_port" data
      printf %s "$data"
    else
      head -c "$length" <&"$__nixvm_port"
    fi
  done
}

# The end of a command with input: tell that the rest of it is not wanted, and swallow that.
__nixvm_fed() {
  printf '\0%s input\n' "$__nixvm_nonce" >&"$__nixvm_out"
  local rest
  if IFS= read -r -N 4096 rest; then PATH=$__nixvm_places cat >/dev/null; fi
  return "$1"
}

__nixvm_fresh() {
  [[ ! -e /etc/set-environment || /etc/set-environment -ef /dev/fd/$__nixvm_environment ]]
}

__nixvm_ready() {
  printf '\0%s ready\n' "$__nixvm_nonce" >&"$__nixvm_out"
  printf '\0%s ready\n' "$__nixvm_nonce" >&"$__nixvm_err"
}

__nixvm_open "$1" "$2"
__nixvm_relays
__nixvm_login
__nixvm_line=mark
if [[ $__nixvm_own ]]; then __nixvm_line=cgroup; fi
printf '\0%s hello %s %s\n' "$__nixvm_nonce" "$$" "$__nixvm_line" >&"$__nixvm_out"
# Half a command, or its input, may have been on its way to the shell before.
if [[ $__nixvm_dirty ]]; then
  PATH=$__nixvm_places grep -aqxF -m 1 -e "$__nixvm_nonce" <&"$__nixvm_port"
else
  while IFS= read -r -u "$__nixvm_port" __nixvm_line && [[ $__nixvm_line != "$__nixvm_nonce" ]]; do
    :
  done
fi
__nixvm_ready
""".replace("@CLOSE@", _CLOSE)

# On one line, so that what is wrong in a command is said to be in its line 1 and not in 137.
_COMMAND = r"""
( if [[ $__nixvm_locale ]]; then LC_ALL=$__nixvm_locale; else unset LC_ALL; fi;
eval "$__nixvm_script" ) >&"$__nixvm_out" 2>&"$__nixvm_err" @CLOSE@
"""
LOOP = (
    r"""
eval "$9"; set --;
while IFS=' ' read -r -u "$__nixvm_port" __nixvm_kind __nixvm_length __nixvm_nonce; do
  case $__nixvm_kind in
    rotate) __nixvm_rotate; __nixvm_ready; continue;;
  esac;
  IFS= read -r -N "$__nixvm_length" -u "$__nixvm_port" __nixvm_script || break;
  __nixvm_fresh || __nixvm_login;
  if [[ $__nixvm_kind == run ]]; then
    @COMMAND@ </dev/null;
  else
    __nixvm_feed | {
      @COMMAND@;
      __nixvm_fed "$?"; };
  fi;
  __nixvm_status=$?;
  __nixvm_look;
  printf '\0%s end %d %d\n' "$__nixvm_nonce" "$__nixvm_status" "$__nixvm_left" >&"$__nixvm_out";
  printf '\0%s end %d %d\n' "$__nixvm_nonce" "$__nixvm_status" "$__nixvm_left" >&"$__nixvm_err";
done
""".replace("@COMMAND@", _COMMAND.strip())
    .replace("@CLOSE@", _CLOSE)
    .strip()
    .replace("\n", " ")
)


def starter(
    *,
    slot: int,
    main: str,
    error: str,
    nonce: str,
    dirty: bool,
    marks: tuple[str, ...],
    pid: str,
    places: Places,
) -> str:
    """Return the bash text that ends the shell of a slot and starts another on the same ports.

    `main` and `error` are the ports' names, `nonce` is what the shell says hello with. `dirty` says
    that the ports may hold something from before. `marks` and `pid` are for guests without
    cgroups: the shell before, and the marks of the commands that it was given.
    """
    values = {
        "slot": str(slot),
        "main": main,
        "error": error,
        "nonce": nonce,
        "places": reap.PATH,
        "dirty": "1" if dirty else "",
        "definitions": _DEFINITIONS,
        "loop": LOOP,
        **vars(places),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    # The shell first: its relays are its children, and `reap` would count them in.
    killing = [f"kill -KILL {shlex.quote(pid)} 2>/dev/null"] if pid else []
    killing += [f"{shlex.join(reap.argv(mark))}" for mark in marks]
    lines.append("reap() { " + "\n".join([*killing, ":"]) + "\n}")
    return "\n".join(lines) + _STARTER


# --- one command ------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# Variables that bash does not let anybody set.
_READONLY = frozenset({"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"})
_LOGIN = (
    "if [ -r /etc/set-environment ]; then . /etc/set-environment; "
    "elif [ -r /etc/profile ]; then . /etc/profile; fi >/dev/null 2>&1"
)


def compose(
    command: Command,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    mark: str | None = None,
) -> bytes:
    """Return the bash text that runs a command as `Shell.run` describes it.

    `mark` is the value of `reap.MARK` for guests without cgroups. Raises `ValueError` for an empty
    argv, and for a NUL character, which no command line can hold.
    """
    if not isinstance(command, str) and not command:
        raise ValueError("an empty argv can't be run")
    env = dict(env or {})
    if mark is not None:
        env[reap.MARK] = mark
    first = []
    if not isinstance(command, str):
        first.append(f"PATH=$PATH:{reap.PATH}")
    plain = {name: value for name, value in env.items() if _exportable(name)}
    strange = [f"{name}={value}" for name, value in env.items() if not _exportable(name)]
    if plain:
        first.append(
            "export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in plain.items())
        )
    if cwd is not None:
        first.append(f"CDPATH= cd -- {shlex.quote(cwd)} >/dev/null || exit {NOT_STARTED}")
    if not isinstance(command, str):
        words = ["env", "--", *strange, *command] if strange else list(command)
        first.append(f"exec -- {shlex.join(words)}")
    elif strange:
        first.append(f'exec env -- {shlex.join(strange)} "$BASH" -c {shlex.quote(command)}')
    else:
        first.append(command)
    # All of it before the command on one line: an error's line number is the command's own.
    text = "; ".join(first)
    if user is not None:
        text = _as_user(user, f"{_LOGIN}; {text}" if isinstance(command, str) else text)
    if "\0" in text:
        raise ValueError("a command, its environment and its directory can't hold a NUL character")
    return f"{text}\n".encode("utf-8", "surrogateescape")


def _exportable(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name not in _READONLY


def _as_user(user: str, text: str) -> str:
    # runuser keeps root's environment, and with --login it would take no argv. Without the
    # chmod the user could not open /dev/stdout, which is root's pipe.
    name = shlex.quote(user)
    home = f"~{user}" if _USER.fullmatch(user) else f'"$(getent passwd {name} | cut -d: -f6)"'
    inner = f"export USER={name} LOGNAME={name} HOME={home}; {text}"
    return (
        f"PATH=$PATH:{reap.PATH}; chmod a+w /proc/self/fd/1 /proc/self/fd/2; "
        f'exec runuser -u {name} -- "$BASH" -c {shlex.quote(inner)}'
    )
