"""`nixvm build`: a machine's VM, its real system, or an image."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from pytest_nixvm.cli.common import Context, with_flake
from pytest_nixvm.cli.completion import complete_machines
from pytest_nixvm.cli.texts import emit_json
from pytest_nixvm.errors import FlakeError, SettingsError, UserError
from pytest_nixvm.flake import explain
from pytest_nixvm.flake.build import MachineInfo, Override
from pytest_nixvm.flake.nix import NixFailure
from pytest_nixvm.flake.places import Cache, log_file
from pytest_nixvm.flake.reference import FlakeReference, git_root

_EVALUATION_TIMEOUT = 600.0  # seconds
_BUILD_TIMEOUT = 7200.0
_ATTRIBUTE = "config.system.build.toplevel"
_PARTS = 'x: { derivation = x.drvPath; output = x.outPath; name = x.outputName or "out"; }'


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


@click.command()
@click.argument(
    "names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_machines
)
@with_flake
@click.option("--toplevel", is_flag=True, help="The real machine's system, not its VM.")
@click.option("--image", "image_format", metavar="FORMAT", help="An image: qcow2, raw, iso, …")
@click.option(
    "--out-link",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Link to what was built, as nix build has it (default: no link; the cache has one).",
)
@click.option("--json", "as_json", is_flag=True, help="Write what was built for scripts.")
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
    if out_link is not None and len(names) > 1:
        raise click.UsageError("--out-link is for one machine.")
    if out_link is not None:
        _check_link(out_link)
    every = [context.named(name) for name in dict.fromkeys(names)]
    results = []
    for info in every:
        if toplevel:
            made = real_system(context, info)
        elif image_format is not None:
            made = _image(context, info, image_format)
        else:
            made = _vm(context, info)
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


def _image(context: Context, info: MachineInfo, image_format: str) -> Made:
    flake: Any = context.flake
    build = flake.image(info.name, image_format)
    return Made(
        info.name,
        image_format,
        Path(build.file),
        Path(build.output),
        build.toplevel and Path(build.toplevel),
        tuple(build.overrides),
    )


def real_system(context: Context, info: MachineInfo) -> Made:
    """Build the system that the real machine runs, nothing of ours in it.

    Raises:
        EvaluationError, BuildError: nix can't.
        NotAVirtualMachineError: it is no NixOS configuration.
    """
    flake, nix, settings = context.flake, context.catalogue.nix, context.settings
    flake.real_toplevel(info.name)  # with the messages that it has for what is no system
    url = flake.reference.url
    subject = _subject(flake.reference, info.attribute)
    began = time.monotonic()
    step = context.progress.step(f"Building {info.name}'s system")
    try:
        with log_file(context.catalogue.out.shared("nix"), f"build-{info.name}-real") as (
            write,
            path,
        ):
            try:
                answer = nix.evaluate(
                    f"{url}#{info.attribute}.{_ATTRIBUTE}",
                    _PARTS,
                    overrides=settings.override_input,
                    timeout=_EVALUATION_TIMEOUT,
                    watch=step.update,
                    write=write,
                ).value
            except NixFailure as failure:
                raise explain.evaluation_failed(failure, subject) from None
            digest = hashlib.blake2b(
                repr((url, info.attribute, settings.override_input)).encode(), digest_size=8
            ).hexdigest()
            cache = Cache(settings.cache)
            cache.prepare()
            safe = re.sub(r"[^A-Za-z0-9._-]", "_", info.name)
            try:
                nix.realise(
                    answer["derivation"],
                    answer["name"],
                    cache.roots / f"{safe}-real-{digest}",
                    timeout=_BUILD_TIMEOUT,
                    watch=step.update,
                    write=write,
                )
            except NixFailure as failure:
                raise explain.build_failed(failure, subject, path) from None
    except BaseException as error:
        step.fail("failed" if isinstance(error, UserError) else "")
        raise
    step.finish()
    output = Path(answer["output"])
    seconds = time.monotonic() - began
    return Made(info.name, "toplevel", output, output, output, (), seconds)


def _subject(reference: FlakeReference, attribute: str) -> explain.Subject:
    trees = []
    if reference.local is not None:
        in_git = reference.url.startswith("git+file:")
        root = git_root(reference.local) if in_git else None
        trees.append(explain.Tree(root or reference.local, reference.local, in_git))
    return explain.Subject(f"{attribute} of {reference.local or reference.url}",
                           reference.url, trees)  # fmt: skip


def _check_link(link: Path) -> None:
    if link.exists() and not link.is_symlink():
        raise SettingsError(f"--out-link {link}: that exists, and is no link. Nothing was built.")
    if not link.absolute().parent.is_dir():
        raise SettingsError(f"--out-link {link}: there is no directory {link.absolute().parent}.")


def _linked(context: Context, made: Made, link: Path) -> Made:
    """Make a link that also keeps it from being collected."""
    _check_link(link)
    try:
        context.catalogue.nix.realise(
            str(made.output), "", link.absolute(), timeout=_EVALUATION_TIMEOUT
        )
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
    elif made.kind != "toplevel":
        click.echo(f"{made.name}: nothing differs from its own configuration.", err=True)
