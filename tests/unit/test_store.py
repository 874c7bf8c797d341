"""Kept templates: made once, whole or not at all, bounded, never taken from who uses them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from _store import COMPONENTS, DATA, KEY, MIB, Process, begun, fill, make

from pytest_nixvm import store_files
from pytest_nixvm.errors import MachineError, SettingsError
from pytest_nixvm.store import Building, Entry, Store, key_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "templates", limit=100 * MIB)


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
    with begun(store) as building:
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
