"""A configuration repository to begin with, and a VM more in one that is there.

The layout is `nixos/layout`, which is the example flake: machines in directories, a list of them in
flake.nix, people in lib/users.nix. What is written anew has the VMs and the person that were asked
for, no physical machine, and no password. Knows no Nix and no click; it writes files, never over
one that is there.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from pytest_nixvm.errors import SettingsError, UserError
from pytest_nixvm.flake.reference import git_root
from pytest_nixvm.flake.words import listed, nix_string

SOURCE = Path(__file__).parent / "nixos" / "layout"
VMS = PurePath("machines", "vms")
TEMPLATE = "TEMPLATE"
NEW_VMS = ("dev-vm", "test-vm")  # what a layout has when nothing else is asked for

_PHYSICAL = "nixosMachines"
_VIRTUAL = "vmMachines"
# As nixos/lib has them: a host name (RFC 1123), and a user's name.
_HOST = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
# What may be in a directory that counts as empty.
_HARMLESS = re.compile(r"\.git|(README|LICEN[CS]E|COPYING)(\..*)?", re.IGNORECASE)
_LEFT_BEHIND = {"__pycache__", ".pytest_cache", ".ruff_cache", ".venv", "flake.lock"}
_ZONE = '"Europe/Berlin"'  # the example's
_GIT_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class Person:
    """Whose machines these are."""

    username: str
    description: str = ""
    keys: tuple[str, ...] = ()  # lines of authorized_keys


@dataclass(frozen=True)
class Added:
    """A VM that was added to a flake."""

    name: str
    files: tuple[Path, ...]  # new ones
    listed: bool  # whether flake.nix names it now


def check_machine(name: str) -> None:
    """Raise `SettingsError` if a machine can't have this name."""
    if name == TEMPLATE:
        raise SettingsError(f"{TEMPLATE} is what new VMs are made from: give the VM another name.")
    if _HOST.fullmatch(name) is None:
        raise SettingsError(
            f"{name!r} can't be a machine's name: it is its host name, so letters, digits and "
            "hyphens (dev-vm), no more than 63."
        )


def check_user(name: str) -> None:
    """Raise `SettingsError` if nobody can have this user name."""
    if name == "root" or _USER.fullmatch(name) is None:
        raise SettingsError(
            f"{name!r} can't be a person's user name: lower case, digits, - and _, no more than "
            "31, and not root."
        )


# --- a whole layout --------------------------------------------------------------------------


def layout(person: Person, vms: Sequence[str], *, time_zone: str = "UTC") -> dict[PurePath, bytes]:
    """Return the files of a new configuration repository, by their paths in it.

    Raises `SettingsError` for names that can't be used.
    """
    check_user(person.username)
    for name in vms:
        check_machine(name)
    twice = sorted({name for name in vms if vms.count(name) > 1})
    if twice:
        raise SettingsError(f"{twice[0]} is named twice.")
    files = dict(_read(SOURCE))
    flake = files[PurePath("flake.nix")].decode()
    kept = {VMS / name for name in (TEMPLATE, *vms)}
    for path in [*files]:
        if path.parts[0] == "machines" and kept.isdisjoint(path.parents):
            del files[path]
    for name in vms:
        if VMS / name / "configuration.nix" not in files:
            files |= _from_template(SOURCE, name, home=False)
    flake = _replaced(_replaced(flake, _PHYSICAL, ()), _VIRTUAL, vms)
    files[PurePath("flake.nix")] = flake.encode()
    files[PurePath("lib", "users.nix")] = _users(person).encode()
    basic = PurePath("modules", "nixos", "basic-system.nix")
    files[basic] = files[basic].replace(_ZONE.encode(), nix_string(time_zone).encode())
    return files


def write_layout(directory: Path, files: Mapping[PurePath, bytes]) -> tuple[Path, ...]:
    """Write a layout into a directory that is empty, missing, or a repository without files.

    All of it or nothing. Raises `UserError`.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: the layout needs a directory.")
    try:
        there = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    except OSError as error:
        raise UserError(f"{directory} can't be read: {error.strerror}.") from error
    if "flake.nix" in there:
        raise UserError(
            f"There is a flake in {directory} already. `nixvm init vm NAME` adds a VM to one that "
            "has this layout; another directory takes a new one: nixvm init DIR."
        )
    foreign = [name for name in there if _HARMLESS.fullmatch(name) is None]
    if foreign:
        raise UserError(
            f"{directory} is not empty ({listed(foreign, 4)}), and nothing is written over what is "
            "there: name a new directory, nixvm init DIR."
        )
    return _write(directory, files)


# --- a VM more -------------------------------------------------------------------------------


def check_new(flake: Path, name: str) -> None:
    """Raise `UserError` if a VM of that name can't be added to the flake in a directory."""
    check_machine(name)
    if not (flake / "flake.nix").is_file():
        above = (each for each in flake.absolute().parents if (each / VMS).is_dir())
        around = next((each for each in above if (each / "flake.nix").is_file()), None)
        more = "" if around is None else f" Or is the one around it meant: --flake {around}?"
        raise UserError(
            f"{flake.absolute()} is no flake: `nixvm init` writes one into an empty directory."
            + more
        )
    if not (flake / VMS).is_dir():
        raise UserError(
            f"{flake} has no {VMS} to put a VM into, so it is not a flake of the layout that "
            "`nixvm init` writes."
        )
    for place in (VMS / name, PurePath("machines", name)):
        if (flake / place).exists():
            raise UserError(f"There is a machine {name} already: {flake / place}.")


def add_vm(flake: Path, name: str, *, home: bool = False) -> Added:
    """Add a VM to the flake in a directory, made from its own TEMPLATE.

    Args:
        flake: the directory of flake.nix.
        name: the VM's.
        home: with a home.nix for Home Manager.

    Raises:
        UserError: the flake has another layout, or there is such a machine.
    """
    check_new(flake, name)
    file = flake / "flake.nix"
    source = flake if (flake / VMS / TEMPLATE / "configuration.nix").is_file() else SOURCE
    try:
        text = file.read_bytes().decode()  # its line ends stay as they are
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}.") from error
    files = _from_template(source, name, home=home)
    if _span(text, _VIRTUAL) is None:
        return Added(name, _write(flake, files), listed=False)
    names = _names(text, _VIRTUAL)
    changed = text if name in names else _appended(text, _VIRTUAL, name)
    written = _write(flake, files)
    if changed != text:
        try:
            _replace(file, changed)
        except BaseException as error:
            _remove(flake, written)
            if isinstance(error, OSError):
                raise UserError(f"{file} can't be written: {error.strerror}.") from error
            raise
    return Added(name, written, listed=True)


def track(directory: Path, files: Sequence[Path], *, begin: bool = False) -> str:
    """Let git know of new files: Nix sees no others in a git tree. Return what was done.

    Where there is no git tree, one is made if `begin`. What git refuses is told as well: the
    files are there, all the same.
    """
    root = git_root(directory.resolve())
    if root is None and not begin:
        return ""
    if shutil.which("git") is None:
        if root is None:
            return "git is not installed, so no repository was made."
        return "git is not installed, and Nix sees these files only when git knows of them."
    done = []
    if root is None:
        failed = _git(directory, "init", "--quiet")
        if failed:
            return f"git init failed: {failed}"
        done.append("git init")
    failed = _git(directory, "add", "--", *(str(path.absolute()) for path in files))
    if failed:
        return f"git add failed, and Nix sees only what git knows of: {failed}"
    return " and ".join([*done, "git add"]) + " were done." if done else "git add was done."


def _git(directory: Path, *words: str) -> str:
    """Run git; return what it said if it failed, else nothing."""
    command = ["git", "-C", str(directory), *words]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if not done.returncode:
        return ""
    said = [line.strip() for line in done.stderr.splitlines() if not line.startswith("hint:")]
    return " ".join(said[:2]) or f"exit status {done.returncode}"


# --- files -----------------------------------------------------------------------------------


def _read(source: Path) -> Iterator[tuple[PurePath, bytes]]:
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and _LEFT_BEHIND.isdisjoint(name.parts):
            yield PurePath(name), path.read_bytes()


def _from_template(source: Path, name: str, *, home: bool) -> dict[PurePath, bytes]:
    """Return the files of a VM, from the TEMPLATE of a flake or of our own layout."""
    found = dict(_read(source / VMS / TEMPLATE))
    if not home:
        found.pop(PurePath("home.nix"), None)
    elif PurePath("home.nix") not in found:
        found[PurePath("home.nix")] = (SOURCE / VMS / TEMPLATE / "home.nix").read_bytes()
    word, new = TEMPLATE.encode(), name.encode()
    return {VMS / name / path: content.replace(word, new) for path, content in found.items()}


def _write(directory: Path, files: Mapping[PurePath, bytes]) -> tuple[Path, ...]:
    """Write new files, all of them or none. Raises `UserError`."""
    written: list[Path] = []
    created = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        for name, content in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                written.append(path)
                file.write(content)
    except BaseException as error:
        _remove(directory, written)
        for each in created:
            with contextlib.suppress(OSError):
                each.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or directory}: {error.strerror}.") from error
        raise
    return tuple(written)


def _remove(directory: Path, files: Sequence[Path]) -> None:
    for path in files:
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == directory:
                break
            with contextlib.suppress(OSError):
                parent.rmdir()


def _replace(file: Path, text: str) -> None:
    """Write a file that is there: whole or not at all, with the mode it has."""
    file = file.resolve()
    scratch = file.with_name(f".{file.name}.new")
    try:
        scratch.write_text(text)
        shutil.copymode(file, scratch)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


# --- Nix -------------------------------------------------------------------------------------


def _users(person: Person) -> str:
    keys = "\n".join(f"      {nix_string(key)}" for key in person.keys)
    return f"""\
# The people of the household: accounts that physical machines and VMs share.
# A machine's main user is `userConfig` in its modules.
rec {{
  # Whose machines these are.
  owner = {{
    username = {nix_string(person.username)};
    description = {nix_string(person.description or person.username)};
    extraGroups = [ "wheel" ];
    # Whole lines of ~/.ssh/id_ed25519.pub
    authorizedKeys = [{f"{chr(10)}{keys}{chr(10)}    " if keys else " "}];
    # What `mkpasswd` prints; null: no password opens the account.
    hashedPassword = null;
  }};

  # Who has an account on the physical machines.
  household = [ owner ];

  # Who uses a VM when nothing else is said.
  vmUser = owner;
}}
"""


def _span(text: str, name: str) -> tuple[int, int] | None:
    """Return where the list of that name has its content: strings and comments, nothing else.

    None if there is no such list, or more than one.
    """
    found = [
        match.span("body")
        for match in re.finditer(
            rf"\b{name}\s*=\s*\[(?P<body>(?:\s|\"[\w-]+\"|#[^\n]*\n)*)\]", text
        )
        if "#" not in text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    ]
    return found[0] if len(found) == 1 else None


def _names(text: str, name: str) -> list[str]:
    span = _span(text, name)
    body = re.sub(r"#[^\n]*", "", text[slice(*span)]) if span else ""
    return re.findall(r'"([\w-]+)"', body)


def _replaced(text: str, name: str, names: Sequence[str]) -> str:
    """Return a flake with another list of that name. It has one: the flake is our own."""
    span = _span(text, name)
    if span is None:
        raise AssertionError(f"the layout has no list {name}")
    indent = " " * 8
    body = "".join(f'\n{indent}"{each}"' for each in names)
    return text[: span[0]] + (f"{body}\n{indent[2:]}" if names else " ") + text[span[1] :]


def _appended(text: str, name: str, added: str) -> str:
    """Return a flake with one name more in a list that it has, in the form that the list has."""
    start, end = _span(text, name) or (0, 0)
    body = text[start:end]
    kept = body.rstrip()
    if "\n" not in body:
        return f'{text[:start]}{kept} "{added}" {text[end:]}'
    closing = body[body.rfind("\n") + 1 :]
    last = re.search(r'^([ \t]*)(?:"|#)', kept.rsplit("\n", 1)[-1])
    indent = last[1] if last else f"{closing}  "
    return f'{text[:start]}{kept}\n{indent}"{added}"\n{closing}{text[end:]}'
