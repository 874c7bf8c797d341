"""Who may log in: sshd's own rules, read from what `sshd -T` prints.

The rules are those of `allowed_user()` in OpenSSH's auth.c and of sshd_config(5). Nothing here
talks to a guest.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

SLIRP_HOST = "10.0.2.2"
"""The address that a connection through QEMU's user network comes from."""

SLIRP_GUEST = "10.0.2.15"
"""The address that QEMU's user network forwards to."""

_NO_SHELL = re.compile(r".*/(?:nologin|false)\Z")


@dataclass(frozen=True)
class Account:
    """A user of the guest, from its passwd, shadow and group files."""

    name: str
    uid: int
    home: str
    shell: str
    groups: tuple[str, ...] = ()
    locked: bool = False
    expired: bool = False

    @property
    def ordinary(self) -> bool:
        """Whether this is a person's account: uid 1000 to 59999 and a shell."""
        return 1000 <= self.uid <= 59999 and not _NO_SHELL.match(self.shell)


def read_accounts(passwd: str, group: str, shadow: str) -> dict[str, Account]:
    """Return the accounts by name, from the text of the three files."""
    members: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for line in group.splitlines():
        fields = line.split(":")
        if len(fields) >= 4:
            names[fields[2]] = fields[0]
            for member in filter(None, fields[3].split(",")):
                members.setdefault(member, []).append(fields[0])
    secrets = {fields[0]: fields for line in shadow.splitlines() if (fields := line.split(":"))}
    today = int(time.time() // 86400)
    accounts = {}
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) < 7 or not fields[2].isdigit():
            continue
        name = fields[0]
        primary = [names[fields[3]]] if fields[3] in names else []
        secret = [*secrets.get(name, []), *[""] * 9]
        accounts[name] = Account(
            name=name,
            uid=int(fields[2]),
            home=fields[5] or "/",
            shell=fields[6] or "/bin/sh",
            groups=tuple(primary + members.get(name, [])),
            locked=secret[1].startswith("!"),
            expired=secret[7].isdigit() and 0 < int(secret[7]) <= today,
        )
    return accounts


def candidates(accounts: Mapping[str, Account], limit: int = 8) -> list[Account]:
    """Return who is tried: root, then people, administrators first."""
    people = sorted(
        (account for account in accounts.values() if account.ordinary),
        key=lambda each: (not {"wheel", "sudo"} & set(each.groups), each.uid),
    )
    return [*filter(None, [accounts.get("root")]), *people][:limit]


@dataclass(frozen=True)
class SshdConfig:
    """What `sshd -T -C user=…` printed: the configuration that holds for one connection."""

    values: Mapping[str, tuple[str, ...]]

    @classmethod
    def parse(cls, dump: str) -> SshdConfig:
        """Read `keyword value` lines; a keyword that comes several times has all its values."""
        values: dict[str, list[str]] = {}
        for line in dump.splitlines():
            keyword, _, value = line.strip().partition(" ")
            if keyword:
                values.setdefault(keyword.lower(), []).append(value.strip())
        return cls({keyword: tuple(value) for keyword, value in values.items()})

    def one(self, keyword: str, default: str = "") -> str:
        """Return a keyword's first value."""
        return self.values.get(keyword, (default,))[0]

    def words(self, keyword: str) -> list[str]:
        """Return all words of all values of a keyword."""
        return [word for value in self.values.get(keyword, ()) for word in value.split()]

    @property
    def ports(self) -> list[int]:
        """The ports that a connection to the guest's address on QEMU's user network reaches."""
        ports = []
        for value in self.values.get("listenaddress", ()):
            # "0.0.0.0:22", "[::]:22", "127.0.0.1:22 rdomain x"
            address, _, port = value.split()[0].rpartition(":") if value else ("", "", "")
            if port.isdigit() and reachable(address.strip("[]")):
                ports.append(int(port))
        if "listenaddress" not in self.values:
            ports = [int(port) for port in self.words("port") if port.isdigit()]
        return list(dict.fromkeys(ports))

    @property
    def max_sessions(self) -> int:
        """How many commands may run at once over one connection."""
        value = self.one("maxsessions", "10")
        return int(value) if value.isdigit() else 10

    def keys_files(self, account: Account) -> list[str]:
        """Return the absolute paths at which sshd looks for an account's keys."""
        tokens = {"%u": account.name, "%h": account.home, "%U": str(account.uid), "%%": "%"}
        paths = []
        for word in self.words("authorizedkeysfile"):
            if word == "none":
                continue
            path = re.sub("%[uhU%]", lambda token: tokens[token.group()], word)
            paths.append(path if path.startswith("/") else f"{account.home.rstrip('/')}/{path}")
        return paths

    def refusal(self, account: Account, key_type: str = "ssh-ed25519") -> str | None:
        """Say why `account` can't log in with a key; None if it can."""
        return self._of_account(account) or self._of_lists(account) or self._of_keys(key_type)

    def _of_account(self, account: Account) -> str | None:
        name = account.name
        if account.uid == 0:
            root = self.one("permitrootlogin", "prohibit-password")
            if root in {"no", "forced-commands-only"}:
                return f"PermitRootLogin is '{root}'"
        if _NO_SHELL.match(account.shell):
            return f"{name} has no shell ({account.shell})"
        if account.locked and self.one("usepam", "no") == "no":
            return f"{name}'s account is locked ('!' in /etc/shadow) and UsePAM is 'no'"
        if account.expired:
            return f"{name}'s account has expired"
        return None

    def _of_lists(self, account: Account) -> str | None:
        name, groups = account.name, account.groups
        deny, allow = self.words("denyusers"), self.words("allowusers")
        if (pattern := _first_user_match(deny, name)) is not None:
            return f"DenyUsers has '{pattern}'"
        if allow and _first_user_match(allow, name) is None:
            return f"AllowUsers admits only {_quoted(allow)}"
        deny, allow = self.words("denygroups"), self.words("allowgroups")
        if (pattern := _first_match(deny, groups)) is not None:
            return f"DenyGroups has '{pattern}'"
        if allow and _first_match(allow, groups) is None:
            return f"AllowGroups admits only {_quoted(allow)}"
        return None

    def _of_keys(self, key_type: str) -> str | None:
        if self.one("pubkeyauthentication", "yes") != "yes":
            return "PubkeyAuthentication is 'no'"
        methods = self.words("authenticationmethods")
        if methods and not {"any", "publickey"} & set(methods):
            return f"AuthenticationMethods asks for {_quoted(methods)}"
        algorithms = self.one("pubkeyacceptedalgorithms") or self.one("pubkeyacceptedkeytypes")
        if algorithms and key_type not in algorithms.split(","):
            return f"PubkeyAcceptedAlgorithms does not have {key_type}"
        if self.one("authorizedkeysfile") in {"", "none"}:
            return "AuthorizedKeysFile is 'none'"
        if self.max_sessions == 0:
            return "MaxSessions is 0"
        for keyword, name in (
            ("forcecommand", "ForceCommand"),
            ("chrootdirectory", "ChrootDirectory"),
        ):
            if self.one(keyword, "none") != "none":
                return f"{name} is '{self.one(keyword)}', so that no command runs as it is given"
        if self.one("refuseconnection", "no") == "yes":
            return "RefuseConnection is 'yes'"
        return None


def reachable(address: str) -> bool:
    """Whether a listener on `address` gets what QEMU's user network forwards."""
    if address in {"", "*"}:
        return True
    with suppress(ValueError):
        parsed = ipaddress.ip_address(address.partition("%")[0])
        return parsed.is_unspecified or str(parsed) == SLIRP_GUEST
    return True


def _quoted(words: Iterable[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)


def _match(pattern: str, text: str) -> bool:
    """Match as `match_pattern()` in OpenSSH's match.c does: `*` and `?`, nothing else."""
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


def _first_match(patterns: Iterable[str], names: Iterable[str]) -> str | None:
    names = tuple(names)
    return next((each for each in patterns if any(_match(each, name) for name in names)), None)


def _first_user_match(patterns: Iterable[str], user: str) -> str | None:
    """Return the first pattern that means `user` coming from `SLIRP_HOST`."""
    return next((each for each in patterns if user_matches(each, user)), None)


def user_matches(pattern: str, user: str) -> bool:
    """Whether a pattern of AllowUsers or DenyUsers means `user` coming from `SLIRP_HOST`."""
    name, at, host = pattern.partition("@")
    return _match(name, user) and (not at or _match_host(host))


def _match_host(pattern: str) -> bool:
    if "/" in pattern:
        with suppress(ValueError):
            network = ipaddress.ip_network(pattern, strict=False)
            return ipaddress.ip_address(SLIRP_HOST) in network
        return False
    return _match(pattern.lower(), SLIRP_HOST)
