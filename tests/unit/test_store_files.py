"""A kept template is trusted only if it is exactly what was sealed."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest
from _store import COMPONENTS, DATA, KEY, MIB, begun, fill, make, opened

from pytest_nixvm import store_files
from pytest_nixvm.errors import SettingsError
from pytest_nixvm.store import Building, Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "templates", limit=100 * MIB)


def refused(store: Store) -> str:
    """Return what is wrong with the entry, which has to be gone then."""
    said: list[str] = []
    assert store.open(KEY, COMPONENTS, said.append) is None
    assert not (store.directory / KEY).exists()
    [reason] = said
    assert "\n" not in reason
    return reason


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the names of the files whose content is read."""
    names: list[str] = []
    digest = store_files.digest

    def noted(path: Path, *rest: object) -> str:
        names.append(path.name)
        return digest(path, *rest)

    monkeypatch.setattr(store_files, "digest", noted)
    return names


# --- what was sealed comes back ----------------------------------------------------------------


def test_an_entry_comes_back_as_it_was_sealed(store):
    assert store.open(KEY, COMPONENTS) is None
    assert not store.directory.exists()
    with begun(store) as building:
        assert stat.S_IMODE(building.directory.stat().st_mode) == 0o700
        fill(building.directory)
        first = building.seal({**DATA, "pair": (1, 2)}, writable=frozenset({"ram"}))

    entry = opened(store)
    assert (entry.key, entry.directory) == (KEY, store.directory / KEY)
    assert entry.data == first.data == {**DATA, "pair": [1, 2]}
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in entry.directory.iterdir()}
    assert modes.pop("ram") == modes.pop("used") == modes.pop("manifest.json") == 0o600
    assert set(modes.values()) == {0o400}
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700


def test_what_is_not_sealed_goes(store):
    with begun(store) as building:
        fill(building.directory)

    assert not (store.directory / KEY).exists()
    assert store.open(KEY, COMPONENTS) is None
    assert make(store) == KEY


def test_content_is_read_only_after_a_change(store, monkeypatch):
    make(store)
    names = reads(monkeypatch)
    opened(store).close()
    assert names == []

    (store.directory / KEY / "disk-0").touch()
    monkeypatch.setattr(store_files, "_TICK", -(10**9))  # as if that was a while ago
    opened(store).close()
    assert names == ["disk-0"]
    opened(store).close()
    assert names == ["disk-0"]


def test_a_change_of_a_moment_ago_is_not_taken_for_settled(store, monkeypatch):
    make(store)
    monkeypatch.setattr(store_files, "_TICK", 3600 * 10**9)
    (store.directory / KEY / "disk-0").touch()
    opened(store).close()
    names = reads(monkeypatch)
    opened(store).close()

    assert names == ["disk-0"]


def test_a_copy_of_the_store_is_as_good(store, tmp_path):
    make(store)
    subprocess.run(["cp", "-a", "--sparse=never", store.directory, tmp_path / "copy"], check=True)
    copy = Store(tmp_path / "copy")

    entry = copy.open(KEY, COMPONENTS)
    assert entry is not None
    assert entry.data == DATA


def test_a_gigabyte_of_holes_stays_one_and_is_not_read(store):
    with begun(store) as building:
        fill(building.directory, size=1024 * MIB)
        building.seal(DATA).close()
    path = store.directory / KEY / "ram"
    assert path.stat().st_blocks * 512 < 2 * MIB
    path.chmod(0o600)
    began = time.process_time()
    opened(store).close()

    assert time.process_time() - began < 0.5


# --- what was damaged does not ------------------------------------------------------------------


def flip(path: Path, offset: int = -1) -> None:
    """Change one bit and give the file its old times again, as far as a program can."""
    status = path.stat()
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    path.chmod(0o400)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path, size: int) -> None:
    path.chmod(0o600)
    os.truncate(path, size)


def shift(path: Path) -> None:
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(content[MIB:] + content[:MIB])


def link(path: Path) -> None:
    target = path.rename(path.parents[1] / "target")
    path.symlink_to(target)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
    "truncated": (lambda d: cut(d / "disk-0", 100), "disk-0: 100 bytes instead of 20000"),
    "cut by a block of zeros": (lambda d: cut(d / "ram", 15 * MIB), "ram: 15728640 bytes"),
    "bit flipped": (lambda d: flip(d / "disk-0"), "disk-0: content changed"),
    "bit flipped in memory": (lambda d: flip(d / "ram", 3 * MIB + 9), "ram: content changed"),
    "bit set in a hole": (lambda d: flip(d / "ram", 9 * MIB), "ram: content changed"),
    "the same data elsewhere": (lambda d: shift(d / "ram"), "ram: content changed"),
    "a link": (lambda d: link(d / "state"), "state: a symbolic link"),
    "a directory": (
        lambda d: ((d / "state").unlink(), (d / "state").mkdir(mode=0o700)),
        "state: not what it should be",
    ),
    "a file too many": (lambda d: (d / "new").touch(), "new: not part of it"),
    "a file missing": (lambda d: (d / "console.log").unlink(), "console.log: missing"),
    "no lock": (lambda d: (d / "used").unlink(), "used: No such file or directory"),
    "a file for others": (lambda d: (d / "ram").chmod(0o440), r"ram: others .* \(mode 0440\)"),
    "open to others": (lambda d: d.chmod(0o755), r"the directory: others .* \(mode 0755\)"),
    "no JSON": (lambda d: cut(d / "manifest.json", 50), "manifest.json: it can't be read"),
    "not ours": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json: another format"),
    "another format": (
        lambda d: rewrite(d / "manifest.json", format=store_files.FORMAT + 1),
        "manifest.json: another format",
    ),
    "data changed": (
        lambda d: rewrite(d / "manifest.json", data={"argv": ["rm"]}),
        "manifest.json: content changed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(store, damage):
    make(store)
    act, reason = DAMAGES[damage]
    act(store.directory / KEY)

    assert re.match(reason, refused(store))
    assert make(store) == KEY
    opened(store).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", ["ram", "."])
def test_another_owners_file_is_refused(store, name):
    make(store)
    os.chown(store.directory / KEY / name, 12345, -1)

    assert refused(store).endswith("it belongs to user 12345")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_store_is_refused(store):
    make(store)
    os.chown(store.directory, 12345, -1)

    with pytest.raises(SettingsError, match=r"belongs to user 12345.*--nixvm-cache"):
        store.open(KEY, COMPONENTS)


def test_an_entry_that_was_made_of_something_else_is_refused(store):
    other = make(store, {**COMPONENTS, "qemu": "10.0"})
    (store.directory / other).rename(store.directory / KEY)

    assert "another machine or version" in refused(store)


def test_damage_that_somebody_uses_stays_until_they_are_done(store):
    make(store)
    entry = opened(store)
    flip(entry.directory / "disk-0")
    assert store.open(KEY, COMPONENTS) is None
    assert (entry.directory / "disk-0").exists()
    told = threading.Event()

    def done() -> None:
        told.set()
        entry.close()

    building = store.begin(KEY, COMPONENTS, timeout=20, waiting=done)
    assert told.is_set()
    assert isinstance(building, Building)
    assert list(building.directory.iterdir()) == []
    building.abandon()
