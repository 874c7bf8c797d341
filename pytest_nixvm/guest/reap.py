"""Ending a command in the guest together with everything it has started.

A command is started with a mark of its own in the environment, which its children inherit, whatever
sessions or process groups they open and whoever adopts them. To end it, every process that has the
mark is stopped and killed, and so are the descendants of those. (A shell that exports the mark in
the command it was given has it on its command line instead.) It costs nothing until it is needed,
unlike `setsid` or `systemd-run`, which cost a program start for every command.
"""

from __future__ import annotations

import secrets

MARK = "PYTEST_NIXVM_COMMAND"
"""The environment variable; its value is different for each command."""

PATH = ":".join(
    [
        "/run/wrappers/bin",
        "/root/.nix-profile/bin",
        "/nix/var/nix/profiles/default/bin",
        "/run/current-system/sw/bin",
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
    ]
)
"""Where programs are: NixOS's places first, then everybody else's."""

# One grep over all processes instead of one each: a program start is what is slow under TCG.
# Stopped before they are killed, so that nothing forks away in between; looked for again until
# nothing is left. `children` needs CONFIG_PROC_CHILDREN, which NixOS and Debian have.
_SCRIPT = r"""
mark="$1=$2"
round=0
while [ $round -lt 5 ]; do
  round=$((round + 1))
  todo=
  for file in $(printf '%s' "$mark" | grep -lsaF -f - /proc/[0-9]*/environ /proc/[0-9]*/cmdline); do
    pid=${file#/proc/}; pid=${pid%/*}
    [ "$pid" = "$$" ] || todo="$todo $pid"
  done
  [ -n "$todo" ] || exit 0
  all=" "
  set -- $todo
  while [ $# -gt 0 ]; do
    pid=$1; shift
    case $all in *" $pid "*) continue ;; esac
    kill -STOP "$pid" 2>/dev/null || continue
    all="$all$pid "
    for list in /proc/$pid/task/*/children; do
      children=; read -r children 2>/dev/null <"$list"
      set -- "$@" $children
    done
  done
  kill -KILL $all 2>/dev/null
done
exit 1
"""


def new_mark() -> str:
    """Return a value for `MARK` that no other command has."""
    return secrets.token_hex(8)


def argv(mark: str) -> list[str]:
    """Return the command that kills everything marked `mark`.

    It ends with 0 when nothing is left. Name and value are handed over apart, and to grep through a
    pipe, so that neither the killer nor its grep looks like what is to be killed.
    """
    return ["/bin/sh", "-c", f"PATH=$PATH:{PATH}\n{_SCRIPT}", "nixvm-reap", MARK, mark]
