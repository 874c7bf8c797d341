"""What the guest's own sshd allows, read through the agent, and the session's key where it counts.

Nothing is assumed of the tested configuration: the unit tells the program and its configuration,
`sshd -T` (sshd(8)) what holds for a user, and the key goes where AuthorizedKeysFile says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from pytest_nixvm.errors import AgentError, SshError, WaitTimeoutError
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.sshd_rules import (
    SLIRP_GUEST,
    SLIRP_HOST,
    Account,
    SshdConfig,
    candidates,
    reachable,
    read_accounts,
)
from pytest_nixvm.wait import Deadline, poll

_UNITS = ("sshd.service", "ssh.service", "sshd.socket", "ssh.socket")
_TEMPLATES = ("sshd@nixvm.service", "ssh@nixvm.service")
_PROGRAMS = ("/run/current-system/sw/bin/sshd", "/usr/sbin/sshd")
_WITH_VALUE = "bCcEfghkopu"
_KEPT = "cfhop"

_DUMP = """
users=$1; place=$2; shift 2
for user in $users; do
  echo "nixvm-user $user"
  "$@" -T -C "user=$user,$place" 2>&1
  echo "nixvm-status $?"
done
"""

# The directory of the file may be read-only (an immutable /etc): then a copy is mounted over it.
_INSTALL = """
file=$1; line=$(cat); directory=$(dirname "$file")
[ -e "$file" ] && grep -qxF -- "$line" "$file" && exit 0
mkdir -p "$directory" || exit
if ! new=$(mktemp "$directory/.nixvm.XXXXXX"); then
  copy=/run/pytest-nixvm/keys
  mkdir -p -m 0755 "$copy" && cp -RLp "$directory/." "$copy" || exit
  mount --bind "$copy" "$directory" && new=$(mktemp "$directory/.nixvm.XXXXXX") || exit
fi
{ [ ! -e "$file" ] || cat "$file"; echo; printf '%s\\n' "$line"; } >"$new" &&
  chmod 0644 "$new" && mv -f "$new" "$file"
"""

# With it go those (keys.COMMENT) of earlier runs on the same disk: their private halves are gone.
_REMOVE = """
file=$1; line=$(cat)
[ -e "$file" ] || exit 0
rest=$(grep -vxF -- "$line" "$file") || [ $? = 1 ] || exit
rest=$(printf '%s\\n' "$rest" | grep -v ' pytest-nixvm$') || [ $? = 1 ] || exit
printf '%s' "${rest:+$rest
}" >"$file"
"""

_EXPLAIN = """
if nft list ruleset 2>/dev/null | grep -q 'hook input'; then echo nftables
elif iptables -S INPUT 2>/dev/null | grep -qv '^-P INPUT ACCEPT'; then echo iptables; fi
echo nixvm-journal
journalctl -b --no-pager -q -o cat -n 8 -t sshd -t sshd-session 2>/dev/null
"""


@dataclass(frozen=True)
class SshAccess:
    """How to log in: as whom, where, and who the machine will say it is.

    `host_keys` are public key lines; `keys_file` is where the user's keys are looked for, in the
    guest; `max_sessions` is how many commands may run at once over one connection.
    """

    user: str
    port: int
    host_keys: tuple[str, ...]
    keys_file: str
    in_home: bool
    max_sessions: int = 10


@dataclass(frozen=True)
class SshRefusal:
    """Why nobody may log in with a key, in words that follow "because"."""

    reason: str

    def error(self, machine: str) -> SshError:
        """Return the error for whoever has asked for SSH to `machine`."""
        return SshError(f"There is no SSH to {machine}: {self.reason}.")


@dataclass(frozen=True)
class _Service:
    """sshd as the units describe it: its argv for `-T`, and the ports of its socket, if any."""

    argv: tuple[str, ...]
    socket_ports: tuple[int, ...] | None


def access(agent: Agent, user: str | None = None, timeout: float = 60) -> SshAccess | SshRefusal:
    """Find out who may log in with a key: `user` if given, else root, else somebody ordinary.

    Raises `AgentError` and `MachineGoneError` as the agent does.
    """
    deadline = Deadline(timeout)
    service = _service(agent, deadline)
    if isinstance(service, SshRefusal):
        return service
    accounts = _accounts(agent)
    if user is not None:
        if user not in accounts:
            return SshRefusal(f"there is no user '{user}' on it")
        rounds = [[accounts[user]]]
    else:
        tried_in_turn = candidates(accounts)
        rounds = [tried_in_turn[:1], tried_in_turn[1:]]  # mostly the first one may: cheaper
    reasons: dict[str, str] = {}
    for tried in filter(None, rounds):
        configs = _configs(agent, service, [each.name for each in tried], deadline)
        if isinstance(configs, SshRefusal):
            return configs
        for account in tried:
            found = _decide(agent, service, configs[account.name], account)
            if isinstance(found, SshAccess):
                return found
            reasons[account.name] = found.reason
    if not reasons:
        return SshRefusal("it has no account with a shell")
    if len(set(reasons.values())) == 1:
        names, reason = " or ".join(reasons), next(iter(reasons.values()))
        return SshRefusal(f"sshd does not let {names} in with a key: {reason}")
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return SshRefusal(f"sshd lets nobody in with a key ({listed})")


def install_key(agent: Agent, found: SshAccess, public_key: str) -> None:
    """Let `public_key` in as `found.user`; what is there already stays. Raises `AgentError`."""
    if found.in_home:
        with suppress(AgentError):  # an old agent, or no home yet: the script does it as well
            agent.add_ssh_key(found.user, public_key)
            return
    argv = ["/bin/sh", "-c", _INSTALL, "nixvm-install-key", found.keys_file]
    result = agent.exec(argv, stdin=public_key + "\n")
    if not result.ok:
        raise AgentError(
            f"The session's key can't be written to {found.keys_file}: {result.stderr.strip()}"
        )


def remove_key(agent: Agent, found: SshAccess, public_key: str) -> None:
    """Take out again what `install_key` has put in. Raises `AgentError`."""
    argv = ["/bin/sh", "-c", _REMOVE, "nixvm-remove-key", found.keys_file]
    result = agent.exec(argv, stdin=public_key + "\n")
    if not result.ok:
        raise AgentError(
            f"The session's key can't be taken out of {found.keys_file}: {result.stderr.strip()}"
        )


def explain(agent: Agent, found: SshAccess) -> str:
    """Say what the guest knows of a log-in that failed: listener, firewall, sshd's own words."""
    listening = any(
        _listens(agent.read_file(f"/proc/net/{table}").decode(), found.port)
        for table in ("tcp", "tcp6")
        if agent.exists(f"/proc/net/{table}")
    )
    if listening:
        text = f"In the guest something listens on port {found.port}."
    else:
        text = f"In the guest nothing listens on port {found.port}."
    script = agent.exec(["/bin/sh", "-c", _EXPLAIN, "nixvm-explain"], timeout=30).stdout
    firewall, _, journal = script.partition("nixvm-journal\n")
    if firewall.strip():
        text += f"\nIts firewall ({firewall.strip()}) is on and may drop what comes to that port"
        text += " (networking.firewall.allowedTCPPorts)."
    if journal.strip():
        text += "\nsshd's last words:\n" + "\n".join(
            "    " + line for line in journal.rstrip().splitlines()
        )
    return text


# --- the unit -----------------------------------------------------------------------------------


def _service(agent: Agent, deadline: Deadline) -> _Service | SshRefusal:
    units: dict[str, dict[str, list[str]]] = {}

    def settled() -> bool:
        units.update(_units(agent))
        states = {_state(unit) for unit in units.values()}
        return bool({"active", "reloading"} & states) or "activating" not in states

    with suppress(WaitTimeoutError):
        poll(settled, "sshd", timeout=min(30.0, max(1.0, deadline.remaining())))
    services = [units.get(name, {}) for name in (*_UNITS[:2], *_TEMPLATES)]
    argv = next((found for unit in services if (found := _argv(unit))), None)
    sockets = [units.get(name, {}) for name in _UNITS[2:]]
    socket = next((unit for unit in sockets if _state(unit) == "active"), None)
    running = any(_state(units.get(name, {})) in {"active", "reloading"} for name in _UNITS[:2])
    if not running and socket is None:
        for name in _UNITS:
            if (unit := units.get(name, {})) and unit.get("LoadState", [""])[0] != "not-found":
                return SshRefusal(f"{name} is not active: it is '{_state(unit)}'")
        return SshRefusal("there is no sshd on it (services.openssh.enable)")
    if argv is None:
        program = next((path for path in _PROGRAMS if agent.exists(path)), None)
        if program is None:
            return SshRefusal("its sshd's program can't be found")
        argv = (program,)
    return _Service(argv, None if socket is None else _socket_ports(socket))


def _units(agent: Agent) -> dict[str, dict[str, list[str]]]:
    names = [*_UNITS, *_TEMPLATES]
    properties = "Id,LoadState,ActiveState,Result,ExecStart,Listen"
    shown = agent.exec(["systemctl", "show", "--no-pager", f"--property={properties}", *names])
    if not shown.ok:
        raise AgentError(f"systemctl can't say what sshd does: {shown.stderr.strip()}")
    units: dict[str, dict[str, list[str]]] = {}
    # One block for each name, in the order asked for; an alias has another name in its Id.
    for name, block in zip(names, re.split(r"\n\n+", shown.stdout.strip()), strict=False):
        unit = units.setdefault(name, {})
        for line in block.splitlines():
            key, _, value = line.partition("=")
            unit.setdefault(key, []).append(value)
    return units


def _state(unit: dict[str, list[str]]) -> str:
    return unit.get("ActiveState", ["inactive"])[0]


def _argv(unit: dict[str, list[str]]) -> tuple[str, ...] | None:
    """Return sshd's program and those of its options that `-T` has to know."""
    for value in unit.get("ExecStart", []):
        found = re.search(r"argv\[\]=(.*?) ; ", value)
        words = found.group(1).split() if found else []
        if not words or not words[0].endswith("/sshd"):
            continue
        return (words[0], *_options(words[1:]))
    return None


def _options(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        letter = word[1:2] if word.startswith("-") else ""
        if letter and letter in _WITH_VALUE:
            value = word[2:] or next(rest, "")
            if letter in _KEPT:
                kept += [f"-{letter}", value]
    return kept


def _socket_ports(socket: dict[str, list[str]]) -> tuple[int, ...]:
    """Return the ports of `Listen=[::]:22 (Stream)` that can be reached from outside."""
    ports = []
    for value in socket.get("Listen", []):
        address, _, port = value.partition(" ")[0].rpartition(":")
        if port.isdigit() and reachable(address.strip("[]")):
            ports.append(int(port))
    return tuple(dict.fromkeys(ports))


# --- the rules ----------------------------------------------------------------------------------


def _accounts(agent: Agent) -> dict[str, Account]:
    texts = [
        agent.read_file(path).decode("utf-8", "replace") if agent.exists(path) else ""
        for path in ("/etc/passwd", "/etc/group", "/etc/shadow")
    ]
    return read_accounts(*texts)


def _configs(
    agent: Agent, service: _Service, users: Sequence[str], deadline: Deadline
) -> dict[str, SshdConfig] | SshRefusal:
    place = f"host={SLIRP_HOST},addr={SLIRP_HOST},laddr={SLIRP_GUEST},lport=22"
    names = [name for name in users if re.fullmatch(r"[\w.-]+\$?", name)]
    argv = ["/bin/sh", "-c", _DUMP, "nixvm-sshd", " ".join(names), place, *service.argv]
    dumped = agent.exec(argv, timeout=max(5.0, deadline.remaining())).stdout
    configs = {}
    for part in dumped.split("nixvm-user ")[1:]:
        name, _, text = part.partition("\n")
        dump, _, status = text.rpartition("nixvm-status ")
        if status.strip() != "0":
            command = shlex.join([*service.argv, "-T"])
            return SshRefusal(f"`{command}` does not accept its configuration: {dump.strip()}")
        configs[name] = SshdConfig.parse(dump)
    return configs


def _decide(
    agent: Agent, service: _Service, config: SshdConfig, account: Account
) -> SshAccess | SshRefusal:
    if (reason := config.refusal(account)) is not None:
        return SshRefusal(reason)
    ports = config.ports if service.socket_ports is None else service.socket_ports
    if not ports:
        where = config.words("listenaddress")
        return SshRefusal(f"sshd listens only on {', '.join(where) or 'no port'}")
    host_keys = _host_keys(agent, config, service)
    if not host_keys:
        return SshRefusal("none of sshd's host keys can be read")
    files = config.keys_files(account)
    home = f"{account.home.rstrip('/')}/.ssh/authorized_keys"
    in_home = home in files
    return SshAccess(
        user=account.name,
        port=22 if 22 in ports else ports[0],
        host_keys=host_keys,
        keys_file=home if in_home else files[0],
        in_home=in_home,
        max_sessions=config.max_sessions,
    )


def _host_keys(agent: Agent, config: SshdConfig, service: _Service) -> tuple[str, ...]:
    lines = []
    for path in config.words("hostkey"):
        try:
            text = agent.read_file(f"{path}.pub").decode("ascii", "replace")
        except AgentError:
            keygen = service.argv[0].replace("/sbin/", "/bin/").removesuffix("sshd") + "ssh-keygen"
            text = agent.exec([keygen, "-y", "-f", path]).stdout
        words = text.split()
        if len(words) >= 2:
            lines.append(f"{words[0]} {words[1]}")
    return tuple(lines)


def _listens(table: str, port: int) -> bool:
    """Whether /proc/net/tcp (proc_net_tcp(5)) has a listener (state 0A) on `port`."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
            return True
    return False
