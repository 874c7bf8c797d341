"""`nixvm cache`: what pytest-nixvm keeps on this computer, without starting anything."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import platformdirs

from pytest_nixvm.cli import HelpfulGroup
from pytest_nixvm.cli.texts import size, table, when
from pytest_nixvm.store import DEFAULT_LIMIT, Info, Store

_SHOWN = 12  # characters of a key, enough to tell entries apart


@click.group(cls=HelpfulGroup)
def command() -> None:
    """Templates of machines, from which tests start in a moment."""


def _store(_context: click.Context, _option: click.Parameter, directory: Path | None) -> Store:
    named = os.environ.get("NIXVM_CACHE")  # as for the commands that look into a flake
    base = directory or (Path(named) if named else platformdirs.user_cache_path("pytest-nixvm"))
    # Not resolve(): a link that the user names stays what the messages name.
    templates = Path(os.path.normpath(base.absolute())) / "templates"
    if templates.exists() and not os.access(templates, os.R_OK | os.X_OK):
        raise click.ClickException(f"{templates} can't be read: permission denied.")
    return Store(templates, DEFAULT_LIMIT)


_with_store = click.option(
    "--cache",
    "store",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    callback=_store,
    help="The cache, as --nixvm-cache has it (default: NIXVM_CACHE, or the user's).",
)


@command.command("list")
@_with_store
def list_entries(store: Store) -> None:
    """Show what is kept, the last used first."""
    infos = store.entries()
    if infos:
        _table(infos)
    total = size(sum(info.size for info in infos))
    click.echo(f"{_count(infos)} in {store.directory}, {total}.")


@command.command()
@click.argument("keys", nargs=-1, metavar="[KEY|MACHINE]...")
@_with_store
def clear(store: Store, keys: Sequence[str]) -> None:
    """Remove templates that are not in use: those named, or all.

    A key may be shortened, as `list` does.
    """
    infos = store.entries()
    wanted = {info.key for word in keys for info in _named(infos, word)} if keys else None
    removed = store.clear(None if wanted is None else sorted(wanted))
    click.echo(f"Removed {_count(removed)}, {size(sum(info.size for info in removed))}.")
    gone = {info.key for info in removed}
    kept = [info for info in store.entries() if wanted is None or info.key in wanted]
    for info in kept:
        if info.key not in gone:
            why = "is in use" if info.in_use else "can't be removed"
            click.echo(f"{_label(info)} {why}: it stays.")


def _named(infos: Iterable[Info], word: str) -> list[Info]:
    """Return a machine's entries, or the one whose key begins with `word`."""
    infos = list(infos)
    of_machine = [info for info in infos if info.name == word]
    if of_machine:
        return of_machine
    found = [info for info in infos if info.key.startswith(word)] if word else []
    if not found:
        raise click.ClickException(f"No template is called {word!r}: see nixvm cache list.")
    if len(found) > 1:
        raise click.ClickException(f"{word!r} begins {len(found)} keys: give more of it.")
    return found


def _table(infos: Sequence[Info]) -> None:
    rows = [
        (
            info.key[:_SHOWN],
            info.name or "?",
            size(info.size),
            when(info.created),
            when(info.used),
            _state(info),
        )
        for info in infos
    ]
    table(("key", "machine", "size", "made", "last used", "state"), rows, right=[2])


def _state(info: Info) -> str:
    if info.complete:
        return "in use" if info.in_use else "ready"
    return "being made" if info.in_use else "unfinished"


def _label(info: Info) -> str:
    return f"{info.name} ({info.key[:_SHOWN]})" if info.name else info.key[:_SHOWN]


def _count(infos: Sequence[Info]) -> str:
    return "1 template" if len(infos) == 1 else f"{len(infos)} templates"
