"""Who may log in: rules from a real `sshd -T`, and what is concluded from a guest's units."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from _guest import program

from pytest_nixvm.errors import AgentError
from pytest_nixvm.guest.agent import Agent
from pytest_nixvm.guest.keys import KeyPair
from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.guest.sshd import SshAccess, SshRefusal, access, explain, install_key, remove_key
from pytest_nixvm.guest.sshd_rules import (
    Account,
    SshdConfig,
    candidates,
    read_accounts,
    user_matches,
)

PASSWD = """\
root:x:0:0:System administrator:/root:/run/current-system/sw/bin/bash
sshd:x:996:996:SSH privilege separation user:/var/empty:/run/current-system/sw/bin/nologin
nixbld1:x:30001:30000:Nix build user 1:/var/empty:/run/current-system/sw/bin/nologin
bob:x:1000:100::/home/bob:/run/current-system/sw/bin/bash
alice:x:1001:100::/home/alice:/run/current-system/sw/bin/bash
carol:x:1002:100::/home/carol:/run/current-system/sw/bin/nologin
nobody:x:65534:65534::/var/empty:/run/current-system/sw/bin/nologin
"""
GROUP = "root:x:0:\nwheel:x:1:alice\nusers:x:100:\nssh-users:x:1234:bob,alice\n"
SHADOW = "root:!:1::::::\nbob:!:1::::::\nalice:$6$x$y:1:::::1:\n"
ROOT = Account("root", 0, "/root", "/bin/sh")
ALICE = Account("alice", 1001, "/home/alice", "/bin/sh", groups=("users", "wheel"))


def dump(directory: Path, text: str, user: str = "alice") -> SshdConfig:
    """What the real sshd makes of a configuration."""
    key = directory / "host"
    if not key.exists():
        key = KeyPair.generate(directory, "host").private
    config = directory / "config"
    config.write_text(f"HostKey {key}\n{text}\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    place = "host=10.0.2.2,addr=10.0.2.2,laddr=10.0.2.15,lport=22"
    done = subprocess.run(
        [program("sshd"), "-T", "-f", str(config), "-C", f"user={user},{place}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return SshdConfig.parse(done.stdout)


def test_what_sshd_allows_by_itself(tmp_path: Path) -> None:
    config = dump(tmp_path, "")
    assert config.refusal(ROOT) is None
    assert config.refusal(ALICE) is None
    assert config.ports == [22]
    assert config.max_sessions == 10
    assert config.keys_files(ALICE) == [
        "/home/alice/.ssh/authorized_keys",
        "/home/alice/.ssh/authorized_keys2",
    ]


@pytest.mark.parametrize(
    ("text", "account", "reason"),
    [
        ("PermitRootLogin no", ROOT, "PermitRootLogin is 'no'"),
        ("PermitRootLogin no", ALICE, None),
        ("PermitRootLogin forced-commands-only", ROOT, "forced-commands-only"),
        ("PermitRootLogin prohibit-password", ROOT, None),
        ("PubkeyAuthentication no", ALICE, "PubkeyAuthentication"),
        ("AuthenticationMethods publickey,password", ALICE, "asks for 'publickey,password'"),
        ("AuthenticationMethods publickey,password publickey", ALICE, None),
        ("AllowUsers bob carol", ALICE, "AllowUsers admits only 'bob', 'carol'"),
        ("AllowUsers bob\nAllowUsers al?ce", ALICE, None),
        ("AllowUsers alice@10.0.2.*", ALICE, None),
        ("AllowUsers alice@10.0.0.0/8", ALICE, None),
        ("AllowUsers alice@192.168.0.0/16", ALICE, "admits only 'alice@192.168.0.0/16'"),
        ("DenyUsers al*", ALICE, "DenyUsers has 'al*'"),
        ("DenyUsers alice\nAllowUsers alice", ALICE, "DenyUsers"),
        ("DenyUsers alice@192.168.*", ALICE, None),
        ("AllowGroups wheel x", ALICE, None),
        ("AllowGroups ssh-*", ALICE, "AllowGroups admits only 'ssh-*'"),
        ("DenyGroups wheel", ALICE, "DenyGroups has 'wheel'"),
        ("AuthorizedKeysFile none", ALICE, "AuthorizedKeysFile is 'none'"),
        ("ForceCommand internal-sftp", ALICE, "ForceCommand is 'internal-sftp'"),
        ("ChrootDirectory /srv", ALICE, "ChrootDirectory is '/srv'"),
        ("MaxSessions 0", ALICE, "MaxSessions is 0"),
        ("PubkeyAcceptedAlgorithms rsa-sha2-512", ALICE, "does not have ssh-ed25519"),
        ("Match User alice\n  ForceCommand /bin/true", ALICE, "ForceCommand"),
        ("Match Address 10.0.2.2\n  PubkeyAuthentication no", ALICE, "PubkeyAuthentication"),
        ("Match User bob\n  PubkeyAuthentication no", ALICE, None),
    ],
)
def test_reasons(tmp_path: Path, text: str, account: Account, reason: str | None) -> None:
    found = dump(tmp_path, text, account.name).refusal(account)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert reason in found


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("Port 2222", [2222]),
        ("Port 2222\nPort 22", [2222, 22]),
        ("ListenAddress 127.0.0.1", []),
        ("ListenAddress [::1]:22", []),
        ("ListenAddress 127.0.0.1:22\nListenAddress 0.0.0.0:2200", [2200]),
        ("ListenAddress 10.0.2.15", [22]),
        ("ListenAddress 192.168.7.7", []),
    ],
)
def test_ports_that_can_be_reached(tmp_path: Path, text: str, ports: list[int]) -> None:
    assert dump(tmp_path, text).ports == ports


def test_where_keys_are_looked_for(tmp_path: Path) -> None:
    config = dump(tmp_path, "AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u %h/k%%%U keys")
    assert config.keys_files(ALICE) == [
        "/etc/ssh/authorized_keys.d/alice",
        "/home/alice/k%1001",
        "/home/alice/keys",
    ]


def test_locked_and_expired_accounts() -> None:
    accounts = read_accounts(PASSWD, GROUP, SHADOW)
    without_pam, with_pam = SshdConfig.parse("usepam no"), SshdConfig.parse("usepam yes")
    keys = "authorizedkeysfile .ssh/authorized_keys"
    assert "locked" in str(without_pam.refusal(accounts["bob"]))
    assert SshdConfig.parse(f"usepam yes\n{keys}").refusal(accounts["bob"]) is None
    assert "expired" in str(with_pam.refusal(accounts["alice"]))
    assert "no shell" in str(with_pam.refusal(accounts["carol"]))


def test_who_is_tried_in_which_order() -> None:
    accounts = read_accounts(PASSWD, GROUP, SHADOW)
    # root, then people: those of wheel first. No builders, no services, nobody without a shell.
    assert [each.name for each in candidates(accounts)] == ["root", "alice", "bob"]
    assert accounts["alice"].groups == ("users", "wheel", "ssh-users")


def test_patterns_are_sshds_not_the_shells() -> None:
    assert user_matches("[a]lice", "[a]lice")
    assert not user_matches("[a]lice", "alice")
    assert user_matches("*", "alice")
    assert not user_matches("alice", "Alice")


# --- a guest --------------------------------------------------------------------------------------


class Guest:
    """Stands for the agent of a guest: this machine, with some files and systemctl replaced."""

    def __init__(self, root: Path, files: Mapping[str, str], **units: Mapping[str, str]) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir()
        self.keys_added: list[tuple[str, str]] = []
        self.key_error: Exception | None = None
        blocks = []
        for name in ("sshd.service", "ssh.service", "sshd.socket", "ssh.socket", "at1", "at2"):
            unit = units.get(name.replace(".", "_"), {"LoadState": "not-found"})
            lines = [f"{key}={value}" for key, value in {"Id": name, **unit}.items()]
            blocks.append("\n".join(lines))
        (root / "units").write_text("\n\n".join(blocks) + "\n")
        self._program("systemctl", f'cat "{root}/units"')
        self.files = dict(files)

    def _program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def exec(self, argv: list[str], *, stdin: str = "", timeout: float = 60) -> CommandResult:
        path = f"{self.bin}:{os.environ['PATH']}:/usr/sbin:/sbin"
        done = subprocess.run(
            argv,
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout,
            env={"PATH": path},
            check=False,
        )
        return CommandResult(argv, done.returncode, done.stdout, done.stderr, 0)

    def exists(self, path: str) -> bool:
        return path in self.files or Path(path).exists()

    def read_file(self, path: str) -> bytes:
        if path in self.files:
            return self.files[path].encode()
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise AgentError(str(error)) from error

    def add_ssh_key(self, user: str, key: str) -> None:
        if self.key_error is not None:
            raise self.key_error
        self.keys_added.append((user, key))

    @property
    def agent(self) -> Agent:
        return cast(Agent, self)


ACTIVE = {"LoadState": "loaded", "ActiveState": "active"}


def guest(tmp_path: Path, text: str = "", unit: Mapping[str, str] = ACTIVE, **units: Any) -> Guest:
    host = KeyPair.generate(tmp_path, "host")
    (tmp_path / "host.pub").write_text(host.public_line + "\n")
    config = tmp_path / "sshd_config"
    config.write_text(f"HostKey {tmp_path}/host\n{text}\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    argv = f"{program('sshd')} -D -f {config} $OPTIONS"
    start = f"{{ path={program('sshd')} ; argv[]={argv} ; ignore_errors=no ; status=0/0 }}"
    files = {
        "/etc/passwd": PASSWD,
        "/etc/group": GROUP,
        "/etc/shadow": SHADOW.replace(":::::1:", "::::::"),
    }
    all_units = {"sshd_service": {**unit, "ExecStart": start}, **units}
    return Guest(tmp_path, files, **all_units)


def test_root_gets_in_where_root_may(tmp_path: Path) -> None:
    vm = guest(tmp_path, "UsePAM yes\nMaxSessions 4")
    found = access(vm.agent)
    assert isinstance(found, SshAccess)
    assert (found.user, found.port, found.max_sessions) == ("root", 22, 4)
    public = (tmp_path / "host.pub").read_text().split()
    assert found.host_keys == (f"{public[0]} {public[1]}",)
    install_key(vm.agent, found, "ssh-ed25519 AAAA x")
    assert vm.keys_added == [("root", "ssh-ed25519 AAAA x")]


def test_somebody_else_where_root_may_not(tmp_path: Path) -> None:
    vm = guest(tmp_path, "Port 2222\nPermitRootLogin no\nAllowUsers alice\nUsePAM yes")
    found = access(vm.agent)
    assert isinstance(found, SshAccess)
    assert (found.user, found.port) == ("alice", 2222)


def test_a_wanted_user(tmp_path: Path) -> None:
    vm = guest(tmp_path, "UsePAM yes\nDenyUsers bob")
    found = access(vm.agent, user="alice")
    assert isinstance(found, SshAccess)
    assert found.user == "alice"
    refused = access(vm.agent, user="bob")
    assert isinstance(refused, SshRefusal)
    assert refused.reason == "sshd does not let bob in with a key: DenyUsers has 'bob'"
    assert access(vm.agent, user="x") == SshRefusal("there is no user 'x' on it")


def test_nobody_gets_in(tmp_path: Path) -> None:
    vm = guest(tmp_path, "UsePAM yes\nPermitRootLogin no\nAllowUsers root zoe")
    refused = access(vm.agent)
    assert isinstance(refused, SshRefusal)
    text = str(refused.error("dev-vm"))
    assert text.startswith("There is no SSH to dev-vm: sshd lets nobody in with a key (root: Perm")
    assert "alice: AllowUsers admits only 'root', 'zoe'; bob: AllowUsers" in text


def test_an_sshd_for_itself_only(tmp_path: Path) -> None:
    refused = access(guest(tmp_path, "ListenAddress 127.0.0.1\nUsePAM yes").agent)
    assert isinstance(refused, SshRefusal)
    assert "sshd listens only on 127.0.0.1:22" in refused.reason


@pytest.mark.parametrize("state", ["failed", "inactive"])
def test_an_sshd_that_does_not_run(tmp_path: Path, state: str) -> None:
    vm = guest(tmp_path, unit={"LoadState": "loaded", "ActiveState": state})
    assert access(vm.agent) == SshRefusal(f"sshd.service is not active: it is '{state}'")


def test_no_sshd(tmp_path: Path) -> None:
    vm = Guest(tmp_path, {})
    assert access(vm.agent) == SshRefusal("there is no sshd on it (services.openssh.enable)")


def test_a_configuration_that_sshd_refuses(tmp_path: Path) -> None:
    refused = access(guest(tmp_path, "NoSuchKeyword yes").agent)
    assert isinstance(refused, SshRefusal)
    assert "does not accept its configuration" in refused.reason
    assert "NoSuchKeyword" in refused.reason


def test_socket_activation(tmp_path: Path) -> None:
    vm = guest(
        tmp_path,
        "UsePAM yes",
        unit={"LoadState": "not-found", "ActiveState": "inactive"},
        sshd_socket={**ACTIVE, "Listen": "127.0.0.1:7 (Stream)\nListen=[::]:2022 (Stream)"},
    )
    found = access(vm.agent)
    assert isinstance(found, SshAccess)
    assert found.port == 2022


def test_a_host_key_without_its_public_file(tmp_path: Path) -> None:
    vm = guest(tmp_path, "UsePAM yes")
    public = (tmp_path / "host.pub").read_text().split()
    (tmp_path / "host.pub").unlink()
    found = access(vm.agent)
    assert isinstance(found, SshAccess)
    assert found.host_keys == (f"{public[0]} {public[1]}",)


def test_keys_outside_the_home(tmp_path: Path) -> None:
    keys = tmp_path / "etc" / "authorized_keys.d"
    vm = guest(tmp_path, f"UsePAM yes\nAuthorizedKeysFile {keys}/%u")
    found = access(vm.agent)
    assert isinstance(found, SshAccess)
    assert found.keys_file == f"{keys}/root"
    # As NixOS has it: a link into the store, which can't be written.
    store = tmp_path / "store"
    store.write_text("ssh-ed25519 OLD owner")
    store.chmod(0o444)
    keys.mkdir(parents=True)
    (keys / "root").symlink_to(store)
    for _ in range(2):  # the second time changes nothing
        install_key(vm.agent, found, "ssh-ed25519 NEW us")
        lines = list(filter(None, (keys / "root").read_text().splitlines()))
        assert lines == ["ssh-ed25519 OLD owner", "ssh-ed25519 NEW us"]
    assert not (keys / "root").is_symlink()
    assert (keys / "root").stat().st_mode & 0o777 == 0o644
    assert store.read_text() == "ssh-ed25519 OLD owner"
    assert [each.name for each in keys.iterdir()] == ["root"]
    assert vm.keys_added == []


def test_an_agent_that_can_not_add_keys(tmp_path: Path) -> None:
    vm = guest(tmp_path)
    vm.key_error = AgentError("CommandNotFound")
    file = tmp_path / "home" / ".ssh" / "authorized_keys"
    found = SshAccess("root", 22, (), str(file), in_home=True)
    install_key(vm.agent, found, "ssh-ed25519 NEW us")
    assert file.read_text().split("\n") == ["", "ssh-ed25519 NEW us", ""]


def test_a_key_that_can_not_be_written(tmp_path: Path) -> None:
    vm = guest(tmp_path)
    (tmp_path / "file").write_text("")
    found = SshAccess("root", 22, (), f"{tmp_path}/file/keys", in_home=False)
    with pytest.raises(AgentError, match=r"can't be written to .*file/keys: mkdir"):
        install_key(vm.agent, found, "ssh-ed25519 NEW us")


def test_a_key_is_taken_out_again_and_nothing_else(tmp_path: Path) -> None:
    vm = guest(tmp_path)
    file = tmp_path / "keys" / "root"
    file.parent.mkdir()
    file.write_text("ssh-ed25519 OLD owner\nssh-ed25519 NEW us too\n# -v x\n")
    before = file.read_text()
    found = SshAccess("root", 22, (), str(file), in_home=False)
    install_key(vm.agent, found, "ssh-ed25519 NEW us")
    file.chmod(0o640)
    status = file.stat()

    for _ in range(2):  # the second time changes nothing
        remove_key(vm.agent, found, "ssh-ed25519 NEW us")
        assert file.read_text() == before
        assert file.stat().st_mode == status.st_mode
        assert file.stat().st_ino == status.st_ino
    install_key(vm.agent, found, "ssh-ed25519 NEW us")
    assert "ssh-ed25519 NEW us" in file.read_text().splitlines()


def test_a_key_that_was_the_only_one_leaves_an_empty_file(tmp_path: Path) -> None:
    vm = guest(tmp_path)
    file = tmp_path / "keys" / "root"
    found = SshAccess("root", 22, (), str(file), in_home=False)
    install_key(vm.agent, found, "ssh-ed25519 NEW us")
    remove_key(vm.agent, found, "ssh-ed25519 NEW us")
    assert file.read_text().strip() == ""
    file.unlink()
    remove_key(vm.agent, found, "ssh-ed25519 NEW us")  # somebody else was quicker
    assert not file.exists()


def test_keys_of_earlier_runs_on_the_same_disk_go_as_well(tmp_path: Path) -> None:
    vm = guest(tmp_path)
    file = tmp_path / "keys"
    file.write_text(
        "ssh-ed25519 OLD pytest-nixvm\nssh-ed25519 A me\nssh-ed25519 B pytest-nixvm x\n"
    )
    found = SshAccess("root", 22, (), str(file), in_home=False)
    remove_key(vm.agent, found, "ssh-ed25519 NEW pytest-nixvm")
    assert file.read_text() == "ssh-ed25519 A me\nssh-ed25519 B pytest-nixvm x\n"


def test_a_key_that_can_not_be_taken_out_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    vm = guest(tmp_path)
    file = tmp_path / "keys"
    file.write_text("ssh-ed25519 OLD owner\n")
    found = SshAccess("root", 22, (), str(file), in_home=False)
    vm._program("grep", "echo 'input error' >&2; exit 2")
    with pytest.raises(AgentError, match=r"can't be taken out of .*/keys: input error"):
        remove_key(vm.agent, found, "ssh-ed25519 NEW us")
    assert file.read_text() == "ssh-ed25519 OLD owner\n"


def test_a_failed_login_is_explained(tmp_path: Path) -> None:
    vm = guest(tmp_path)
    vm._program("nft", "echo 'type filter hook input priority 0; policy drop;'")
    vm._program("journalctl", "echo 'Authentication refused: bad ownership'")
    head = "  sl  local_address rem_address   st\n"
    vm.files["/proc/net/tcp6"] = head
    vm.files["/proc/net/tcp"] = head + "   0: 00000000:0016 00000000:0000 0A 0:0\n"
    found = SshAccess("root", 22, (), "/x", in_home=False)
    text = explain(vm.agent, found)
    assert "something listens on port 22" in text
    assert "firewall (nftables) is on and may drop" in text
    assert "bad ownership" in text
    vm.files["/proc/net/tcp"] = head + "   0: 00000000:0016 00000000:0000 01 0:0\n"
    vm._program("nft", "exit 1")
    vm._program("iptables", "echo '-P INPUT ACCEPT'")
    text = explain(vm.agent, found)
    assert "nothing listens on port 22" in text
    assert "firewall" not in text
