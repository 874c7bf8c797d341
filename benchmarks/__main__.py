"""The benchmarks' command line."""

from __future__ import annotations

import importlib

import click

BENCHMARKS = ("channels",)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("names", nargs=-1, type=click.Choice(BENCHMARKS))
@click.option("--rounds", default=100, show_default=True, help="How often each contender runs.")
@click.option("--pytest-arguments", default="", help="Which nixpkgs; the stand-in if not given.")
def main(names: tuple[str, ...], rounds: int, pytest_arguments: str) -> None:
    """Measure side by side; without names, everything."""
    for name in names or BENCHMARKS:
        importlib.import_module(f"benchmarks.{name}").main(rounds, pytest_arguments.split())


main()
