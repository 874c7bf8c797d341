"""`nixvm build`: a machine's VM, its real system, or an image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from pytest_nixvm.cli.common import Context, with_flake
from pytest_nixvm.cli.completion import complete_machines
from pytest_nixvm.cli.texts import emit_json
from pytest_nixvm.errors import FlakeError, SettingsError
from pytest_nixvm.flake.build import MachineInfo, Override
from pytest_nixvm.flake.images import known_as, split
from pytest_nixvm.flake.nix import NixFailure

_LINK_TIMEOUT = 600.0  # seconds


@dataclass(frozen=True)
class Made:
    """What was built, and rooted in the cache."""

    name: str
    kind: str  # vm, toplevel, or an image's format
    path: Path  # what one is after: the start script, the system, the image's file
    output: Path  # in the store
    toplevel: Path | None = None
    overrides: tuple[Override, ...] = ()
    seconds: float = 0.0
    out_link: Path | None = field(default=None)


Make = Callable[[Context, MachineInfo], Made]
Command = TypeVar("Command", bound=Callable[..., Any])

with_names = click.argument(
    "names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_machines
)


def with_delivery(command: Command) -> Command:
    """Give a command the options of `deliver`."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Write it for scripts.")
    out_link = click.option(
        "--out-link",
        metavar="PATH",
        type=click.Path(path_type=Path),
        help="Link to what was built, as nix build has it (default: no link; the cache has one).",
    )
    return out_link(as_json(command))


@click.command()
@with_names
@with_flake
@click.option("--toplevel", is_flag=True, help="The real machine's system, not its VM.")
@click.option("--image", "image_format", metavar="FORMAT", help="An image: qcow2, raw, iso, …")
@with_delivery
def command(
    context: Context,
    names: Sequence[str],
    toplevel: bool,
    image_format: str | None,
    out_link: Path | None,
    as_json: bool,
) -> None:
    """Build machines: the VM's start script, say, of which the path is printed.

    What differs from the machine's own configuration is told on stderr.
    """
    if toplevel and image_format is not None:
        raise click.UsageError("--toplevel and --image are two things: give one.")
    if toplevel:
        make: Make = _real
    elif image_format is not None:
        names, found = one_format(context, names, image_format)
        make = partial(make_image, image_format=found or image_format)
    else:
        make = _vm
    deliver(context, names, make, out_link=out_link, as_json=as_json)


def one_format(
    context: Context, names: Sequence[str], image_format: str | None
) -> tuple[list[str], str | None]:
    """Return the names of machines, and the one format of which their images are to be.

    It is given apart, or by a name such as dev-vm@ova; None if nobody names one. It need be none
    that could be booted. Raises `click.UsageError` for several.
    """
    apart = [_apart(context, name) for name in names]
    given = {known_as(text) for text in (image_format, *(form for _, form in apart)) if text}
    if len(given) > 1:
        raise click.UsageError("That is more than one format: build them one after the other.")
    return [name for name, _ in apart], given.pop() if given else None


def _apart(context: Context, name: str) -> tuple[str, str | None]:
    machine = next((each for each in context.catalogue.every_machine if each.name == name), None)
    return split(name) if machine is None else (name, machine.image)


def deliver(
    context: Context,
    names: Sequence[str],
    make: Make,
    *,
    out_link: Path | None,
    as_json: bool,
) -> None:
    """Make something of each machine, and print where it is. Raises as `make`."""
    if out_link is not None and len(names) > 1:
        raise click.UsageError("--out-link is for one machine.")
    if out_link is not None:
        _check_link(out_link)
    results = []
    for info in [context.named(name) for name in dict.fromkeys(names)]:
        made = make(context, info)
        if out_link is not None:
            made = _linked(context, made, out_link)
        results.append(made)
    context.progress.close()
    if as_json:
        emit_json([_data(made) for made in results])
        return
    for made in results:
        _tell(made)
        click.echo(made.path)


def _vm(context: Context, info: MachineInfo) -> Made:
    build = context.catalogue.build(info.name)
    seconds = build.evaluated + build.built
    return Made(
        info.name, "vm", build.start_script, build.output, build.toplevel, build.overrides, seconds
    )


def make_image(context: Context, info: MachineInfo, image_format: str) -> Made:
    """Build an image as the configuration has it, nothing of ours in it.

    Raises:
        FlakeError: there is no such format.
        EvaluationError, BuildError: nix can't.
    """
    image = context.flake.image(info.name, image_format)
    return Made(
        image.name,
        image.format,
        image.file,
        image.output,
        image.toplevel,
        image.overrides,
        image.seconds,
    )


def _real(context: Context, info: MachineInfo) -> Made:
    began = time.monotonic()
    path = context.flake.build_real(info.name)
    return Made(info.name, "toplevel", path, path, path, (), time.monotonic() - began)


def _check_link(link: Path) -> None:
    if link.exists() and not link.is_symlink():
        raise SettingsError(f"--out-link {link}: that exists, and is no link. Nothing was built.")
    if not link.absolute().parent.is_dir():
        raise SettingsError(f"--out-link {link}: there is no directory {link.absolute().parent}.")


def _linked(context: Context, made: Made, link: Path) -> Made:
    """Make a link that also keeps it from being collected."""
    _check_link(link)
    try:
        context.catalogue.nix.realise(str(made.output), "", link.absolute(), timeout=_LINK_TIMEOUT)
    except NixFailure as failure:
        raise FlakeError(f"--out-link {link} can't be made: {failure}") from None
    return Made(**{**made.__dict__, "out_link": link})


def _data(made: Made) -> dict[str, object]:
    return {
        "name": made.name,
        "kind": made.kind,
        "path": str(made.path),
        "output": str(made.output),
        "toplevel": None if made.toplevel is None else str(made.toplevel),
        "overrides": [
            {"option": o.option, "value": o.value, "reason": o.reason} for o in made.overrides
        ],
        "seconds": round(made.seconds, 1),
        "outLink": None if made.out_link is None else str(made.out_link),
    }


def _tell(made: Made) -> None:
    if made.overrides:
        click.echo(f"{made.name}: differs from its own configuration in", err=True)
        for o in made.overrides:
            click.echo(f"  {o.option} = {o.value}  ({o.reason})", err=True)
    elif made.kind == "vm":
        click.echo(f"{made.name}: nothing differs from its own configuration.", err=True)
