"""Copies into a real VM and out of it, over SSH and over the shell."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_nixvm import Machine
from pytest_nixvm.errors import ChannelError

pytestmark = pytest.mark.nixvm("dev-vm")


def look(root: Path) -> dict[str, tuple[object, ...]]:
    seen: dict[str, tuple[object, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        info = path.lstat()
        what = path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes()
        seen[str(path.relative_to(root))] = (info.st_mode, int(info.st_mtime), info.st_nlink, what)
    return seen


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "empty").mkdir(parents=True)
    (root / ("long" * 40)).mkdir()
    (root / "größe, $(x) 'y'").write_bytes(b"\0\xff")
    (root / "tool").write_text("#!/bin/sh\n")
    (root / "tool").chmod(0o750)
    os.link(root / "tool", root / "twin")
    (root / "link").symlink_to("/nix/store/nowhere")
    os.utime(root / "empty", (1_100_000_000, 1_100_000_000))
    return root


@pytest.fixture(params=["ssh", "shell"])
def channel(request: pytest.FixtureRequest, vm: Machine) -> Iterator[str]:
    """Each way that a copy may take: the second without sshd."""
    if request.param == "ssh":
        yield "ssh"
        return
    vm.succeed("systemctl stop sshd.service")
    yield "shell"


def test_a_tree_is_the_same_after_both_ways(
    vm: Machine, channel: str, tree: Path, tmp_path: Path
) -> None:
    there = f"/tmp/files-{channel}"
    vm.put(tree, there)
    assert vm.succeed(f"stat -c %U:%G {there} {there}/tool") == "root:root\nroot:root\n"
    vm.get(there, tmp_path / "back")
    assert look(tmp_path / "back") == look(tree)
    copies = [entry for entry in vm.transcript.entries if entry.kind == "copy"]
    assert [entry.channel for entry in copies[-2:]] == [channel, channel]


def test_what_the_guest_does_not_take_is_said(vm: Machine, channel: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 1_000_000)
    with pytest.raises(ChannelError, match="the guest has no directory /no/such"):
        vm.put(tmp_path / "a", "/no/such/a")
    with pytest.raises(ChannelError, match="the guest has no /no/such"):
        vm.get("/no/such", tmp_path / "b")
    with pytest.raises(ChannelError, match="is neither a file nor a directory"):
        vm.get("/dev/null", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_guest_without_room_keeps_no_half_file(vm: Machine, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(4_000_000))
    vm.succeed("mkdir -p /tmp/small && mount -t tmpfs -o size=1M none /tmp/small")
    try:
        with pytest.raises(ChannelError, match="the disk in the guest is full"):
            vm.put(tmp_path / "a", "/tmp/small/a")
        assert vm.succeed("ls -A /tmp/small") == ""
    finally:
        vm.succeed("umount /tmp/small")


def test_the_drivers_verbs(vm: Machine, tree: Path) -> None:
    vm.copy_from_host(tree / "tool", "/tmp/made/for/tool")
    vm.copy_from_host_via_shell(tree / "tool", "/tmp/made/for/it")
    assert vm.transcript.entries[-1].channel == "shell"
    assert vm.succeed("stat -c %a /tmp/made/for/tool /tmp/made/for/it") == "750\n750\n"
    vm.copy_from_machine("/tmp/made/for/tool", "sub")
    vm.copy_from_vm("/tmp/made/for")
    assert (vm.output / "sub" / "tool").read_text() == "#!/bin/sh\n"
    assert (vm.output / "for" / "it").read_text() == "#!/bin/sh\n"


def test_what_is_larger_than_every_buffer(vm: Machine, channel: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 8
    (tmp_path / "big").write_bytes(data)
    vm.put(tmp_path / "big", "/dev/shm/big")
    vm.get("/dev/shm/big", tmp_path / "back")
    vm.succeed("rm /dev/shm/big")
    assert (tmp_path / "back").read_bytes() == data
