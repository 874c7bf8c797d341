"""`nixvm init`: a flake to begin with, or a new VM in one."""

from __future__ import annotations

import getpass
import os
import pwd
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from pytest_nixvm import layout
from pytest_nixvm.cli.completion import complete_directories
from pytest_nixvm.cli.texts import emit_json
from pytest_nixvm.errors import SettingsError, UserError
from pytest_nixvm.layout import Added, Person

_FALLBACK = "admin"  # who owns the machines where root asks, or Carol.Doe
_LOCAL_TIME = Path("/etc/localtime")


@click.command(short_help="Write a flake to begin with, or a new VM into one.")
@click.argument(
    "words", nargs=-1, metavar="[DIR | vm NAME...]", shell_complete=complete_directories
)
@click.option("--user", metavar="NAME", help="Whose machines these are (default: you).")
@click.option(
    "--key",
    "keys",
    metavar="FILE",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A public SSH key that opens the machines (repeatable; default: those in ~/.ssh).",
)
@click.option(
    "--vm",
    "vms",
    metavar="NAME",
    multiple=True,
    help=f"A VM to begin with (repeatable; default: {' and '.join(layout.NEW_VMS)}).",
)
@click.option("--no-git", is_flag=True, help="Leave git alone.")
@click.option("--home", is_flag=True, help="With vm: a home.nix as well, for Home Manager.")
@click.option(
    "--flake",
    metavar="DIR",
    envvar="NIXVM_FLAKE",
    shell_complete=complete_directories,
    default=".",
    show_default=True,
    help="With vm: the flake's directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Write what was written for scripts.")
def command(
    words: Sequence[str],
    user: str | None,
    keys: Sequence[Path],
    vms: Sequence[str],
    no_git: bool,
    home: bool,
    flake: str,
    as_json: bool,
) -> None:
    """Write a flake with VMs into an empty directory, or add VMs to one.

    `nixvm init [DIR]` writes machines, modules, users, and tests. `nixvm init vm NAME` makes
    machines/vms/NAME from the TEMPLATE beside it and puts the name into flake.nix. What is there
    already is never written over, and nothing is asked.
    """
    named = click.get_current_context().get_parameter_source("flake") == ParameterSource.COMMANDLINE
    if words[:1] != ("vm",):
        if named:
            raise click.UsageError("--flake is for a new VM: nixvm init vm NAME --flake DIR.")
        flake = "."  # $NIXVM_FLAKE is no place for a new flake
    names = _new_vms(words)
    if names:
        if user is not None or keys or vms:
            raise click.UsageError("--user, --key and --vm are for a new flake: nixvm init DIR.")
        _add(_path(flake), names, home=home, git=not no_git, as_json=as_json)
        return
    if home:
        raise click.UsageError("--home is for a new VM: nixvm init vm NAME --home.")
    if len(words) > 1:
        raise click.UsageError("Which of them? nixvm init takes one directory, or: vm NAME...")
    directory = _path(words[0]) if words else Path()
    Path.cwd()  # an error, where that was removed
    _begin(directory, user, keys, vms, git=not no_git, as_json=as_json)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # the home of somebody who is not here
        raise SettingsError(f"{text}: {error}") from None


def _new_vms(words: Sequence[str]) -> Sequence[str]:
    """Return the VMs that are to be added; none if a new flake is asked for.

    A plain name in the directory of a flake can be nothing but a VM's.
    """
    if words and words[0] == "vm":
        if len(words) == 1:
            raise click.UsageError("Which VM? nixvm init vm NAME. (A directory: nixvm init ./vm.)")
        return words[1:]
    one = len(words) == 1 and "/" not in words[0] and words[0] not in (".", "..", "~")
    if one and Path(layout.VMS).is_dir() and not Path(words[0]).exists():
        return words
    return ()


# --- a new flake -----------------------------------------------------------------------------


def _begin(
    directory: Path,
    user: str | None,
    keys: Sequence[Path],
    vms: Sequence[str],
    *,
    git: bool,
    as_json: bool,
) -> None:
    person, known = _person(user, keys)
    names = list(vms) or [*layout.NEW_VMS]
    files = layout.layout(person, names, time_zone=_time_zone())
    written = layout.write_layout(directory, files)
    tracked = layout.track(directory, written, begin=True) if git else ""
    if as_json:
        emit_json(
            {
                "directory": directory.absolute(),
                "files": written,
                "vms": names,
                "user": person.username,
                "keys": known,
                "git": tracked or None,
            }
        )
        return
    where = directory if str(directory) != "." else Path.cwd()
    click.echo(f"{len(written)} files in {where}: {_and(names)}, and the user {person.username}.")
    if user is None and _own_name() is None:
        click.echo("Your log-in name is none for an account there: --user NAME gives it another.")
    if known:
        click.echo(f"SSH keys that open the machines: {', '.join(map(str, known))}.")
    else:
        click.echo("No SSH key in ~/.ssh: `nixvm ssh` and the tests bring one of their own.")
    if tracked:
        click.echo(tracked)
    steps = [] if str(directory) == "." else [(f"cd {directory}", "")]
    steps += [
        ("nix flake lock", "writes down which nixpkgs this is; commit flake.lock"),
        ("pytest --nixvm-flake=.", "boots the machines, and runs tests/ in them"),
        (f"nixvm run {names[0]}", "a machine to use"),
        ("nixvm init vm web-vm", "one more; AGENTS.md says what goes where"),
    ]
    _tell(steps)


def _person(user: str | None, files: Sequence[Path]) -> tuple[Person, list[Path]]:
    """Return whose machines these are, and the files of the keys."""
    name = user or _own_name() or _FALLBACK
    layout.check_user(name)
    own = not files
    found = [*files]
    if own:
        ssh = Path(os.path.expanduser("~/.ssh"))  # noqa: PTH111 - Path's raises without a home
        names = _listed(ssh)
        found = [ssh / n for n in names if n.endswith(".pub") and not n.endswith("-cert.pub")]
    lines: dict[str, None] = {}
    used = []
    for path in found:
        try:
            lines |= dict.fromkeys(_keys(path))
            used.append(path)
        except SettingsError as error:
            if not own:
                raise
            click.echo(f"nixvm: left out: {error}", err=True)
    return Person(name, _full_name(name), tuple(lines)), used


def _listed(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(directory) if entry.is_file())
    except OSError:
        return []  # none, or none that is ours to read


def _keys(path: Path) -> list[str]:
    """Return the public keys in a file. Raises `SettingsError`."""
    # Not at the top: it knows machines, too.
    from pytest_nixvm.checks.logins import key_trouble

    try:
        text = path.read_text()
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise SettingsError(f"{path} is no text: {error}.") from error
    if "PRIVATE KEY" in text:
        raise SettingsError(f"{path} is a private key, which stays where it is: give {path}.pub.")
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise SettingsError(f"{path} has no SSH key in it.")
    for line in found:
        if trouble := key_trouble(line):
            raise SettingsError(f"{path}: {trouble}.")
    return found


def _own_name() -> str | None:
    """Return who is logged in here, None where that is root or can't be a user name on NixOS."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):
        return None
    name = os.environ.get("SUDO_USER", name) if name == "root" else name
    try:
        layout.check_user(name)
    except SettingsError:
        return None
    return name


def _full_name(user: str) -> str:
    try:
        return pwd.getpwnam(user).pw_gecos.partition(",")[0].strip()
    except KeyError:
        return ""


def _time_zone() -> str:
    try:
        zone = str(_LOCAL_TIME.readlink())
    except OSError:
        return "UTC"
    name = zone.partition("zoneinfo/")[2]
    return name if name and not name.startswith("/") else "UTC"


# --- a VM more -------------------------------------------------------------------------------


def _add(flake: Path, names: Sequence[str], *, home: bool, git: bool, as_json: bool) -> None:
    if not flake.is_dir():
        raise UserError(f"There is no directory {flake}. --flake is the directory of a flake here.")
    for name in names:
        layout.check_new(flake, name)
    results: list[tuple[Added, str]] = []
    for name in dict.fromkeys(names):
        added = layout.add_vm(flake, name, home=home)
        results.append((added, layout.track(flake, added.files) if git else ""))
    if as_json:
        emit_json(
            [
                {
                    "name": added.name,
                    "files": added.files,
                    "listed": added.listed,
                    "git": tracked or None,
                }
                for added, tracked in results
            ]
        )
        return
    for added, tracked in results:
        click.echo(f"{added.files[0]} is there{': ' if tracked else '.'}{tracked}")
        if added.listed:
            click.echo(f"{added.name} is in vmMachines of flake.nix.")
        else:
            click.echo(
                f'vmMachines was not found in flake.nix: put "{added.name}" where the other VMs '
                "are named."
            )
        if not added.name.endswith("-vm"):
            click.echo(f"By the way: VMs are called PURPOSE-vm here, as in {added.name}-vm.")
    name = results[0][0].name
    reference = str(flake)
    # Where `nixvm run` looks by itself.
    where = "" if reference == (os.environ.get("NIXVM_FLAKE") or ".") else f" --flake {reference}"
    _tell(
        [
            (f"pytest --nixvm-flake={reference} --nixvm-machine={name}", "boots and tests it"),
            (f"nixvm run {name}{where}", "a machine to use"),
        ]
    )


# --- words -----------------------------------------------------------------------------------


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _tell(steps: Sequence[tuple[str, str]]) -> None:
    click.echo("\nNext:")
    width = max(len(what) for what, _ in steps)
    for what, why in steps:
        click.echo(f"    {what:{width}}{f'  # {why}' if why else ''}".rstrip())
