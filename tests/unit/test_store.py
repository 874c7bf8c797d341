"""Kept templates: trusted only if whole, made once, bounded, never taken from a user."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from _store import COMPONENTS, DATA, KEY, MIB, Process, fill, make, opened

from pytest_nixvm import store_files
from pytest_nixvm.errors import MachineError, SettingsError
from pytest_nixvm.store import Building, Entry, Store, key_of


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
        return digest(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(store_files, "digest", noted)
    return names


# --- keys -------------------------------------------------------------------------------------


def test_every_component_counts():
    base = {"machine": "a", "argv": ["-m", "1"], "nested": {"x": 1, "y": None}}
    others = [
        {**base, "machine": "b"},
        {**base, "argv": ["1", "-m"]},
        {**base, "nested": {"x": 1, "y": False}},
        {**base, "more": ""},
        {"machine": "a", "argv": ["-m", "1"]},
    ]
    keys = {key_of(components) for components in [base, *others]}

    assert len(keys) == len(others) + 1
    assert key_of(dict(reversed(base.items()))) == key_of(base)
    with pytest.raises(TypeError):
        key_of({"path": Path("/x")})


# --- what was sealed comes back ----------------------------------------------------------------


def test_an_entry_comes_back_as_it_was_sealed(store):
    assert store.open(KEY, COMPONENTS) is None
    assert not store.directory.exists()
    with store.build(KEY, COMPONENTS, timeout=5) as building:
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
    with store.build(KEY, COMPONENTS, timeout=5) as building:
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
    with store.build(KEY, COMPONENTS, timeout=5) as building:
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


def shift(path: Path) -> None:
    content = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(content[MIB:] + content[:MIB])


def link(path: Path) -> None:
    target = path.with_name("target")
    path.rename(store_aside := path.parent.parent / target.name)
    path.symlink_to(store_aside)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
    "truncated": (lambda d: os.truncate(d / "disk-0", 100), "disk-0: 100 bytes instead of 20000"),
    "cut by a block of zeros": (lambda d: os.truncate(d / "ram", 15 * MIB), "ram: 15728640 bytes"),
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
    "no JSON": (lambda d: os.truncate(d / "manifest.json", 50), "manifest.json: it can't be read"),
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

    assert pytest.raises(AssertionError, match=reason).matches(AssertionError(refused(store)))
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


# --- death at any moment -----------------------------------------------------------------------

# Each child ends itself with SIGKILL when it does the Nth thing with a file of the store.
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from _store import *
make(Store(Path({base!r}) / "warm"))
number, alive = 0, True
while alive:
    number += 1
    directory = Path({base!r}) / str(number)
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, arguments):
            global seen
            # Paths and descriptors: whatever is opened, made, locked, renamed, removed.
            if event == "open" or event.startswith(("os.", "fcntl.", "shutil.")):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        make(Store(directory))
        os._exit(0)
    alive = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print(number)
"""


def test_whatever_is_killed_leaves_nothing_that_is_trusted_and_half(tmp_path):
    program = KILLED.format(tests=str(Path(__file__).parent), base=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    assert last > 30
    whole = 0
    for number in range(1, last + 1):
        store = Store(tmp_path / str(number))
        entry = store.open(KEY, COMPONENTS, pytest.fail)
        if entry is None:
            building = store.begin(KEY, COMPONENTS, timeout=0)
            assert isinstance(building, Building)
            assert list(building.directory.iterdir()) == []
            building.abandon()
        else:
            whole += 1
            assert entry.data == DATA
            assert (entry.directory / "disk-0").read_bytes() == b"disk" * 5000
            entry.close()
    # Some died after the manifest was written, most before.
    assert 0 < whole < last / 2


def test_what_a_killed_process_left_is_removed(store):
    with Process(store.directory) as other:
        assert other.ask("b = store.begin(KEY, COMPONENTS, 5); fill(b.directory); say('half')")
        assert store.trim() == []
        [info] = store.entries()
        assert (info.complete, info.in_use) == (False, True)
    [info] = store.entries()
    assert (info.complete, info.in_use) == (False, False)

    assert store.trim() == [KEY]
    assert store.entries() == []


# --- several at once ---------------------------------------------------------------------------


def test_two_processes_share_one_build(store):
    with Process(store.directory) as first, Process(store.directory) as second:
        assert first.ask("b = store.begin(KEY, COMPONENTS, 5); say(type(b).__name__)") == "Building"
        second.tell(
            "e = store.begin(KEY, COMPONENTS, 60, lambda: say('waits')); say(e.data == DATA)"
        )
        assert second.hear() == "waits"
        assert first.ask("fill(b.directory); e = b.seal(DATA); say('sealed')") == "sealed"
        assert second.hear() == "True"
        first.kill()
        assert store.clear() == []
    assert [info.key for info in store.clear()] == [KEY]


def test_the_next_one_builds_if_the_first_is_killed(store):
    with Process(store.directory) as first, Process(store.directory) as second:
        first.ask("b = store.begin(KEY, COMPONENTS, 5); fill(b.directory); say('half')")
        second.tell("b = store.begin(KEY, COMPONENTS, 60, lambda: say('waits'))")
        assert second.hear() == "waits"
        first.kill()
        assert second.ask("say(type(b).__name__, list(b.directory.iterdir()))") == "Building []"


def test_waiting_ends_with_who_and_what_to_do(store):
    with Process(store.directory) as other:
        other.ask("b = store.begin(KEY, COMPONENTS, 5); say('building')")
        with pytest.raises(SettingsError) as caught:
            store.begin(KEY, COMPONENTS, timeout=0.1)

    text = str(caught.value)
    assert text.startswith(f"Process {other.process.pid} on ")
    assert f"waited 0.1 s for it (it holds {store.directory}/{KEY}.lock)" in text
    assert "--nixvm-cache=DIR" in text
    assert "\n" not in text


def test_another_thread_may_seal(store):
    building = store.begin(KEY, COMPONENTS, timeout=5)
    fill(building.directory)
    sealed: list[Entry] = []
    thread = threading.Thread(target=lambda: sealed.append(building.seal(DATA)))
    thread.start()
    thread.join()

    assert store.begin(KEY, COMPONENTS, timeout=0).data == sealed[0].data
    building.abandon()
    assert sealed[0].directory.exists()


def test_a_seal_is_given_up_when_the_building_is_abandoned(store, monkeypatch):
    building = store.begin(KEY, COMPONENTS, timeout=5)
    fill(building.directory)
    reading, errors = threading.Event(), []

    def endless(_path: Path, stopped) -> str:
        reading.set()
        while not stopped():
            pass
        raise store_files.Stopped

    def seal() -> None:
        with pytest.raises(MachineError, match="given up") as caught:
            building.seal(DATA)
        errors.append(caught.value)

    monkeypatch.setattr(store_files, "digest", endless)
    thread = threading.Thread(target=seal)
    thread.start()
    assert reading.wait(10)
    building.abandon()
    thread.join()

    assert errors
    assert not building.directory.exists()


def test_what_is_still_written_to_is_not_sealed(store, monkeypatch):
    digest = store_files.digest

    def written(path: Path, *rest) -> str:
        result = digest(path, *rest)
        os.utime(path)
        return result

    monkeypatch.setattr(store_files, "digest", written)
    with store.build(KEY, COMPONENTS, timeout=5) as building:
        fill(building.directory)
        with pytest.raises(MachineError, match=r"console\.log: it is being written to"):
            building.seal(DATA)
        # Its maker may use it on.
        assert (building.directory / "ram").exists()
    assert not building.directory.exists()


# --- the limit ---------------------------------------------------------------------------------


def several(store: Store, count: int) -> list[str]:
    """Make entries of about 40 KiB; the first was used the longest ago."""
    keys = [make(store, {**COMPONENTS, "number": number}) for number in range(count)]
    for age, key in enumerate(reversed(keys)):
        os.utime(store.directory / key / "used", (time.time() - 60 - age,) * 2)
    return keys


def there(store: Store) -> set[str]:
    return {info.key for info in store.entries()}


def test_the_least_recently_used_goes_first(store):
    keys = several(store, 4)
    size = store.entries()[0].size
    entry = store.open(keys[0], {**COMPONENTS, "number": 0})
    assert entry is not None
    entry.close()
    store.limit = size * 5 // 2

    assert store.trim() == [keys[1], keys[2]]
    assert there(store) == {keys[3], keys[0]}


def test_sealing_keeps_the_limit_and_itself(store):
    keys = several(store, 3)
    store.limit = store.entries()[0].size * 2 + 1000
    latest = make(store)

    assert there(store) == {keys[2], latest}
    store.limit = 1
    building = store.begin(keys[0], {**COMPONENTS, "number": 0}, timeout=5)
    fill(building.directory)
    entry = building.seal(DATA)
    assert there(store) == {keys[0]}
    entry.close()


def test_what_is_in_use_is_never_removed(store):
    keys = several(store, 3)
    store.limit = 1
    used = {**COMPONENTS, "number": 1}
    with Process(store.directory) as other:
        other.ask(f"e = store.open({keys[1]!r}, {used!r}); say('uses')")
        assert {info.key for info in store.entries() if info.in_use} == {keys[1]}
        assert store.trim() == [keys[0], keys[2]]
        assert store.clear() == store.clear([keys[1]]) == []
        assert there(store) == {keys[1]}
    # It was killed: nobody uses it any more.
    assert [info.key for info in store.clear()] == keys[1:2]
    assert not list(store.directory.glob(".removed-*"))


def test_trimming_at_once_removes_no_more_than_one_would(store):
    keys = several(store, 8)
    limit = store.entries()[0].size * 4
    processes = [Process(store.directory) for _ in range(3)]
    try:
        for process in processes:
            process.ask(f"store.limit = {limit}; say('ready')")
        for process in processes:
            process.tell("say(' '.join(store.trim()))")
        removed = sorted(" ".join(process.hear() for process in processes).split())
    finally:
        for process in processes:
            process.kill()

    assert removed == sorted(keys[:4])
    assert there(store) == set(keys[4:])


def test_clear_removes_what_is_named_and_says_so(store):
    keys = several(store, 3)

    [info] = store.clear([keys[1]])
    assert (info.key, info.name, info.complete) == (keys[1], "dev-vm", True)
    assert 20000 < info.size < MIB
    assert there(store) == {keys[0], keys[2]}


def test_other_things_in_the_directory_stay(store):
    make(store)
    (store.directory / "letters").mkdir()
    (store.directory / "letters" / "grandmother").touch()
    store.limit = 1
    store.trim()
    store.clear()

    assert (store.directory / "letters" / "grandmother").exists()
    assert there(store) == set()


# --- places that can't be used -----------------------------------------------------------------


def test_a_place_that_can_not_be_made(tmp_path):
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "templates")

    with pytest.raises(SettingsError, match=r"can't be kept in .*--nixvm-cache=DIR\.$") as caught:
        store.begin(KEY, COMPONENTS, timeout=5)
    assert "\n" not in str(caught.value)
    assert store.entries() == store.trim() == store.clear() == []


def mounted(tmp_path: Path, options: str) -> tuple[str, ...]:
    """Return a wrapper that gives a process a file system of its own at `tmp_path`."""
    script = f'mount -t tmpfs -o {options} none {tmp_path} && exec "$@"'
    wrapper = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    tried = shutil.which("unshare") and subprocess.run([*wrapper, "true"], capture_output=True)
    if not tried or tried.returncode:
        pytest.skip("no file systems can be mounted here")
    return wrapper


CATCH = "exec('try: {}\\nexcept SettingsError as error: say(error)')"


def test_a_full_disk_is_one_clear_line(tmp_path):
    with Process(tmp_path / "templates", *mounted(tmp_path, "size=256k")) as other:
        other.tell("from pytest_nixvm.errors import SettingsError")
        other.tell("b = store.begin(KEY, COMPONENTS, 5)")
        other.tell("f = (b.directory / 'ram').open('wb', buffering=0)")
        other.tell("exec('try:\\n while True: f.write(bytes(4096))\\nexcept OSError: f.close()')")
        said = other.ask(CATCH.format("b.seal(DATA)"))
        assert said.startswith(f"Templates can't be kept in {tmp_path}/templates: No space left")
        # Nothing is trusted; with room, it works.
        assert other.ask("b.abandon(); say(store.open(KEY, COMPONENTS))") == "None"
        assert other.ask("make(store); say(len(store.entries()))") == "1"


def test_a_disk_that_is_read_only_is_one_clear_line(tmp_path):
    with Process(tmp_path / "templates", *mounted(tmp_path, "ro")) as other:
        other.tell("from pytest_nixvm.errors import SettingsError")
        said = other.ask(CATCH.format("store.begin(KEY, COMPONENTS, 5)"))
        assert "Read-only file system. Make room there or name another place" in said
