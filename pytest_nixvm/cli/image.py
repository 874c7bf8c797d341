"""`nixvm image`: disk images of machines, by the names that people know their formats by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pytest_nixvm.cli import HelpfulGroup
from pytest_nixvm.cli.build import deliver, make_image, one_format, with_delivery, with_names
from pytest_nixvm.cli.common import Context, with_flake
from pytest_nixvm.cli.completion import complete_machines
from pytest_nixvm.cli.texts import emit_json, table
from pytest_nixvm.flake.images import FORMATS

_DEFAULT = "qcow2"


@click.group(name="image", cls=HelpfulGroup)
def command() -> None:
    """Build disk images of machines.

    What boots under QEMU from such an image is called NAME@FORMAT, by every command and in tests:
    nixvm run dev-vm@ova, pytest --nixvm-machine=dev-vm@qcow2.
    """


def _complete_formats(
    context: click.Context,  # noqa: ARG001 - click's signature
    parameter: click.Parameter,  # noqa: ARG001
    incomplete: str,
) -> list[CompletionItem]:
    return [
        CompletionItem(name, help=each.what)
        for name, each in FORMATS.items()
        if name.startswith(incomplete)
    ]


@command.command()
@with_names
@with_flake
@click.option(
    "--format",
    "image_format",
    metavar="FORMAT",
    shell_complete=_complete_formats,
    help=f"{', '.join(FORMATS)}, or another one that nixpkgs has (default: {_DEFAULT}).",
)
@with_delivery
def build(
    context: Context,
    names: Sequence[str],
    image_format: str | None,
    out_link: Path | None,
    as_json: bool,
) -> None:
    """Build images of machines, and print where they are.

    They are what the configuration says and nothing else. NAME may have the format: dev-vm@ova.
    """
    names, found = one_format(context, names, image_format)
    make = partial(make_image, image_format=found or _DEFAULT)
    deliver(context, names, make, out_link=out_link, as_json=as_json)


@command.command()
@click.argument("name", required=False, metavar="[NAME]", shell_complete=complete_machines)
@with_flake
@click.option("--json", "as_json", is_flag=True, help="Write them for scripts.")
def formats(context: Context, name: str | None, as_json: bool) -> None:
    """Show the formats, or those that there are of one machine.

    The latter asks its nixpkgs, which may have more; only those with a description can be booted.
    """
    there = list(FORMATS) if name is None else context.flake.images(context.named(name).name)
    context.progress.close()
    rows = [(each, FORMATS[each].what if each in FORMATS else "") for each in there]
    if as_json:
        emit_json(
            [
                {"format": each, "what": what or None, "boots": each in FORMATS}
                for each, what in rows
            ]
        )
        return
    table(("format", "what"), rows)
