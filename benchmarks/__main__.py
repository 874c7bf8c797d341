"""The benchmarks' command line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click

BENCHMARKS = ("channels", "clones")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("names", nargs=-1, type=click.Choice(BENCHMARKS))
@click.option("--rounds", default=100, show_default=True, help="How often each contender runs.")
@click.option("--pytest-arguments", default="", help="Which nixpkgs; the stand-in if not given.")
@click.option(
    "--json",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the figures go.  [default: benchmarks/results/NAME.json]",
)
def main(names: tuple[str, ...], rounds: int, pytest_arguments: str, file: Path | None) -> None:
    """Measure side by side; without names, everything."""
    for name in names or BENCHMARKS:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        found = benchmark.main(rounds, pytest_arguments.split())
        if found is not None:
            path = file or Path(__file__).parent / "results" / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            click.echo(f"{path}")


main()
