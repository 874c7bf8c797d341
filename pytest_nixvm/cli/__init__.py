"""The `nixvm` command: the machines of a flake, to look at, build, use and deploy.

Each command has a room of its own, which is loaded when it is called: completion and `--help` are
quick. The tests themselves are run by pytest.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pytest_nixvm.cli.texts import in_words_of_ours, one_line
from pytest_nixvm.errors import BuildError, MachineError, NixvmError

_WHAT = "nixvm builds, runs and deploys the machines of a NixOS flake."
_COMMANDS = {
    "init": "Write a flake to begin with, or a new VM into one.",
    "list": "Show the flake's machines.",
    "build": "Build a machine's VM, system or image.",
    "run": "Start a VM to use: a window or none, a disk that is kept.",
    "ssh": "Log in to a running VM.",
    "console": "Use the serial console of a running VM.",
    "image": "Build images: qcow2, raw, iso, ova, vmdk.",
    "deploy": "Switch a host to its tested system, and back if that fails.",
    "doctor": "Say what this computer lacks, and how to mend it.",
    "cache": "Templates of machines, from which tests start in a moment.",
    "completion": "Print what a shell needs to complete commands and machines.",
}


class HelpfulGroup(click.Group):
    """Without a subcommand it says what there is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Ask for help where nothing is asked for."""
        return super().parse_args(ctx, args or ["--help"])


class _Commands(HelpfulGroup):
    """The commands of `_COMMANDS`, each loaded from the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [*_COMMANDS]  # not list(): that is the name of a command's module here

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"pytest_nixvm.cli.{cmd_name}").command
        return command

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_text(_WHAT)
        formatter.write_paragraph()
        super().format_help(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([*_COMMANDS.items()])


@click.group(cls=_Commands)
@click.version_option(package_name="pytest-nixvm")
def nixvm() -> None:
    """The tests themselves are run by pytest; `pytest --help` has its options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status.

    A mistake of the user's is told in one message, with 2; what failed by itself (a build, a
    machine) with 1.
    """
    try:
        result = nixvm.main(
            args=None if arguments is None else [*arguments],
            prog_name="nixvm",
            standalone_mode=False,
            color=False if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" else None,
        )
        if sys.stdout is not None:  # None: it was closed before we began
            sys.stdout.flush()
    except click.ClickException as error:
        click.echo(f"nixvm: {one_line(error)}", err=True)
        return 2
    except NixvmError as error:
        click.echo(f"nixvm: {in_words_of_ours(str(error))}", err=True)
        return 1 if isinstance(error, BuildError | MachineError) else 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # `nixvm cache list | head`: nobody reads on.
        _no_more_output()
        return 0
    except OSError as error:
        if error.filename is None:  # no room for what is printed, say
            _no_more_output()
        click.echo(f"nixvm: {_trouble(error)}", err=True)
        return 1
    except RuntimeError as error:
        if "home directory" not in str(error):  # as pathlib and platformdirs have it
            raise
        click.echo(f"nixvm: There is no home directory, so set HOME: {error}", err=True)
        return 2
    return result if isinstance(result, int) else 0


def _no_more_output() -> None:
    """Have Python's own flush at the end not complain of what can't be written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _trouble(error: OSError) -> str:
    """Say what this computer has refused, where no command has foreseen it."""
    try:
        Path.cwd()
    except OSError as gone:
        return f"The directory that this is in can't be used: {gone.strerror}. Change to another."
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "A disk is full: that of the output, or of the cache (--cache DIR names another)."
    where = "" if error.filename is None else os.fsdecode(error.filename)
    where = f"{where[:200]}…" if len(where) > 200 else where
    return f"{where}{': ' if where else ''}{error.strerror or error}."
