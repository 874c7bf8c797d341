"""`nixvm list`: the machines of a flake, what each is, and what is known of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import click

from pytest_nixvm.cli.common import Context, with_flake
from pytest_nixvm.cli.texts import emit_json, table
from pytest_nixvm.errors import NixvmError
from pytest_nixvm.flake.build import MachineInfo
from pytest_nixvm.flake.nix import NixFailure
from pytest_nixvm.flake.remember import Memory
from pytest_nixvm.flake.words import nix_list
from pytest_nixvm.running import running_names
from pytest_nixvm.tested import Tested, Verdict

_TIMEOUT = 600.0  # seconds

# `vm.enable` is the shipped module's. A host that throws does not hide the others.
_KINDS = """machines: builtins.listToAttrs (map (name: {
  inherit name;
  value =
    let try = builtins.tryEval (machines.${name}.config.vm.enable or false); in
    if !try.success then "?" else if try.value then "vm" else "physical";
}) (builtins.filter (name: machines ? ${name}) NAMES))"""


@dataclass(frozen=True)
class Row:
    """What is known of one machine."""

    info: MachineInfo
    kind: str  # vm, physical, darwin, derivation; "?" if its configuration can't be evaluated
    running: bool
    tests: Verdict
    exact: bool  # whether `tests` are of the system as it is now, else of the one tested last


@click.command()
@with_flake
@click.option(
    "--tested",
    is_flag=True,
    help="Evaluate each machine's system, and say what the tests say of exactly that.",
)
@click.option("--json", "as_json", is_flag=True, help="Write the machines for scripts.")
def command(context: Context, tested: bool, as_json: bool) -> None:
    """Show the flake's machines: what each is, whether it can be tested here, how its tests went.

    The tests are those of the system that was tested last, unless --tested is given.
    """
    machines = context.catalogue.every_machine
    kinds = _kinds(context, machines)
    running = running_names(context.flake.reference.url)
    verdicts = _exact(context, machines) if tested else _last(context)
    rows = [
        Row(
            info, kinds[info.name], info.name in running, verdicts.get(info.name, Verdict()), tested
        )
        for info in machines
    ]
    context.progress.close()
    if as_json:
        emit_json([_data(row) for row in rows])
        return
    table(
        ("machine", "kind", "system", "here", "last tests"),
        [
            (
                row.info.name,
                row.kind,
                row.info.system or "?",
                "running" if row.running else f"no: {row.info.skip}" if row.info.skip else "yes",
                str(row.tests),
            )
            for row in rows
        ],
    )


def _kinds(context: Context, machines: Sequence[MachineInfo]) -> dict[str, str]:
    """Return each machine's kind: one evaluation for all, remembered for a local flake."""
    kinds = {
        info.name: "darwin"
        if info.system == "darwin"
        else "?"
        if info.attribute.startswith("nixosConfigurations.")
        else "derivation"
        for info in machines
    }
    if "?" not in kinds.values():
        return kinds
    nix, settings = context.catalogue.nix, context.settings
    url, overrides = context.flake.reference.url, settings.override_input
    names = sorted(name for name, kind in kinds.items() if kind == "?")
    about = ["kinds", _KINDS, names, url, [list(pair) for pair in overrides], nix.identity]
    memory = Memory(settings.cache / "evaluations", about)
    answer = memory.recall("kinds")
    if answer is None:
        before = memory.digests([url, *(reference for _, reference in overrides)])
        answer = _evaluate(context, names)
        trees = {name: digest for name, digest in before.items() if digest is not None}
        # As long as nothing changes; what is not local may change without our knowing.
        if len(trees) == len(before) and memory.digests(before) == before:
            with contextlib.suppress(OSError):  # then it is evaluated again, no more
                memory.record("kinds", trees, answer)
    return {name: answer.get(name, kind) if kind == "?" else kind for name, kind in kinds.items()}


def _evaluate(context: Context, names: Sequence[str]) -> dict[str, str]:
    step = context.progress.step("Evaluating what the machines are")

    def ask(names: Sequence[str]) -> dict[str, str]:
        answer: dict[str, str] = context.catalogue.nix.evaluate(
            f"{context.flake.reference.url}#nixosConfigurations",
            _KINDS.replace("NAMES", nix_list(names)),
            overrides=context.settings.override_input,
            timeout=_TIMEOUT,
            watch=step.update,
        ).value
        return answer

    try:
        try:
            found = ask(names)
        except NixFailure as failure:
            # An error that Nix can't catch, of one host; `nixvm build NAME` tells it.
            found = {}
            for name in names if failure.timeout is None and len(names) > 1 else ():
                with contextlib.suppress(NixFailure):
                    found |= ask([name])
    except BaseException:
        step.fail()
        raise
    step.finish()
    return found


def _last(context: Context) -> dict[str, Verdict]:
    """Return what the tests said of each machine's system that was tested last."""
    reference = context.flake.reference
    ours = str(reference.local or reference.url)
    found: dict[str, Verdict] = {}
    for record in Tested().records():  # the last first
        # Behind a # is what of the flake was tested.
        if record.tests and (record.flake == ours or record.flake.startswith(f"{ours}#")):
            found.setdefault(record.machine, record.verdict)
    return found


def _exact(context: Context, machines: Sequence[MachineInfo]) -> dict[str, Verdict]:
    found = {}
    for info in machines:
        if info.skip is None:
            try:
                found[info.name] = Tested().verdict(context.flake.real_toplevel(info.name))
            except (NixvmError, ValueError):
                continue  # `nixvm build NAME --toplevel` tells what is wrong
    return found


def _data(row: Row) -> dict[str, object]:
    return {
        "name": row.info.name,
        "kind": row.kind,
        "system": row.info.system or None,
        "attribute": row.info.attribute,
        "testable": row.info.skip is None,
        "why": row.info.skip,
        "running": row.running,
        "tests": {
            "verdict": row.tests.kind,
            "passed": row.tests.passed,
            "failed": list(row.tests.failed),
            "when": row.tests.when or None,
            "ofThisSystem": row.exact,
        },
    }
