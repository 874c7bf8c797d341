"""A pristine machine for every test: clones and spares, against boots and other snapshots."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks import memory_use, plot
from benchmarks.cloning import Lab, beside, contenders, pristine
from benchmarks.figures import Figure, fit, number, show
from benchmarks.machines import ROOT, fleet, fork_time, nixpkgs
from benchmarks.runs import Runs
from benchmarks.side_by_side import Contender, measure
from benchmarks.side_by_side import show as show_contenders
from pytest_nixvm import Settings

PLOT = ROOT / "docs" / "clones.svg"
ISOLATED = (1, 64, 256)
TESTS = 20
WHILE = {"true": "a test of `true`", "sleep 0.5": "a test of half a second"}
"""What tests do: nothing, which leaves no time to prepare a spare in; and a little."""


def main(rounds: int, arguments: list[str]) -> dict[str, Any]:
    """Measure and print; return all of it, for JSON. Writes the plot of the docs."""
    arguments = nixpkgs(arguments)
    few = max(2, rounds // 10)
    with _private_cache() as cache:
        with fleet(arguments, cache=str(cache), isolation="test") as machines:
            click.echo("Booting, freezing")
            lab = Lab(machines)
            figures, ways, about = _machines(lab, rounds, few)
        click.echo("Whole runs of pytest")
        more, line = _runs(cache, arguments, few, max(1, rounds // 30))
    figures += more
    show("Clones: medians, goals and limits", figures)
    click.echo(
        f"{'; '.join(f'{k}: {v}' for k, v in about.items())}\n"
        f"1 → 64 → 256 isolated tests: {line['seconds per test'] * 1e3:.0f} ms a test "
        f"+ {line['seconds beside']:.1f} s, R² {line['r2']:.4f}"
    )
    base = next(each for each in ways if each.name == "clone")
    show_contenders("A pristine machine, to the result of `true`", ways, base)
    PLOT.write_text(_plot(ways, about))
    return {
        "about": about,
        "rounds": rounds,
        "figures": [each.to_json() for each in figures],
        "pristine": [
            {"name": each.name, "note": each.note, "median s": each.median, "s": each.seconds}
            for each in ways
        ],
        "isolated tests": line,
    }


# --- in this process ---------------------------------------------------------------------------


def _machines(
    lab: Lab, rounds: int, few: int
) -> tuple[list[Figure], list[Contender], dict[str, str]]:
    them = contenders(lab)
    ways, refused = pristine(lab, max(1, rounds // few))
    click.echo("Clones, spares, and what else there is, in turns")
    measure([*them.values(), *ways.values()], rounds, warm_up=1)
    alone, prepared = Contender("alone", lambda: None), Contender("beside", lambda: None)
    if lab.has_spares:
        for _ in range(few):
            beside(lab, alone, prepared)
    fork = fork_time(lab.vm)
    click.echo("Memory")
    idle, work, bare = memory_use.idle(lab), memory_use.after_work(lab), memory_use.bare(lab)

    qemu = them["qemu"].median * 1e3
    trip = them["round trip"].median * 1e3
    figures = [
        _figure(them["agent"], 150, qemu, "QEMU to its first QMP answer, -S"),
        _figure(them["ready"], None, qemu, "the same"),
        _figure(
            ways["clone"], 300, qemu + fork * 1e3, "the same, and a fork in the guest",
            name="clone: start to the first vm.run",
        ),
    ]  # fmt: skip
    if lab.has_spares:
        figures += [
            _figure(them["spare"], 50, trip, "cont and an agent round trip"),
            _figure(them["resting spare"], 50, trip, "the same"),
            _figure(
                ways["spare"], None, trip + them["run"].median * 1e3, "the same, and a warm vm.run",
                name="spare: start to the first vm.run",
            ),
            _figure(
                them["spare's ssh"], 150, them["ssh"].median * 1e3, "exec on an open connection"
            ),
            Figure(
                "vm.run while a spare is prepared",
                [seconds * 1e3 for seconds in prepared.seconds],
                limit=alone.median * 1e3,
                limit_name=f"vm.run alone ({prepared.note} a time)",
            ),
        ]  # fmt: skip
    boot = ways["boot"]
    figures += [
        Figure(
            "a boot over a clone",
            [boot.median / each for each in ways["clone"].seconds],
            "×",
            60,
            least=True,
        ),
        _memory("memory of each further clone, idle", idle, 60, bare),
        _memory("the same, after 30 MB of work", work, 120, bare),
    ]
    about = {
        "QEMU": ".".join(map(str, lab.template.version)),
        "accelerator": lab.workshop.accelerator(lab.vm.build).name,
        "processors": str(os.cpu_count()),
        "host": f"{platform.machine()}, Linux {platform.release()}",
        "Python": platform.python_version(),
        "guest memory": f"{lab.template.memory} MiB",
        "date": time.strftime("%Y-%m-%d"),
    }
    if not lab.has_spares:
        refused["spares"] = "there is one processor, and that is the test's"
    about |= {f"not measured: {name}": reason for name, reason in refused.items()}
    return figures, list(ways.values()), about


def _figure(
    each: Contender, goal: float | None, limit: float, limit_name: str, name: str = ""
) -> Figure:
    values = [seconds * 1e3 for seconds in each.seconds]
    return Figure(name or each.name, values, goal=goal, limit=limit, limit_name=limit_name)


def _memory(name: str, values: list[float], goal: float, bare: list[float]) -> Figure:
    limit = statistics.median(bare)
    return Figure(name, values, "MiB", goal, limit=limit, limit_name="QEMU alone, -S (PSS)")


# --- in processes of their own -----------------------------------------------------------------


def _runs(
    cache: Path, arguments: list[str], few: int, fewer: int
) -> tuple[list[Figure], dict[str, Any]]:
    place = cache / "tests"
    place.mkdir()
    runs = Runs(place, arguments, cache)
    runs.run(1)  # so that the second is the second
    first, second, bare = [], [], []
    isolated: dict[str, list[float]] = {command: [] for command in WHILE}
    shared: dict[str, list[float]] = {command: [] for command in WHILE}
    for _ in range(few):
        first.append(runs.empty_cache().begins[0])
        second.append(runs.run(1).begins[0])
        bare.append(runs.bare().begins[0])
        for command in WHILE:
            isolated[command].append(runs.run(TESTS, command=command).per_test)
            shared[command].append(runs.run(TESTS, "session", command=command).per_test)
    points = [(count, runs.run(count).seconds) for _ in range(fewer) for count in ISOLATED]
    found = fit(points)
    figures = [
        Figure(
            "second pytest run: shell to the first test's first line",
            [seconds * 1e3 for seconds in second],
            goal=1500,
            limit=statistics.median(bare) * 1e3,
            limit_name="Python and pytest, no plugin",
        ),
        Figure(
            "the first run over the second",
            [statistics.median(first) / seconds for seconds in second],
            "×",
            10,
            least=True,
        ),
        *(_overhead(what, isolated[command], shared[command]) for command, what in WHILE.items()),
    ]
    line = {
        "seconds per test": found.slope,
        "seconds beside": found.intercept,
        "r2": found.r2,
        "points": points,
    }
    return figures, line


def _overhead(what: str, isolated: list[float], shared: list[float]) -> Figure:
    with_session = statistics.median(shared)
    return Figure(
        f"{what}: isolation test over session",
        [(seconds - with_session) * 1e3 for seconds in isolated],
        goal=100,
        limit_name=f"with session {number(with_session * 1e3)} ms from one to the next",
    )


@contextmanager
def _private_cache() -> Iterator[Path]:
    """A cache that nobody else uses, on the disk where caches are."""
    base = Settings.make().cache
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=base, ignore_cleanup_errors=True) as path:
        yield Path(path)


def _plot(ways: list[Contender], about: dict[str, str]) -> str:
    title = (
        f"A pristine machine, ready and with its first command run "
        f"({about['accelerator']}, {about['processors']} processors, {about['guest memory']})"
    )
    ordered = sorted(ways, key=lambda each: each.median)
    ours = ("spare", "clone")
    names = {"spare": "a spare that was loaded ahead", "clone": "a clone"}
    return plot.bars(
        title,
        [(names.get(each.name, each.name), each.median, each.name in ours) for each in ordered],
    )
