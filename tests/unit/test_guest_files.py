"""Tar streams with the real tar, in a local process where the guest would be."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import pytest

from pytest_nixvm.errors import ChannelError
from pytest_nixvm.guest import files
from pytest_nixvm.guest.result import CommandResult


def local(
    argv: Sequence[str], *, stdin: BinaryIO | None, stdout: BinaryIO | None, timeout: float
) -> CommandResult:
    done = subprocess.run(
        argv, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=timeout, check=False
    )
    return CommandResult(list(argv), done.returncode, b"", done.stderr, 0.0, channel="shell")


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
    (root / "sub" / ("long" * 50)).mkdir(parents=True)
    (root / "sub" / "größe, $(x) 'y'").write_bytes(b"\0\xff")
    tool = root / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o4755)
    os.utime(tool, (1_000_000_000, 1_000_000_000))
    os.link(tool, root / "twin")
    (root / "link").symlink_to("/nix/store/nowhere")
    (root / "empty").chmod(0o1700)
    os.utime(root / "empty", (1_100_000_000, 1_100_000_000))
    return root


def test_a_tree_is_the_same_after_both_ways(tree: Path, tmp_path: Path) -> None:
    files.put(local, tree, f"{tmp_path}/in")
    assert look(tmp_path / "in") == look(tree)
    files.get(local, f"{tmp_path}/in", tmp_path / "out")
    assert look(tmp_path / "out") == look(tree)


def test_a_file_goes_into_a_directory_or_gets_the_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    (tmp_path / "d").mkdir()
    files.put(local, tmp_path / "a", f"{tmp_path}/d")
    files.put(local, tmp_path / "a", f"{tmp_path}/d/b")
    files.get(local, f"{tmp_path}/a", tmp_path / "d" / "c")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("target", ["none/a", "none/"])
def test_a_missing_target_directory_is_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "a").write_text("text")
    with pytest.raises(ChannelError, match=r"the guest has no directory .*none"):
        files.put(local, tmp_path / "a", f"{tmp_path}/{target}")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match=r"the guest has no .*none"):
        files.get(local, f"{tmp_path}/none", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def hostile(name: str, kind: bytes, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, type_, to in [
            ("copied", tarfile.DIRTYPE, ""),
            ("copied/away", tarfile.SYMTYPE, "/tmp"),
            (name, kind, link),
        ]:
            member = tarfile.TarInfo(path)
            member.type, member.linkname = type_, to
            tar.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        hostile("/etc/x", tarfile.REGTYPE),
        hostile("copied/../x", tarfile.REGTYPE),
        hostile("copied/away/x", tarfile.REGTYPE),
        hostile("copied/away", tarfile.REGTYPE),
        hostile("copied/x", tarfile.LNKTYPE, "/etc/passwd"),
        hostile("copied/x", tarfile.CHRTYPE),
    ],
)
def test_a_hostile_archive_is_refused(tmp_path: Path, archive: bytes) -> None:
    def guest(
        argv: Sequence[str], *, stdin: BinaryIO | None, stdout: BinaryIO | None, timeout: float
    ) -> CommandResult:
        assert stdout is not None
        stdout.write(archive)
        return CommandResult(list(argv), 0, b"", b"", 0.0, channel="shell")

    with pytest.raises(ChannelError, match="is refused"):
        files.get(guest, "/srv", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_is_cut_short_has_no_final_name(tree: Path, tmp_path: Path) -> None:
    def cut(
        argv: Sequence[str], *, stdin: BinaryIO | None, stdout: BinaryIO | None, timeout: float
    ) -> CommandResult:
        assert stdin is not None
        data = stdin.read()
        part = tmp_path / "part"
        part.write_bytes(data[: data.index(b"complete\0")])
        with part.open("rb") as file:
            return local(argv, stdin=file, stdout=None, timeout=timeout)

    with pytest.raises(ChannelError, match="cut short"):
        files.put(cut, tree, f"{tmp_path}/in")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "tree"]


def test_a_gibibyte_takes_no_memory(tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files.put(local, big, f"{tmp_path}/in")
    big.unlink()
    files.get(local, f"{tmp_path}/in", big)
    (tmp_path / "in").unlink()
    assert big.stat().st_size == 1 << 30
    big.unlink()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
