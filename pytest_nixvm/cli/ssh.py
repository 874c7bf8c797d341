"""`nixvm ssh`: OpenSSH into a VM that `nixvm run` has started."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pytest_nixvm import running
from pytest_nixvm.cli.completion import complete_directories
from pytest_nixvm.control import ask
from pytest_nixvm.errors import MissingProgramError, NixvmError
from pytest_nixvm.flake.reference import locate


def complete_running(
    context: click.Context,  # noqa: ARG001 - click's signature
    parameter: click.Parameter,  # noqa: ARG001
    incomplete: str,
) -> list[CompletionItem]:
    """Complete the name of a VM that runs: for click's `shell_complete=`."""
    names = running.running_names()
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


_OPTIONS = (
    # What ssh says of itself is of no use to anybody here, errors aside.
    *("-o", "LogLevel=ERROR"),
    # A guest that is cut off in the middle of it never answers: QEMU took the connection for it.
    *("-o", "ConnectTimeout=30", "-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=6"),
)

flake_option = click.option(
    "--flake",
    metavar="REF",
    envvar="NIXVM_FLAKE",
    shell_complete=complete_directories,
    help="Its flake, where VMs of several flakes have that name (default: the one here).",
)


def running_vm(name: str, flake: str | None) -> running.Running:
    """Return the VM that is meant. Raises `UserError` if it does not run."""
    url: str | None = None
    try:
        url = locate((flake or ".").partition("#")[0] or ".", Path.cwd())[0]
    except NixvmError:
        if flake is not None:
            raise
    return running.find(name, url, strict=flake is not None)


@click.command(context_settings={"allow_interspersed_args": False})  # behind NAME all is COMMAND
@click.argument("name", metavar="NAME", shell_complete=complete_running)
@click.argument("words", metavar="[COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@flake_option
@click.option(
    "-l", "--user", metavar="USER", help="As whom (default: root, or who may log in with a key)."
)
@click.option("-t", "--tty", is_flag=True, help="Give COMMAND a terminal, as ssh -t does.")
@click.option(
    "--print", "only_print", is_flag=True, help="Print the ssh command, for scp, rsync and others."
)
def command(
    name: str,
    words: Sequence[str],
    flake: str | None,
    user: str | None,
    tty: bool,
    only_print: bool,
) -> None:
    """Log in to a running VM, or run COMMAND there, as ssh does.

    The exit status is COMMAND's. The key is made for this run of the VM and ends with it; the VM's
    own host key is known.
    """
    entry = running_vm(name, flake)
    program = shutil.which("ssh")
    if program is None and not only_print:
        raise MissingProgramError(
            "`ssh` is not on PATH. Install OpenSSH's client; `nixvm console` needs none."
        )
    connection, answer = ask(name, entry.control, {"op": "ssh", "user": user})
    connection.close()
    _, *argv = (str(word) for word in answer["argv"])
    if only_print:
        click.echo(shlex.join(["ssh", *argv]))
        return
    _become([str(program), *_OPTIONS, *(["-t"] if tty else []), *argv, *words])


def _become(argv: Sequence[str]) -> None:
    """Let ssh take our place: signals, the terminal and the exit status are its own."""
    os.execv(argv[0], [*argv])  # noqa: S606 - no shell is wanted
