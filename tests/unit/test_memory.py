"""What fits into the memory: the arithmetic, the queue, and that deaths leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import ExitStack

import pytest

from pytest_nixvm import memory_ledger
from pytest_nixvm.errors import MachineError, SettingsError
from pytest_nixvm.memory import Budget, available, needs, total
from pytest_nixvm.wait import poll

MIB = 1024 * 1024


@pytest.fixture
def budget(tmp_path):
    """1100 MiB are available, 100 of them always left to others: 1000 to be had."""
    return make(tmp_path)


def make(tmp_path, available=1100):
    return Budget(tmp_path / "ledger", floor=100, available=lambda: available, total=lambda: 2000)


@pytest.fixture
def run():
    """Run a script in a process of its own; it has printed a line when this returns."""
    with ExitStack() as stack:

        def start(script, *arguments):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            process.first_line = process.stdout.readline()
            assert process.first_line
            return process

        yield start


OTHER = """
    import sys
    from pathlib import Path
    from pytest_nixvm.memory import Budget
    budget = Budget(Path(sys.argv[1]), floor=100, available=lambda: 1100, total=lambda: 2000)
"""

HOLDS = f"""{OTHER}
    reservation = budget.reserve(int(sys.argv[2]), "other-vm", timeout=5)
    if len(sys.argv) > 3:
        reservation.started(int(sys.argv[3]))
    print("reserved", flush=True)
    sys.stdin.read()
"""

WAITS = f"""{OTHER}
    budget.reserve(int(sys.argv[2]), "other-vm", timeout=60, waiting=lambda t: print(t, flush=True))
    print("reserved", flush=True)
    sys.stdin.read()
"""

IDLE = """
    import sys
    print("here", flush=True)
    sys.stdin.read()
"""


class Waiter(threading.Thread):
    """Reserves in the background; it waits when this returns."""

    def __init__(self, budget, mebibytes, what):
        super().__init__(daemon=True)
        self.what = what
        self.reservation = None
        self._arguments = (budget, mebibytes)
        self._waits = threading.Event()
        self.start()
        assert self._waits.wait(10)

    def run(self):
        budget, mebibytes = self._arguments
        self.reservation = budget.reserve(mebibytes, self.what, timeout=60, waiting=self._told)

    def _told(self, text):
        self.text = text
        self._waits.set()


def place(budget):
    """The directory that `budget` was made with."""
    return budget._ledger.directory.parent


def refused(budget, mebibytes, what="dev-vm", timeout=0.0):
    with pytest.raises(MachineError) as caught:
        budget.reserve(mebibytes, what, timeout=timeout)
    return str(caught.value)


# --- this computer ------------------------------------------------------------------------------


def test_this_computer_has_memory():
    assert 0 < available() <= total()


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        "MemTotal:        4096000 kB\nMemFree:          102400 kB\nMemAvailable:    2048000 kB\n"
    )
    (tmp_path / "cgroups").mkdir()
    return tmp_path / "proc"


def cgroup(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n")


def both(proc):
    where = {"proc": proc, "cgroups": proc.parent / "cgroups"}
    return available(**where), total(**where)


def test_without_cgroups_it_is_what_the_kernel_says(proc):
    assert both(proc) == (2000, 4000)


def test_a_cgroup_without_a_limit_changes_nothing(proc):
    (proc / "self" / "cgroup").write_text("0::/user.slice/run-1.scope\n")
    here = proc.parent / "cgroups" / "user.slice" / "run-1.scope"
    cgroup(here, memory__max="max", memory__high="max", memory__current=5 * MIB, memory__stat="")

    assert both(proc) == (2000, 4000)


@pytest.mark.parametrize("limited", ["user.slice", "user.slice/run-1.scope", "."])
@pytest.mark.parametrize("limit", ["memory__max", "memory__high"])
def test_a_limit_of_a_cgroup_or_of_one_above_it(proc, limited, limit):
    (proc / "self" / "cgroup").write_text("0::/user.slice/run-1.scope\n")
    cgroup(proc.parent / "cgroups" / "user.slice" / "run-1.scope", memory__max="max")
    cgroup(
        proc.parent / "cgroups" / limited,
        **{limit: 1000 * MIB},
        memory__current=900 * MIB,
        memory__stat=f"anon 1\ninactive_file {150 * MIB}\nactive_file {50 * MIB}\nshmem {MIB}",
    )

    # The 200 MiB of file cache can be had again.
    assert both(proc) == (300, 1000)


def test_a_cgroup_that_is_full_leaves_nothing(proc):
    (proc / "self" / "cgroup").write_text("0::/x\n")
    cgroup(proc.parent / "cgroups" / "x", memory__max=100 * MIB, memory__current=101 * MIB)

    assert both(proc) == (0, 100)


V1 = {
    "memory__limit_in_bytes": 1000 * MIB,
    "memory__usage_in_bytes": 900 * MIB,
    "memory__stat": f"inactive_file 7\ntotal_inactive_file {60 * MIB}\ntotal_active_file {MIB}",
}


def test_a_limit_of_version_1(proc):
    (proc / "self" / "cgroup").write_text("5:cpu:/\n4:memory:/docker/abc\n0::/\n")
    cgroup(proc.parent / "cgroups" / "memory" / "docker" / "abc", **V1)

    assert both(proc) == (161, 1000)


def test_version_1_s_way_to_say_no_limit(proc):
    (proc / "self" / "cgroup").write_text("4:memory:/\n")
    cgroup(proc.parent / "cgroups" / "memory", **V1 | {"memory__limit_in_bytes": 2**63 - 4096})

    assert both(proc) == (2000, 4000)


@pytest.mark.parametrize("name", ["/docker/abc", "/../../abc"])
def test_in_a_container_the_cgroup_has_another_path(proc, name):
    (proc / "self" / "cgroup").write_text(f"4:memory:{name}\n")
    cgroup(proc.parent / "cgroups" / "memory", **V1)

    assert both(proc) == (161, 1000)


@pytest.mark.parametrize(("whole", "floor"), [(2000, 256), (16000, 800), (512000, 2048)])
def test_what_is_left_to_others(tmp_path, whole, floor):
    assert Budget(tmp_path, total=lambda: whole).floor == floor


@pytest.mark.parametrize(
    ("memory", "clone", "mebibytes"),
    [(1024, False, 868), (256, False, 356), (1024, True, 320), (64, True, 128)],
)
def test_what_a_vm_takes(memory, clone, mebibytes):
    assert needs(memory, clone=clone) == mebibytes


# --- reserving ----------------------------------------------------------------------------------


def test_what_fits_is_reserved_and_given_back(budget):
    first = budget.reserve(600, "a", timeout=0)
    budget.reserve(400, "b", timeout=0)
    assert "0 of 2000 MiB are free" in refused(budget, 1)

    first.release()
    first.release()
    budget.reserve(600, "c", timeout=0)
    assert "0 of 2000 MiB are free" in refused(budget, 1)


def test_it_waits_until_it_fits(budget):
    first = budget.reserve(900, "a", timeout=0)
    second = Waiter(budget, 320, "dev-vm")

    assert second.text == (
        "waiting for memory: dev-vm needs 320 MiB, 100 of 2000 MiB are free; "
        "1 VM of pytest-nixvm holds 900"
    )
    first.release()
    second.join(10)
    assert second.reservation


def test_it_waits_for_other_programs_as_well(tmp_path):
    free = [500]
    budget = Budget(tmp_path, floor=100, available=lambda: free[0], total=lambda: 2000)
    budget.reserve(300, "a", timeout=0)
    second = Waiter(budget, 320, "dev-vm")

    free[0] = 720
    second.join(10)
    assert second.reservation


def test_the_line_about_waiting_comes_once(budget):
    budget.reserve(900, "a", timeout=0)
    lines = []

    with pytest.raises(MachineError):
        budget.reserve(320, "dev-vm", timeout=0.3, waiting=lines.append)
    assert len(lines) == 1


def test_in_vain(budget, run):
    run(HOLDS, place(budget), 300)
    mine = budget.reserve(600, "web", timeout=0)
    idle = run(IDLE)
    mine.started(idle.pid)

    text = refused(budget, 320, timeout=0.2)

    first, second, *vms, last = text.splitlines()
    assert first.startswith(
        "Waited 0.2 s for memory, in vain: dev-vm needs 320 MiB, 1"
    )  # 100 and what the idle process has
    assert first.endswith("of them promised to VMs, 100 left to other programs).")
    assert second == "2 VMs of pytest-nixvm hold 900 MiB:"
    assert vms[0].startswith("    web: 600 MiB, of process ")
    assert vms[1].startswith("    other-vm: 300 MiB, of process ")
    assert "--nixvm-memory" in last
    assert "fewer workers" in last


def test_a_long_list_is_cut(budget):
    for number in range(20):
        budget.reserve(10, f"vm-{number}", timeout=0)

    text = refused(budget, 900)
    assert "20 VMs of pytest-nixvm hold 200 MiB:" in text
    assert "    and 8 more\n" in text


def test_what_never_fits_is_refused_long_before_the_timeout(budget):
    lines = []

    with pytest.raises(MachineError) as caught:
        budget.reserve(1001, "dev-vm", timeout=3600, waiting=lines.append)

    assert str(caught.value).startswith(
        "There is not enough memory: dev-vm needs 1001 MiB, 1000 of 2000 MiB are free "
        "(1100 are available, 0 of them promised to VMs, 100 left to other programs).\n"
        "No VM of pytest-nixvm is running.\nWhat helps: less memory for the VM (--nixvm-memory=MIB)"
    )
    assert not lines


def test_what_would_not_fit_without_our_vms_either_is_refused(budget):
    budget.reserve(100, "a", timeout=0)

    assert "not enough memory: dev-vm needs 1200 MiB" in refused(budget, 1200, timeout=3600)


def test_memory_that_comes_back_a_moment_late(tmp_path):
    looks = iter([100, 100, 100])
    budget = Budget(tmp_path, floor=100, available=lambda: next(looks, 1100), total=lambda: 2000)

    budget.reserve(500, "dev-vm", timeout=60)


def test_room_is_made_before_anybody_is_told_to_wait(budget):
    spares = [budget.try_reserve(300, f"spare-{n}") for n in range(3)]
    lines = []

    def make_room():
        if spares:
            spares.pop().release()
            return True
        return False

    budget.reserve(650, "dev-vm", timeout=0, make_room=make_room, waiting=lines.append)

    assert len(spares) == 1  # no more than needed
    assert not lines


def test_room_is_not_made_if_it_fits(budget):
    budget.reserve(1000, "dev-vm", timeout=0, make_room=lambda: pytest.fail("not needed"))


def test_a_spare_leaves_twice_the_floor(budget):
    assert budget.try_reserve(901, "spare") is None
    assert budget.try_reserve(900, "spare") is not None
    assert budget.try_reserve(1, "spare") is None
    budget.reserve(100, "dev-vm", timeout=0)


# --- the queue ----------------------------------------------------------------------------------


def test_a_big_one_is_not_overtaken_by_small_ones(budget):
    holder = budget.reserve(600, "a", timeout=0)
    big = Waiter(budget, 950, "big")
    small = Waiter(budget, 100, "small")

    assert small.text.endswith(
        "400 of 2000 MiB are free; 1 VM of pytest-nixvm holds 600; 1 waited before it"
    )
    assert budget.try_reserve(10, "spare") is None
    assert budget.contended()

    holder.release()
    big.join(10)
    assert small.is_alive()
    big.reservation.release()
    small.join(10)
    assert small.reservation
    poll(lambda: not budget.contended(), "the queue to be empty", timeout=5, interval=0.01)


def test_who_waits_in_another_process_is_first(budget, run):
    holder = budget.reserve(600, "a", timeout=0)
    other = run(WAITS, place(budget), 950)

    assert "dev-vm waits behind 1 other.\n" in refused(budget, 100)
    holder.release()
    assert other.stdout.readline() == "reserved\n"
    other.stdin.close()
    other.wait(10)
    budget.reserve(1000, "b", timeout=10)


def test_who_waited_and_was_killed_is_not_waited_for(budget, run):
    budget.reserve(600, "a", timeout=0)
    other = run(WAITS, place(budget), 950)

    other.kill()
    budget.reserve(100, "dev-vm", timeout=10)


def test_who_waits_and_is_stopped_is_passed(budget, run, monkeypatch):
    monkeypatch.setattr(memory_ledger, "_ABSENT", 0.5)
    holder = budget.reserve(600, "a", timeout=0)
    other = run(WAITS, place(budget), 950)

    other.send_signal(signal.SIGSTOP)
    budget.reserve(100, "dev-vm", timeout=10).release()
    holder.release()
    other.send_signal(signal.SIGCONT)
    assert other.stdout.readline() == "reserved\n"


def test_who_gives_up_leaves_the_queue(budget):
    budget.reserve(600, "a", timeout=0)

    def interrupt(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        budget.reserve(500, "b", timeout=60, waiting=interrupt)
    assert not budget.contended()
    budget.reserve(400, "c", timeout=0)


# --- what a VM really uses ----------------------------------------------------------------------

TAKES = """
    import mmap, sys
    way, size = sys.argv[1], int(sys.argv[2])
    if way == "shared":
        memory = mmap.mmap(-1, size)      # as memfd: shmem
    elif way == "anonymous":
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        file = open(sys.argv[3], "rb")
        memory = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE,
                           prot=mmap.PROT_READ | mmap.PROT_WRITE)
    for page in range(0, size, mmap.PAGESIZE):
        if way == "read":
            memory[page]
        else:
            memory[page] = 1
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["anonymous", "shared", "written"])
def test_what_a_vm_uses_is_not_counted_twice(budget, run, tmp_path, way):
    (tmp_path / "ram").write_bytes(bytes(200 * MIB))
    reservation = budget.reserve(400, "a", timeout=0)
    vm = run(TAKES, way, 200 * MIB, tmp_path / "ram")

    # `available` stays as it is here: what is used counts as free again.
    reservation.started(vm.pid)
    budget.reserve(790, "b", timeout=0)
    assert "2 VMs of pytest-nixvm hold 1190 MiB" in refused(budget, 100)


def test_what_a_clone_shares_with_its_template_is_still_to_come(budget, run, tmp_path):
    # It is in the page cache, which `available` counts as free.
    (tmp_path / "ram").write_bytes(bytes(200 * MIB))
    reservation = budget.reserve(400, "a", timeout=0)
    vm = run(TAKES, "read", 200 * MIB, tmp_path / "ram")

    reservation.started(vm.pid)
    refused(budget, 790)
    budget.reserve(600, "b", timeout=0)


def test_a_vm_that_uses_more_than_it_reserved(budget, run):
    reservation = budget.reserve(50, "a", timeout=0)
    vm = run(TAKES, "anonymous", 200 * MIB)

    reservation.started(vm.pid)
    budget.reserve(1000, "b", timeout=0)
    assert "0 of 2000 MiB are free" in refused(budget, 1)


# --- deaths -------------------------------------------------------------------------------------


def test_what_another_process_has_counts_until_it_is_killed(budget, run):
    other = run(HOLDS, place(budget), 900)
    assert "1 VM of pytest-nixvm holds 900" in refused(budget, 320)

    other.kill()  # it is not waited for: a zombie has no memory
    budget.reserve(1000, "dev-vm", timeout=10)


def test_a_vm_that_is_kept_counts_until_it_ends(budget, run):
    vm = run(IDLE)
    other = run(HOLDS, place(budget), 900, vm.pid)
    other.kill()
    other.wait()

    text = refused(budget, 320)
    assert f"    other-vm: 900 MiB, left running; to end it: kill {vm.pid}\n" in text

    vm.kill()
    budget.reserve(1000, "dev-vm", timeout=10)


def test_a_vm_that_ended_holds_nothing_though_its_owner_lives(budget, run):
    vm = run(IDLE)
    reservation = budget.reserve(900, "a", timeout=0)
    reservation.started(vm.pid)
    vm.kill()
    vm.wait()

    budget.reserve(1000, "b", timeout=10)
    assert "1 VM of pytest-nixvm holds 1000 MiB" in refused(budget, 1)


def test_a_vm_that_was_released_is_not_brought_back(budget, run):
    reservation = budget.reserve(900, "a", timeout=0)
    reservation.release()
    reservation.started(run(IDLE).pid)

    budget.reserve(1000, "b", timeout=0)


def test_another_process_with_the_same_pid_is_not_taken_for_the_owner(budget, run):
    run(HOLDS, place(budget), 900)
    [path] = budget._ledger.directory.glob("*.reserved")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"owner_started": "1"}))

    budget.reserve(1000, "dev-vm", timeout=0)


# --- several at once ----------------------------------------------------------------------------

RACES = f"""{OTHER}
    import time, uuid
    held = Path(sys.argv[2])
    # Whoever looks takes his time before he decides.
    budget._available = lambda: time.sleep(0.01) or 1100
    print("ready", flush=True)
    sys.stdin.readline()
    most = 0
    for _ in range(8):
        reservation = budget.reserve(300, "vm", timeout=60)
        mark = held / uuid.uuid4().hex
        mark.touch()
        time.sleep(0.02)  # a VM's life
        most = max(most, len(list(held.iterdir())))
        mark.unlink()
        reservation.release()
    print(most, flush=True)
"""


def test_processes_that_reserve_at_once_never_have_more_than_there_is(budget, run, tmp_path):
    (tmp_path / "held").mkdir()
    racers = [run(RACES, place(budget), tmp_path / "held") for _ in range(5)]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()

    most = [int(racer.stdout.readline()) for racer in racers]

    assert max(most) <= 3
    assert not list(budget._ledger.directory.glob("*.*"))


def test_threads_that_reserve_at_once(tmp_path):
    budget = Budget(
        tmp_path, floor=100, available=lambda: time.sleep(0.01) or 1100, total=lambda: 2000
    )
    held, most, errors = [], [], []

    def work():
        try:
            for _ in range(5):
                reservation = budget.reserve(300, "vm", timeout=60)
                held.append(1)
                time.sleep(0.02)  # a VM's life
                most.append(len(held))
                held.pop()
                reservation.release()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert not errors
    assert len(most) == 30
    assert max(most) <= 3


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"what": "a", "meb',
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"what": "a", "mebibytes": "9"}',
    ],
)
def test_files_that_are_no_entries_are_dropped(budget, content):
    for name in ("x.reserved", "000000001.x.waiting", "x.waiting"):
        (budget._ledger.directory / name).write_bytes(content)

    budget.reserve(1000, "dev-vm", timeout=0)
    assert not (budget._ledger.directory / "x.reserved").exists()


def test_a_cache_that_is_cleared_meanwhile(budget):
    holder = budget.reserve(900, "a", timeout=0)
    second = Waiter(budget, 500, "b")
    shutil.rmtree(place(budget), ignore_errors=True)

    second.join(10)
    assert second.reservation
    holder.release()


def test_a_ledger_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(SettingsError, match=r"^Can't write to .*--nixvm-cache.*$"):
        Budget(tmp_path / "file" / "ledger")


def test_what_an_earlier_boot_left_is_removed(tmp_path, monkeypatch):
    old, foreign = tmp_path / "01234567-89ab-4026531836", tmp_path / "thesis"
    for path in (old, foreign):
        path.mkdir()
        (path / "x.reserved").write_text("{}")
        os.utime(path, (time.time() - 40 * 24 * 3600,) * 2)

    Budget(tmp_path)
    assert not old.exists()
    assert foreign.exists()
