"""What the channels of a VM keep in mind of whom they have let in."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_nixvm import channels as module
from pytest_nixvm.channels import Channels
from pytest_nixvm.errors import AgentError, QemuError
from pytest_nixvm.guest.sshd import SshAccess
from pytest_nixvm.qemu.loop import IoThread


@pytest.fixture
def channels(tmp_path: Path, monkeypatch):
    def forward(port: int) -> int:
        raise QemuError("the port can't be had")

    io = IoThread()
    qemu = SimpleNamespace(
        console_socket=tmp_path / "console",
        console_log=tmp_path / "console.log",
        agent_socket=tmp_path / "agent",
        monitor=None,
        ports=None,
        forward=forward,
    )
    monkeypatch.setattr(module, "Shell", lambda *_: None)
    made = Channels(qemu, io, lambda: SimpleNamespace(public_line="ssh-ed25519 KEY pytest-nixvm"))
    made.removed = []
    monkeypatch.setattr(
        module.sshd, "access", lambda _, user: SshAccess(user, 22, (), f"/keys/{user}", False)
    )
    monkeypatch.setattr(module, "install_key", lambda *_: None)
    monkeypatch.setattr(
        module, "remove_key", lambda _agent, found, _line: made.removed.append(found.user)
    )
    yield made
    io.close()


def test_key_of_a_log_in_that_failed_is_taken_out_as_well(channels):
    for _ in range(2):
        with pytest.raises(QemuError):
            channels.ssh_as("alice")
    channels.forget_keys()
    assert channels.removed == ["alice"]


def test_key_that_stays_keeps_no_other_in_there(channels, monkeypatch):
    tried = []

    def remove(_agent, found, _line):
        tried.append(found.user)
        if found.user == "alice":
            with pytest.raises(QemuError):
                channels.ssh_as("carol")  # let in meanwhile, by another thread
            raise AgentError("read-only file system")

    monkeypatch.setattr(module, "remove_key", remove)
    for user in ("alice", "bob"):
        with pytest.raises(QemuError):
            channels.ssh_as(user)
    with pytest.raises(AgentError, match="read-only"):
        channels.forget_keys()
    assert tried == ["alice", "bob", "carol"]
