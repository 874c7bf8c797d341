"""`nixvm deploy`: a tested system, switched to on a host, and back if the host is not well."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Sequence

import click

from pytest_nixvm.cli.common import Context, with_flake
from pytest_nixvm.cli.completion import complete_machines
from pytest_nixvm.cli.texts import emit_json
from pytest_nixvm.deploy import system
from pytest_nixvm.deploy.host import Facts, Host, Target, check
from pytest_nixvm.deploy.result import told
from pytest_nixvm.deploy.steps import Deploy, Plan
from pytest_nixvm.errors import SettingsError, UserError
from pytest_nixvm.flake.images import plain
from pytest_nixvm.flake.packages import read_closure
from pytest_nixvm.flake.words import listed
from pytest_nixvm.tested import Tested


class NotTestedError(UserError):
    """The system has not passed its tests."""


@click.command("deploy")
@click.argument("name", shell_complete=complete_machines)
@click.option("--to", "to", required=True, metavar="ssh://root@HOST[:PORT]", help="The host.")
@click.option(
    "--force", metavar="REASON", help="Deploy though the tests did not pass, and say why."
)
@click.option(
    "--timeout",
    type=click.IntRange(1, 86400),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="How long the host may take to be well after the activation; then it goes back.",
)
@click.option(
    "--switch-timeout",
    type=click.IntRange(1, 86400),
    default=900,
    show_default=True,
    metavar="SECONDS",
    help="How long the activation itself may take.",
)
@click.option(
    "--check",
    "checks",
    multiple=True,
    metavar="COMMAND",
    help="A command that has to succeed on the host before it keeps the system (repeatable).",
)
@click.option("--boot", is_flag=True, help="Activate nothing: have it booted the next time.")
@click.option("--dry-run", is_flag=True, help="Copy it, say what would change, and stop.")
@click.option(
    "--ssh-option",
    "ssh_options",
    multiple=True,
    metavar="OPTION",
    help="An option for ssh -o, such as IdentityFile=… (repeatable).",
)
@click.option("--use-substitutes", is_flag=True, help="The host fetches what its caches have.")
@click.option("--json", "as_json", is_flag=True, help="Write the result for scripts.")
@with_flake
def command(
    context: Context,
    name: str,
    to: str,
    force: str | None,
    timeout: int,
    switch_timeout: int,
    checks: Sequence[str],
    boot: bool,
    dry_run: bool,
    ssh_options: Sequence[str],
    use_substitutes: bool,
    as_json: bool,
) -> int:
    """Switch a host to the tested configuration of NAME, and back if it is not well.

    The host is switched by a unit of its own, which goes back to the old generation unless it is
    told in time that all is well: over a new SSH connection, with no unit failed that had not
    failed before, and with every --check succeeding. Until then a reboot brings the old one back.
    """
    target = Target.parse(to)
    if force is not None and not force.strip():
        raise SettingsError("--force wants a reason, which the host's journal keeps.")
    reason = " ".join((force or "").split())
    machine = context.named(name)
    # What can't be deployed is told before anything is built.
    toplevel = context.flake.real_toplevel(name)
    if not dry_run:
        _check_tests(context, name, toplevel, forced=bool(reason))
    host = Host(target, ssh_options)
    built = context.flake.build_real(name)
    if str(built) != toplevel:
        raise UserError(f"{name} was changed meanwhile: it was {toplevel}, now it is {built}.")

    host.upload()
    before = host.facts("preflight")
    check(before, target, machine.system.partition("-")[0])
    nix = context.catalogue.nix
    closure = read_closure(nix, built).sizes
    system.check_room(host, before, system.missing(host, closure))
    if dry_run:
        system.copy(nix, host, toplevel, context.progress, substitutes=use_substitutes)
        return 0 if _dry_run(context, host, before, toplevel, closure, as_json=as_json) else 1
    if reason:
        # As the tests have it, or `nixvm list` would know them no more.
        Tested().force(
            toplevel,
            machine=plain(name) if machine.image else name,
            flake=str(context.flake.reference),
            to=str(target),
            reason=reason,
        )
    plan = Plan(name, toplevel, boot, timeout, switch_timeout, tuple(checks), reason)

    def copy() -> None:
        system.copy(nix, host, toplevel, context.progress, substitutes=use_substitutes)

    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        result = Deploy(host, plan, context.progress).run(before, copy)
    finally:
        signal.signal(signal.SIGTERM, handler)
    if as_json:
        emit_json(result.to_json())
    else:
        context.progress.close()
        click.echo(told(result), err=not result.ok)
    if result.interrupted:
        return 130
    return 0 if result.ok else 1


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _check_tests(context: Context, name: str, toplevel: str, *, forced: bool) -> None:
    verdict = Tested().verdict(toplevel)
    if verdict.kind == "passed" or forced:
        if forced and verdict.kind != "passed":
            click.echo(f"nixvm: {name} is deployed by force: {verdict}.", err=True)
        return
    flake = context.settings.flake
    if verdict.kind == "failed":
        what = (
            f"{name} has not passed its tests ({verdict}): {listed(verdict.failed, 5)}.\n"
            f"If a test has another name now: the record is {Tested().file(toplevel)}"
        )
    else:
        what = f"{name} as it is now was not tested ({toplevel})."
    raise NotTestedError(
        f"{what}\nTest it: pytest --nixvm-flake={flake} --nixvm-machine={name}\n"
        "Or deploy it all the same, and say why: --force 'REASON'."
    )


def _dry_run(
    context: Context,
    host: Host,
    before: Facts,
    toplevel: str,
    closure: Iterable[str],
    *,
    as_json: bool,
) -> bool:
    """Say what would change, and whether the system's own dry run went well."""
    old = [line for line in host.call("requisites").splitlines() if line.startswith("/")]
    lines = system.difference(old, closure)
    ended = host.run("dry", toplevel, timeout=300)
    context.progress.close()
    if as_json:
        emit_json(
            {
                "host": str(host.target),
                "old": before["current"],
                "new": toplevel,
                "difference": lines,
                "activation": ended.stdout,
                "tests": str(Tested().verdict(toplevel)),
                "ok": ended.returncode == 0,
            }
        )
        return ended.returncode == 0
    click.echo(f"{before['current']} would become\n{toplevel} ({Tested().verdict(toplevel)})")
    click.echo("\n".join(lines) or "Nothing differs in what they consist of.")
    click.echo(ended.stdout.rstrip())
    click.echo("Nothing was changed, but that the system is in the host's store now.")
    sys.stdout.flush()
    if ended.returncode != 0:
        click.echo(
            f"nixvm: the system's dry run on {host.target} failed: exit status {ended.returncode}.",
            err=True,
        )
    return ended.returncode == 0
