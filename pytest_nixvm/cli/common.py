"""What the commands that look into a flake have in common."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from pytest_nixvm.catalogue import Catalogue
from pytest_nixvm.cli.completion import complete_directories
from pytest_nixvm.errors import FlakeError
from pytest_nixvm.flake.build import MachineInfo
from pytest_nixvm.flake.flake import Flake
from pytest_nixvm.flake.words import near
from pytest_nixvm.fleet import Fleet
from pytest_nixvm.progress import Deferred, Progress
from pytest_nixvm.settings import Settings

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Context:
    """A flake, and what the user said of how to use it. Nothing is evaluated before it is needed.

    `context.fleet(memory=1024)` is a fleet with other settings; `progress` is shown on stderr.
    """

    def __init__(self, **options: object) -> None:
        self._options = options

    @cached_property
    def settings(self) -> Settings:
        """The command's options, as pytest would have them. Raises `SettingsError`."""
        return self.with_changes()

    def with_changes(self, **changes: object) -> Settings:
        """Return the settings with others besides, by the names of pytest's options."""
        return Settings.make(**{**self._options, **changes})

    @cached_property
    def progress(self) -> Progress:
        """Where steps are shown: a live table on a terminal, else a line for each."""
        return Deferred(_terminal)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The flake's machines and their builds."""
        return Catalogue(self.settings, progress=self.progress)

    @property
    def flake(self) -> Flake:
        """The flake itself. Raises `UserError`."""
        return self.catalogue.flake

    def named(self, name: str) -> MachineInfo:
        """Return the machine of that name, `dev-vm@qcow2` being one that boots from an image.

        Raises `FlakeError` if there is none, or if it can't run here.
        """
        machine = self.catalogue.machine(name)
        if machine is not None:
            if machine.skip:
                raise FlakeError(f"{name} can't be used here: {machine.skip}.")
            return machine
        names = [machine.name for machine in self.catalogue.every_machine]
        raise FlakeError(
            f"{self.settings.flake} has no machine {name!r}{near(name, names)} "
            f"Its machines: {', '.join(names) or 'none'}."
        )

    @contextlib.contextmanager
    def fleet(self, **changes: object) -> Iterator[Fleet]:
        """Give a fleet, and end all that it started behind the block."""
        with Fleet(self.with_changes(**changes), progress=self.progress) as fleet:
            yield fleet


def with_flake(command: _Command) -> _Command:
    """Give a command the options that name the flake, and a `context` made of them.

    Each is nix's or pytest's option of that name, and may be set by a variable, `NIXVM_FLAKE` and
    so on: `NIXVM_OVERRIDE_INPUT="nixpkgs path:/somewhere"`.
    """

    @wraps(command)
    def wrapped(
        flake: str,
        override_input: tuple[tuple[str, str], ...],
        nix_option: tuple[tuple[str, str], ...],
        cache: Path | None,
        offline: bool,
        **others: Any,
    ) -> Any:
        _check_pairs()
        context = Context(
            flake=flake,
            override_input=override_input,
            nix_option=nix_option,
            cache=None if cache is None else str(cache),
            offline=offline,
        )
        try:
            return command(context=context, **others)
        finally:
            context.progress.close()

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


def _check_pairs() -> None:
    # click leaves out a last word that has none to go with, without a word.
    for variable in map(_variable, ("--override-input", "--nix-option")):
        words = os.environ.get(variable, "").split()
        if len(words) % 2:
            raise click.UsageError(f"{variable} should be names and values in turn: {words[-1]!r}.")


def _variable(option: str) -> str:
    return f"NIXVM_{option.strip('-').replace('-', '_').upper()}"


def _pairs(name: str, values: tuple[str, str], text: str) -> Callable[[_Command], _Command]:
    return click.option(
        name,
        type=(str, str),
        metavar=" ".join(values),
        multiple=True,
        envvar=_variable(name),
        help=text,
    )


_OPTIONS = (
    click.option(
        "--flake",
        metavar="REF",
        default=".",
        show_default=True,
        envvar="NIXVM_FLAKE",
        shell_complete=complete_directories,
        help="The flake: ., a path, github:…",
    ),
    _pairs("--override-input", ("NAME", "REF"), "Use REF for the flake's input NAME, as nix does."),
    _pairs("--nix-option", ("NAME", "VALUE"), "Set a Nix option for every nix call."),
    click.option(
        "--cache",
        metavar="DIR",
        type=click.Path(file_okay=False, path_type=Path),
        envvar="NIXVM_CACHE",
        help="Where builds and logs are kept (default: the user's cache).",
    ),
    click.option("--offline", is_flag=True, envvar="NIXVM_OFFLINE", help="Fetch nothing."),
)


def _terminal() -> Progress:
    # Not at the top: it loads rich, which commands that take no time do without.
    from pytest_nixvm.report.progress import TerminalProgress

    return TerminalProgress(sys.stderr, live=sys.stderr.isatty(), before=lambda: None)
