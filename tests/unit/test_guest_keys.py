"""The session's key."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from _guest import program

from pytest_nixvm.guest.keys import KeyPair


def test_the_private_half_is_ours_alone_and_fits_the_public_one(tmp_path: Path) -> None:
    old = os.umask(0)  # whatever the user's umask is
    try:
        key = KeyPair.generate(tmp_path)
    finally:
        os.umask(old)
    assert key.private.stat().st_mode & 0o777 == 0o600
    kind, _, comment = key.public_line.split()
    assert (kind, comment) == ("ssh-ed25519", "pytest-nixvm")
    read = subprocess.check_output([program("ssh-keygen"), "-y", "-f", str(key.private)], text=True)
    assert read.split()[:2] == key.public_line.split()[:2]


def test_each_is_new_and_none_is_overwritten(tmp_path: Path) -> None:
    first = KeyPair.generate(tmp_path, "a")
    assert KeyPair.generate(tmp_path, "b").public_line != first.public_line
    with pytest.raises(FileExistsError):
        KeyPair.generate(tmp_path, "a")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        KeyPair.generate(tmp_path, "link")
