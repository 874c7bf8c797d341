"""Users: each that the configuration declares can log in as it says."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pytest_nixvm.checks.base import Checked, DoesNotApply, finding
from pytest_nixvm.errors import SshError

if TYPE_CHECKING:
    from pytest_nixvm.flake.declared import User

HASH = re.compile(r"\$(?:y|gy|7|6|5|2[abxy])\$\S{8,}")
"""A password's hash as crypt(5) takes it, of the kinds that are not weak."""
WEAK = re.compile(r"\$(?:1|md5|sha1)\$\S{8,}|[./0-9A-Za-z]{13}")
_NO_SHELL = ("nologin", "false")

# One line for each user: name, what is not there, the shell; then the user's keys.
_SCRIPT = r"""
for user; do
  line=$(getent passwd -- "$user") || { echo "nixvm $user missing"; continue; }
  shell=${line##*:}; home=${line%:*}; home=${home##*:}
  told=
  [ -x "$shell" ] || told="$told noshell"
  [ -d "$home" ] || told="$told nohome"
  echo "nixvm $user ok$told"
  printf 'shell %s\nhome %s\n' "$shell" "$home"
  while IFS= read -r entry; do
    case $entry in "$user":*) entry=${entry#*:}; printf 'shadow %s\n' "${entry%%:*}" ;; esac
  done </etc/shadow
  for file in "/etc/ssh/authorized_keys.d/$user" "$home/.ssh/authorized_keys"; do
    [ ! -r "$file" ] || while IFS= read -r key || [ -n "$key" ]; do
      printf 'key %s\n' "$key"
    done <"$file"
  done
done
"""


@dataclass
class Account:
    """A user as the running machine has it."""

    there: bool = True
    shell: str = ""
    home: str = ""
    shell_runs: bool = True
    has_home: bool = True
    shadow: str | None = None
    keys: list[str] = field(default_factory=list)


def parse(text: str) -> dict[str, Account]:
    """Return what the script has printed, by user."""
    found: dict[str, Account] = {}
    account = Account()
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "nixvm":
            name, state, *missing = rest.split(" ")
            account = found[name] = Account(
                there=state == "ok",
                shell_runs="noshell" not in missing,
                has_home="nohome" not in missing,
            )
        elif word == "key":
            if rest.strip() and not rest.startswith("#"):
                account.keys.append(rest.strip())
        elif word in ("shell", "home", "shadow"):
            setattr(account, word, rest)
    return found


def log_in(checked: Checked) -> None:
    """Each user can log in as declared: shell and home are there, the password is a hash, keys are.

    Whoever has a key is logged in by SSH, where sshd is enabled, with a key of this session.
    """
    declared = [user for user in checked.declared.users if user.normal or user.keys]
    if not declared:
        raise DoesNotApply(f"{checked.name} declares no user who logs in (users.users).")
    names = [user.name for user in declared]
    told = checked.vm.run(["/bin/sh", "-c", _SCRIPT, "sh", *names], timeout=120, check=True).stdout
    wrong, notes = judge(declared, parse(told))
    for user in declared:
        if user.keys:
            wrong += _key_log_in(checked, user)
    for note in notes:
        checked.warn(note)
    if wrong:
        raise finding(f"Not everybody can log in to {checked.name} as declared.", *wrong)


def judge(declared: list[User], accounts: Mapping[str, Account]) -> tuple[list[str], list[str]]:
    """Compare users with their accounts; return what is wrong, and what is only worth telling."""
    wrong: list[str] = []
    notes: list[str] = []
    for user in declared:
        option = f"users.users.{user.name}"
        account = accounts.get(user.name, Account(there=False))
        if not account.there:
            wrong.append(f"{user.name} does not exist on the machine, though {option} does.")
            continue
        if not account.shell_runs:
            wrong.append(
                f"{user.name}'s shell {account.shell} is not there or can't be run, so every "
                f"log-in ends at once ({option}.shell; a shell wants programs.NAME.enable = true)."
            )
        if not account.has_home and user.normal:
            wrong.append(f"{user.name}'s home {account.home} does not exist ({option}.createHome).")
        more, usable = _judge_password(user, account, option, notes)
        wrong += more
        broken = [reason for key in account.keys if (reason := key_trouble(key))]
        wrong += [
            f"{user.name}'s authorized key {reason} ({option}.openssh.authorizedKeys)."
            for reason in broken
        ]
        # A password's file may be a secret, which has no real value here.
        shut_out = not usable and not user.keys and user.password != "file"  # noqa: S105
        if user.normal and shut_out and _has_shell(account):
            notes.append(
                f"{user.name} has neither a password nor a key, and can only be reached from root "
                f"({option}.hashedPassword, {option}.openssh.authorizedKeys.keys)"
            )
    return wrong, notes


def _judge_password(
    user: User, account: Account, option: str, notes: list[str]
) -> tuple[list[str], bool]:
    """Return what is wrong with a user's password, and whether there is one to log in with."""
    shadow = account.shadow
    if shadow is None:
        return [f"{user.name} has no line in /etc/shadow, so no password works."], False
    if user.hashed and user.hashed != shadow and not user.hashed.startswith(("!", "*")):
        return [
            f"{user.name}'s password in /etc/shadow is not the one of {option}: something else "
            "has set it."
        ], True
    if shadow == "":
        notes.append(f"{user.name} logs in without a password ({option}.hashedPassword is empty)")
        return [], True
    if shadow.startswith(("!", "*")):
        return [], False
    if WEAK.fullmatch(shadow):
        notes.append(f"{user.name}'s password has a weak hash; mkpasswd makes a better one")
        return [], True
    if not HASH.fullmatch(shadow):
        which = "hashedPasswordFile" if user.password == "file" else "hashedPassword"  # noqa: S105
        return [
            f"{user.name}'s password is not a hash, so it never matches ({option}.{which}). "
            "`mkpasswd` makes one; is the password itself there?"
        ], False
    return [], True


def _has_shell(account: Account) -> bool:
    return account.shell.rpartition("/")[2] not in _NO_SHELL


def key_trouble(line: str) -> str:
    """Say what is wrong with a line of authorized_keys (sshd(8)); "" if it is in order."""
    # Options may stand before the type, and have blanks in quotes.
    match = re.search(
        r"(?:^|\s)((?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[\w@.-]+)\s+(\S+)", re.sub(r'"[^"]*"', "", line)
    )
    shown = line if len(line) <= 60 else f"{line[:40]}…{line[-18:]}"
    if match is None:
        return f"{shown!r} is none: it should be a type, and the key in base64"
    kind, text = match[1], match[2]
    try:
        blob = base64.b64decode(text, validate=True)
    except binascii.Error:
        return f"{shown!r} is broken: what follows {kind} is not base64"
    parts = _parts(blob)
    if not parts or parts[0] != kind.encode() or len(parts) < 2:
        return f"{shown!r} is broken: it was cut, or is not of the type {kind}"
    return ""


def _parts(blob: bytes) -> list[bytes]:
    """Return the strings that a public key is made of (RFC 4251); none if it ends too early."""
    parts = []
    while blob:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length:
            return []
        parts.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return parts


def _key_log_in(checked: Checked, user: User) -> list[str]:
    """Log in as somebody who has a key. The keys are known: only the way in is tried."""
    declared = checked.declared
    if declared.ssh is None:
        return []
    try:
        done = checked.vm.ssh_as(user.name).run(["true"], timeout=60)
    except SshError as error:
        if not any(
            declared.firewall.opens(port, declared.interface) for port in declared.ssh.ports
        ):
            checked.warn(f"{user.name}'s key was not tried: sshd is not open to the outside")
            return []
        return [f"{user.name} has a key, but can't log in by SSH with one.\n{error}"]
    if not done.ok:
        return [
            f"{user.name} can log in by SSH with a key, but run nothing: `true` ended with exit "
            f"status {done.returncode}. {done.stderr.strip()}"
        ]
    return []
