"""build-users.py SPEC OUT: passwd, group and shadow as on a first boot, homes, and password-files.

SPEC is JSON: the users and groups of the configuration.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

spec = json.loads(Path(sys.argv[1]).read_text())
out = Path(sys.argv[2])
users: list[dict[str, Any]] = sorted(spec["users"], key=lambda u: u["name"])
groups: list[dict[str, Any]] = sorted(spec["groups"], key=lambda g: g["name"])


def free(numbers: range, taken: set[int]) -> Iterator[int]:
    """As NixOS does: people from 1000 upwards, system accounts from 999 downwards."""
    return (n for n in numbers if n not in taken)


def hashed(password: str, salt: str) -> str:
    salt = hashlib.sha256(f"{salt}:{password}".encode()).hexdigest()[:16]
    argv = ["openssl", "passwd", "-6", "-salt", salt, "-stdin"]
    return subprocess.run(
        argv, input=password + "\n", capture_output=True, text=True, check=True
    ).stdout.strip()


def secret(user: dict[str, Any]) -> str:
    for plain, crypted in (
        ("password", "hashedPassword"),
        ("initialPassword", "initialHashedPassword"),
    ):
        if user[crypted] is not None:
            return str(user[crypted])
        if user[plain] is not None:
            return hashed(user[plain], user["name"])
    return "!"


# Numbers that are chosen here: an account that is there keeps the one it has (activate-users.awk).
automatic = [f"group:{g['name']}" for g in groups if g["gid"] is None]
automatic += [f"passwd:{u['name']}" for u in users if u["uid"] is None]
taken = {g["gid"] for g in groups if g["gid"] is not None}
system_gids = free(range(999, 399, -1), taken)
for group in groups:
    if group["gid"] is None:
        group["gid"] = next(system_gids)
        taken.add(group["gid"])
gids = {g["name"]: g["gid"] for g in groups}

taken = {u["uid"] for u in users if u["uid"] is not None}
people, system = free(range(1000, 30000), taken), free(range(999, 399, -1), taken)
for user in users:
    if user["uid"] is None:
        user["uid"] = next(people if user["isNormalUser"] else system)
        taken.add(user["uid"])

members: dict[str, set[str]] = {g["name"]: set(g["members"]) for g in groups}
for user in users:
    for name in user["extraGroups"]:
        members.setdefault(name, set()).add(
            user["name"]
        )  # NixOS ignores a group that does not exist, too

users.sort(key=lambda u: u["uid"])
out.mkdir()


def write(name: str, lines: Iterable[str]) -> None:
    (out / name).write_text("".join(f"{line}\n" for line in lines))


def passwd_line(user: dict[str, Any]) -> str:
    rest = [user["description"], user["home"], user["shell"] or ""]
    return ":".join([user["name"], "x", str(user["uid"]), str(gids[user["group"]]), *rest])


write("passwd", map(passwd_line, users))
write("group", (f"{g['name']}:x:{g['gid']}:{','.join(sorted(members[g['name']]))}" for g in groups))
write("shadow", (f"{u['name']}:{secret(u)}:1::::::" for u in users))
write("automatic", automatic)
# Accounts whose password the configuration decides even when users are mutable.
write("fixed", (u["name"] for u in users if u["password"] or u["hashedPassword"]))
homes = ((u, gids[u["group"]]) for u in users if u["createHome"])
write("homes", (f"{u['homeMode']} {u['uid']} {gid} {u['home']}" for u, gid in homes))
files = ((u["name"], u["hashedPasswordFile"]) for u in users if u["hashedPasswordFile"])
write("password-files", (f"{name} {file}" for name, file in files))
