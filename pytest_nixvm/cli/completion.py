"""`nixvm completion`: what a shell needs, and the names of machines for it.

A key press must not wait for nix: the names are those of the last evaluation, which may have
changed since. Where nothing is remembered, nothing is offered.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import click
import platformdirs
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from pytest_nixvm.errors import NixvmError
from pytest_nixvm.flake.reference import locate

_SHELLS = ("bash", "zsh", "fish")
_BEGINS = b'{"question": "machines", '  # as flake.remember writes a record
_MOST = 500  # records that are looked at
_HOW = {
    "bash": 'eval "$(nixvm completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(nixvm completion zsh)" in ~/.zshrc, behind compinit',
    "fish": "nixvm completion fish > ~/.config/fish/completions/nixvm.fish",
}


@click.command(epilog="; ".join(f"{shell}: {how}" for shell, how in _HOW.items()) + ".")
@click.argument("shell", type=click.Choice(_SHELLS), required=False)
def command(shell: str | None) -> None:
    """Print what a shell needs to complete commands and machines.

    SHELL is bash, zsh or fish; by default the one of the log-in.
    """
    if shell is None:
        shell = Path(os.environ.get("SHELL", "")).name
        if shell not in _SHELLS:
            raise click.UsageError(f"For which shell: {', '.join(_SHELLS)}?")
    kind = get_completion_class(shell)
    root = click.get_current_context().find_root()
    if kind is None:
        raise click.UsageError(f"This click can't complete in {shell}.")
    # Not the class's own source(): bash's runs bash, only to complain of old ones.
    text = ShellComplete.source(kind(root.command, {}, "nixvm", "_NIXVM_COMPLETE"))
    click.echo(text.strip())


def complete_machines(
    context: click.Context,
    parameter: click.Parameter,
    incomplete: str,
) -> list[CompletionItem]:
    """Complete a machine's name: for click's `shell_complete=`. Never an error, never slow."""
    try:
        given = context.params.get(parameter.name or "") or ()
        used = {given} if isinstance(given, str) else set(given)
        reference = context.params.get("flake") or os.environ.get("NIXVM_FLAKE") or "."
        directory = context.params.get("cache") or os.environ.get("NIXVM_CACHE")
        cache = Path(directory) if directory else platformdirs.user_cache_path("pytest-nixvm")
        names = remembered_names(str(reference), cache)
    except Exception:  # a shell's prompt is no place for one
        return []
    return [CompletionItem(n) for n in names if n.startswith(incomplete) and n not in used]


def complete_directories(
    context: click.Context,  # noqa: ARG001 - click's signature
    parameter: click.Parameter,  # noqa: ARG001
    incomplete: str,
) -> list[CompletionItem]:
    """Have the shell complete a directory: for click's `shell_complete=`."""
    return [CompletionItem(incomplete, type="dir")]


def remembered_names(reference: str, cache: Path) -> Sequence[str]:
    """Return the machines that a flake had when it was last looked at, none if it never was."""
    try:
        url, _ = locate(reference.partition("#")[0] or ".", Path.cwd())
    except NixvmError:
        return ()
    dated = []
    with contextlib.suppress(OSError), os.scandir(cache / "evaluations") as entries:
        for entry in entries:
            if entry.name.endswith(".json"):
                dated.append((entry.stat().st_mtime_ns, entry.path))
    for _, path in sorted(dated, reverse=True)[:_MOST]:
        names = _names(Path(path), url)
        if names is not None:
            return names
    return ()


def _names(path: Path, url: str) -> Sequence[str] | None:
    """Return the machines of a record, None if it is of another question or flake."""
    try:
        with path.open("rb") as file:
            if file.read(len(_BEGINS)) != _BEGINS:
                return None
            record = json.loads(_BEGINS + file.read())
        if url not in record["trees"]:
            return None
        return sorted(record["answer"]["systems"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
