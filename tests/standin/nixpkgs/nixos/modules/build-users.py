"""Write $out/passwd, group, shadow (as on a first boot), homes, and password-files. In: $specPath, the users and groups."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

out = Path(os.environ["out"])
spec = json.loads(Path(os.environ["specPath"]).read_text())
users: list[dict[str, Any]] = sorted(spec["users"], key=lambda u: u["name"])
groups: list[dict[str, Any]] = sorted(spec["groups"], key=lambda g: g["name"])


def free(numbers: range, taken: set[int]) -> Iterator[int]:
    """As NixOS does: people from 1000 upwards, system accounts from 999 downwards."""
    return (n for n in numbers if n not in taken)


def hashed(password: str, salt: str) -> str:
    salt = hashlib.sha256(f"{salt}:{password}".encode()).hexdigest()[:16]
    argv = ["openssl", "passwd", "-6", "-salt", salt, "-stdin"]
    return subprocess.run(argv, input=password + "\n", capture_output=True, text=True, check=True).stdout.strip()


def secret(user: dict[str, Any]) -> str:
    for plain, crypted in (("password", "hashedPassword"), ("initialPassword", "initialHashedPassword")):
        if user[crypted] is not None:
            return str(user[crypted])
        if user[plain] is not None:
            return hashed(user[plain], user["name"])
    return "!"


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
        members.setdefault(name, set()).add(user["name"])  # NixOS ignores a group that does not exist, too

users.sort(key=lambda u: u["uid"])
out.mkdir()
(out / "passwd").write_text("".join(
    f"{u['name']}:x:{u['uid']}:{gids[u['group']]}:{u['description']}:{u['home']}:{u['shell'] or ''}\n" for u in users
))  # fmt: skip
(out / "group").write_text("".join(f"{g['name']}:x:{g['gid']}:{','.join(sorted(members[g['name']]))}\n" for g in groups))
(out / "shadow").write_text("".join(f"{u['name']}:{secret(u)}:1::::::\n" for u in users))
# Accounts whose password the configuration decides even when users are mutable.
fixed = [u["name"] for u in users if u["password"] is not None or u["hashedPassword"] is not None]
(out / "fixed").write_text("".join(f"{name}\n" for name in fixed))
(out / "homes").write_text("".join(
    f"{u['homeMode']} {u['uid']} {gids[u['group']]} {u['home']}\n" for u in users if u["createHome"]
))  # fmt: skip
(out / "password-files").write_text("".join(
    f"{u['name']} {u['hashedPasswordFile']}\n" for u in users if u["hashedPasswordFile"] is not None
))  # fmt: skip
