"""`nixvm doctor`: what this computer lacks, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import click
from click.core import ParameterSource

from pytest_nixvm.cli.common import Context, with_flake
from pytest_nixvm.cli.texts import emit_json, in_words_of_ours
from pytest_nixvm.doctor import Finding, computer
from pytest_nixvm.doctor_nix import nix_findings

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@with_flake
@click.option("--json", "as_json", is_flag=True, help="Write the findings for scripts.")
def command(context: Context, as_json: bool) -> int:
    """Say what this computer lacks for tests in VMs, and how to mend it.

    The exit status is 1 if something has to be mended first, else 0.
    """
    source = click.get_current_context().get_parameter_source("flake")
    settings = context.settings
    findings = computer(settings.cache) + nix_findings(
        lambda: context.catalogue.nix,
        offline=settings.offline,
        reference=str(settings.flake),
        given=source is not ParameterSource.DEFAULT,
        machines=lambda: context.catalogue.every_machine,
    )
    findings = [replace(each, seen=in_words_of_ours(each.seen)) for each in findings]
    if as_json:
        emit_json([_data(finding) for finding in findings])
    else:
        _tell(findings)
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def _data(finding: Finding) -> dict[str, object]:
    mend = [{"where": where, "do": what} for where, what in finding.mend]
    return {**asdict(finding), "mend": mend}


def _tell(findings: Sequence[Finding]) -> None:
    width = max(len(finding.subject) for finding in findings)
    indent = " " * (width + 8)
    for finding in findings:
        state = click.style(f"{finding.state:4}", fg=_COLOURS[finding.state])
        seen = finding.seen.replace("\n", f"\n{indent}")
        click.echo(f"{state}  {finding.subject:{width}}  {seen}")
        if finding.meaning:
            click.echo(f"{indent}{finding.meaning}")
        for where, what in finding.mend:
            click.echo(f"{indent}  {f'{where}: ' if where else '→ '}{what}")
    count = {state: sum(f.state == state for f in findings) for state in _COLOURS}
    click.echo(
        "All is well."
        if not count["warn"] + count["fail"]
        else f"{count['fail']} to mend first, {count['warn']} to know of, {count['ok']} well."
    )
