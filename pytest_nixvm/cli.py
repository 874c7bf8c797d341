"""The `nixvm` command: what pytest-nixvm keeps on this computer, without starting anything."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import platformdirs

from pytest_nixvm.errors import NixvmError
from pytest_nixvm.store import DEFAULT_LIMIT, Info, Store

_WHAT = "nixvm looks after what pytest-nixvm (tests of NixOS VMs) keeps between runs."
_SHOWN = 12  # characters of a key, enough to tell entries apart


class _Group(click.Group):
    """Says what the command is before how it is called; without a subcommand, that is all."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.parent is None:
            formatter.write_text(_WHAT)
            formatter.write_paragraph()
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


@click.group(cls=_Group)
@click.version_option(package_name="pytest-nixvm")
def nixvm() -> None:
    """The tests themselves are run by pytest; `pytest --help` has its options."""


@nixvm.group(cls=_Group)
def cache() -> None:
    """Templates of machines, from which tests start in a moment."""


def _store(_context: click.Context, _option: click.Parameter, directory: Path | None) -> Store:
    base = directory or platformdirs.user_cache_path("pytest-nixvm")
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
    help="The cache, as --nixvm-cache has it (default: the user's).",
)


@cache.command("list")
@_with_store
def list_entries(store: Store) -> None:
    """Show what is kept, the last used first."""
    infos = store.entries()
    if infos:
        _table(infos)
    total = _size(sum(info.size for info in infos))
    click.echo(f"{_count(infos)} in {store.directory}, {total}.")


@cache.command()
@click.argument("keys", nargs=-1, metavar="[KEY|MACHINE]...")
@_with_store
def clear(store: Store, keys: Sequence[str]) -> None:
    """Remove templates that are not in use: those named, or all.

    A key may be shortened, as `list` does.
    """
    infos = store.entries()
    wanted = {info.key for word in keys for info in _named(infos, word)} if keys else None
    removed = store.clear(None if wanted is None else sorted(wanted))
    click.echo(f"Removed {_count(removed)}, {_size(sum(info.size for info in removed))}.")
    gone = {info.key for info in removed}
    kept = [info for info in store.entries() if wanted is None or info.key in wanted]
    for info in kept:
        if info.key not in gone:
            why = "is in use" if info.in_use else "can't be removed"
            click.echo(f"{_label(info)} {why}: it stays.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status. What is the user's mistake is one line, and 2."""
    try:
        result = nixvm.main(
            args=None if arguments is None else list(arguments),
            prog_name="nixvm",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except click.ClickException as error:
        click.echo(f"nixvm: {_line(error)}", err=True)
        return 2
    except NixvmError as error:
        click.echo(f"nixvm: {error}", err=True)
        return 2
    except click.Abort:
        return 130
    except BrokenPipeError:
        # `nixvm cache list | head`: nobody reads on, Python's own flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0


def _line(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text += f"{'' if text.endswith(('.', '?')) else '.'} See {error.ctx.command_path} --help."
    return text


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
    # Not at the top: `clear` and `--help` do without.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("key", "machine", "size", "made", "last used", "state"):
        table.add_column(title, no_wrap=True, overflow="ignore")
    table.columns[2].justify = "right"
    for info in infos:
        cells = (
            info.key[:_SHOWN],
            info.name or "?",
            _size(info.size),
            _when(info.created),
            _when(info.used),
            _state(info),
        )
        table.add_row(*(Text(cell) for cell in cells))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # for grep and awk: nothing is cut
    console.print(table)


def _state(info: Info) -> str:
    if info.complete:
        return "in use" if info.in_use else "ready"
    return "being made" if info.in_use else "unfinished"


def _label(info: Info) -> str:
    return f"{info.name} ({info.key[:_SHOWN]})" if info.name else info.key[:_SHOWN]


def _count(infos: Sequence[Info]) -> str:
    return "1 template" if len(infos) == 1 else f"{len(infos)} templates"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _size(size: int) -> str:
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
