"""Nothing outlives the session: the supervisor, its client, and every way to end them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from _qemu import Pipe, executable, marked, running, wait_gone

from pytest_nixvm.errors import QemuError
from pytest_nixvm.qemu import _supervise
from pytest_nixvm.qemu.supervisor import Process, Supervisor

ROOT = Path(__file__).parents[2]
PATH = {"PATH": os.environ["PATH"]}


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.close()


@pytest.fixture
def pipe(tmp_path: Path) -> Pipe:
    return Pipe(tmp_path / "pipe")


def helpers_script(directory: Path, pipe: Path, *, last: str = "exec sleep 300") -> Path:
    """A start script with a child, and a helper that makes a daemon of itself, as swtpm does."""
    script = directory / "run-with-helpers"
    script.write_text(f"""#!/bin/bash
sleep 301 & child=$!
daemon=$( (setsid sleep 302 >/dev/null 2>&1 & echo $!) )
echo $$ $child $daemon > {pipe}
{last}
""")
    return executable(script)


def start_helpers(
    supervisor: Supervisor, directory: Path, pipe: Pipe, **more: str
) -> tuple[Process, list[int]]:
    script = helpers_script(directory, pipe.path, **more)
    process = supervisor.spawn([str(script)], env=PATH, cwd=directory, log=directory / "log")
    return process, [int(pid) for pid in pipe.read().split()]


def shell(supervisor: Supervisor, directory: Path, line: str, **env: str) -> Process:
    return supervisor.spawn(
        ["/bin/sh", "-c", line], env={**PATH, **env}, cwd=directory, log=directory / "log"
    )


# --- spawning ---


@pytest.mark.parametrize(("line", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", -15)])
def test_exit_status(supervisor: Supervisor, tmp_path: Path, line: str, status: int) -> None:
    process = shell(supervisor, tmp_path, line)
    assert process.wait(10) == status
    assert process.returncode == status


def test_on_exit_is_called_when_it_ends_and_when_it_has_ended(
    supervisor: Supervisor, tmp_path: Path, pipe: Pipe
) -> None:
    process = shell(supervisor, tmp_path, f"read line < {pipe.path}; exit 4")
    seen: list[int] = []
    called = threading.Event()
    process.on_exit(seen.append)
    process.on_exit(lambda _: called.set())
    with pytest.raises(TimeoutError):
        process.wait(0)
    pipe_writer = os.open(pipe.path, os.O_WRONLY)
    os.write(pipe_writer, b"go\n")
    os.close(pipe_writer)
    assert called.wait(10)
    process.on_exit(seen.append)
    assert seen == [4, 4]


def test_on_exit_may_use_the_supervisor(supervisor: Supervisor, tmp_path: Path) -> None:
    process = shell(supervisor, tmp_path, "sleep 300")
    done = threading.Event()

    def callback(_status: int) -> None:
        shell(supervisor, tmp_path, "exit 0").wait(10)
        process.kill()
        done.set()

    process.on_exit(callback)
    process.kill()
    assert done.wait(10)


@pytest.mark.parametrize(
    ("argv", "directory", "wanted"),
    [
        (["/no/such/program"], ".", "/no/such/program can't be started: No such file"),
        (["/etc/passwd"], ".", "Permission denied"),
        (["/bin/sh"], "missing", "missing"),
    ],
)
def test_what_cannot_be_started_says_so(
    supervisor: Supervisor, tmp_path: Path, argv: list[str], directory: str, wanted: str
) -> None:
    with pytest.raises(QemuError, match=wanted):
        supervisor.spawn(argv, env=PATH, cwd=tmp_path / directory, log=tmp_path / "log")
    assert shell(supervisor, tmp_path, "exit 5").wait(10) == 5  # and it goes on


def test_the_log_that_cannot_be_written_is_named(supervisor: Supervisor, tmp_path: Path) -> None:
    with pytest.raises(QemuError, match=r"No such file.*absent/log"):
        supervisor.spawn(["/bin/true"], env=PATH, cwd=tmp_path, log=tmp_path / "absent" / "log")


# Signals 32 and 33 are glibc's own. Whatever its posix_spawn starts (GNU make's recipes) ignores
# them; no program can change that.
GLIBC = 1 << 31 | 1 << 32


def test_what_a_start_script_finds(supervisor: Supervisor, tmp_path: Path) -> None:
    program = (
        "import os, json, resource, sys; print(json.dumps(dict("
        "argv=os.fsencode(sys.argv[1]).hex(), cwd=os.getcwd(), env=dict(os.environ),"
        "stdin=sys.stdin.read(), fds=sorted(os.listdir('/proc/self/fd')),"
        "session=os.getsid(0) == os.getpid(), core=resource.getrlimit(resource.RLIMIT_CORE)[0],"
        "ignored=[l for l in open('/proc/self/status') if l.startswith(('SigIgn', 'SigBlk'))])),"
        "flush=True);"
        "print('and stderr', file=sys.stderr)"
    )
    # Python itself ignores SIGPIPE (13) and SIGXFSZ (25), so it can't tell about these.
    process = supervisor.spawn(
        [sys.executable, "-I", "-S", "-c", program, os.fsdecode(b"\xff ,")],
        env={"ONLY": "this"},
        cwd=tmp_path,
        log=tmp_path / "log",
    )
    assert process.wait(10) == 0
    first, second = (tmp_path / "log").read_text().splitlines()
    found = json.loads(first)
    assert second == "and stderr"
    assert found["argv"] == b"\xff ,".hex()
    assert found["cwd"] == str(tmp_path)
    assert found["stdin"] == ""
    assert found["session"] is True
    assert found["core"] == 0
    assert set(found["env"]) - {"LC_CTYPE"} == {"ONLY", "NIXVM_VM"}
    assert found["fds"] == ["0", "1", "2", "3"]  # 3 is the listing itself
    masks = {line.split(":")[0]: int(line.split()[1], 16) for line in found["ignored"]}
    assert masks["SigBlk"] == 0
    assert masks["SigIgn"] & ~(1 << 12 | 1 << 24 | GLIBC) == 0


def test_signals_that_python_ignores_are_not_ignored_in_a_vm(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    process = shell(supervisor, tmp_path, "grep SigIgn /proc/self/status")
    assert process.wait(10) == 0
    assert int((tmp_path / "log").read_text().split()[1], 16) & ~GLIBC == 0


def test_many_threads_at_once(supervisor: Supervisor, tmp_path: Path) -> None:
    def one(number: int) -> int:
        other = shell(supervisor, tmp_path, "sleep 300")
        status = shell(supervisor, tmp_path, f"exit {number}").wait(20)
        other.kill()
        assert other.returncode == -signal.SIGKILL
        return status

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(32))) == list(range(32))


def test_the_thread_that_started_it_may_end(tmp_path: Path) -> None:
    # PR_SET_PDEATHSIG fires when the parent *thread* ends.
    made: list[tuple[Supervisor, Process]] = []

    def start() -> None:
        supervisor = Supervisor()
        made.append((supervisor, shell(supervisor, tmp_path, "sleep 300")))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    supervisor, process = made[0]
    assert shell(supervisor, tmp_path, "exit 0").wait(10) == 0
    assert running(process.pid)
    assert running(supervisor.pid)
    supervisor.close()
    assert wait_gone(process.pid)


# --- killing ---


def test_kill_takes_all_helpers_and_nobody_else(
    supervisor: Supervisor, tmp_path: Path, pipe: Pipe
) -> None:
    process, pids = start_helpers(supervisor, tmp_path, pipe)
    other, other_pids = start_helpers(supervisor, tmp_path, pipe)
    process.kill()
    assert [running(pid) for pid in pids] == [False] * 3
    assert [running(pid) for pid in other_pids] == [True] * 3
    assert process.returncode == -signal.SIGKILL
    process.kill()  # once more does no harm
    other.kill()
    assert [running(pid) for pid in other_pids] == [False] * 3


def test_helpers_of_a_vm_that_ended_by_itself_go_too(
    supervisor: Supervisor, tmp_path: Path, pipe: Pipe
) -> None:
    process, pids = start_helpers(supervisor, tmp_path, pipe, last="exit 6")
    assert process.wait(10) == 6
    assert [wait_gone(pid) for pid in pids] == [True] * 3


def test_a_helper_without_our_marker_goes_with_the_last_vm(
    supervisor: Supervisor, tmp_path: Path, pipe: Pipe
) -> None:
    line = f"(setsid env -i /bin/sh -c 'echo $$ > {pipe.path}; exec sleep 300' &); exec sleep 301"
    process = shell(supervisor, tmp_path, line)
    stray = int(pipe.read())
    process.kill()
    assert wait_gone(stray)


def test_children_are_found_without_the_kernels_help_too(
    supervisor: Supervisor, tmp_path: Path, pipe: Pipe
) -> None:
    process, pids = start_helpers(supervisor, tmp_path, pipe)
    _, child, daemon = pids
    assert _supervise.children(process.pid) == _supervise._children_by_scan(process.pid) == [child]
    assert sorted(_supervise._children_by_scan(supervisor.pid)) == sorted([process.pid, daemon])
    assert _supervise.children(child) == []
    process.kill()
    assert _supervise.children(process.pid) == []


# --- the end ---


def test_close_removes_directories_read_only_ones_too(tmp_path: Path) -> None:
    supervisor = Supervisor([tmp_path / "given"])
    (tmp_path / "given").mkdir()
    made = supervisor.make_directory(tmp_path)
    assert made.stat().st_mode & 0o777 == 0o700
    (made / "locked" / "deep").mkdir(parents=True)
    (made / "locked" / "deep" / "file").write_text("")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (made / "link").symlink_to(outside)
    (made / "locked" / "deep" / "file").chmod(0o400)
    (made / "locked" / "deep").chmod(0o500)
    (made / "locked").chmod(0o000)
    early = supervisor.make_directory(tmp_path)
    supervisor.remove_directory(early)
    assert not early.exists()
    supervisor.close()
    supervisor.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside"]
    assert (outside / "kept").exists()
    with pytest.raises(QemuError, match="closed"):
        supervisor.spawn(["/bin/true"], env=PATH, cwd=tmp_path, log=tmp_path / "log")


CLIENT = """
import json, os, signal, sys, threading, time
from pathlib import Path
from pytest_nixvm.qemu.supervisor import Supervisor
place, script, fifo = (Path(argument) for argument in sys.argv[1:4])
supervisor = Supervisor()
scratch = supervisor.make_directory(place)
(scratch / "disk").write_text("x")
process = supervisor.spawn(
    [str(script)], env={"PATH": os.environ["PATH"]}, cwd=scratch, log=scratch / "log"
)
def ready():
    with open(sys.argv[4], "w") as file:
        file.write(json.dumps({"supervisor": supervisor.pid, "scratch": str(scratch)}) + "\\n")
"""


def go_on(client: subprocess.Popen[bytes]) -> None:
    assert client.stdin is not None
    client.stdin.write(b"\n")
    client.stdin.flush()


ENDINGS: dict[str, tuple[str, Callable[[subprocess.Popen[bytes]], object]]] = {
    "SIGKILL": ("ready(); signal.pause()", lambda c: c.send_signal(signal.SIGKILL)),
    "SIGTERM": ("ready(); signal.pause()", lambda c: c.send_signal(signal.SIGTERM)),
    "SIGHUP": ("ready(); signal.pause()", lambda c: c.send_signal(signal.SIGHUP)),
    "Ctrl-C": ("ready(); signal.pause()", lambda c: os.killpg(c.pid, signal.SIGINT)),
    "exit": ("ready(); sys.stdin.readline(); sys.exit(3)", go_on),
    "os._exit": ("ready(); sys.stdin.readline(); os._exit(1)", go_on),
    "exception": ("ready(); sys.stdin.readline(); raise ValueError", go_on),
    "thread holds the lock": (
        "supervisor._lock.acquire(); ready(); signal.pause()",
        lambda c: c.send_signal(signal.SIGKILL),
    ),
    # A fork without exec inherits the socket: there is no EOF while it lives.
    "forked child lives on": (
        "child = os.fork()\nif child == 0: time.sleep(300); os._exit(0)\nready(); signal.pause()",
        lambda c: c.send_signal(signal.SIGKILL),
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_whatever_ends_the_client_nothing_is_left(tmp_path: Path, pipe: Pipe, ending: str) -> None:
    body, end = ENDINGS[ending]
    answer = Pipe(tmp_path / "answer")
    script = helpers_script(tmp_path, pipe.path)
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT + body, tmp_path, script, pipe.path, answer.path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        pids = [int(pid) for pid in pipe.read().split()]
        told = json.loads(answer.read())
        began = time.monotonic()
        end(client)
        client.wait(10)
        assert client.stdin is not None
        client.stdin.close()
        assert [wait_gone(pid) for pid in [*pids, told["supervisor"]]] == [True] * 4
        assert time.monotonic() - began < 10
        assert not Path(told["scratch"]).exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(client.pid, signal.SIGKILL)
        client.wait(10)


def test_killed_in_the_middle_of_spawning(tmp_path: Path, pipe: Pipe) -> None:
    program = f"""
import os, threading
from pathlib import Path
from pytest_nixvm.qemu.supervisor import Supervisor
supervisor = Supervisor()
place = Path({str(tmp_path)!r})
def spawn():
    while True:
        supervisor.spawn(["/bin/sleep", "300"], env={{}}, cwd=place, log=place / "log")
with open({str(pipe.path)!r}, "w") as file:
    file.write(f"{{supervisor.pid}} {{supervisor._token}}\\n")
for _ in range(4):
    threading.Thread(target=spawn).start()
"""
    client = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    pid, token = pipe.read().split()
    try:
        with pytest.raises(subprocess.TimeoutExpired):  # it is to be busy, not to end
            client.wait(0.1)
    finally:
        client.kill()
        client.wait(10)
    assert wait_gone(int(pid))
    assert marked(f"NIXVM_VM={token}-") == []


def test_polite_signals_do_not_end_the_supervisor(supervisor: Supervisor, tmp_path: Path) -> None:
    process = shell(supervisor, tmp_path, "sleep 300")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(supervisor.pid, number)
    assert shell(supervisor, tmp_path, "exit 0").wait(10) == 0
    assert running(process.pid)


def test_the_supervisors_own_death(tmp_path: Path, pipe: Pipe) -> None:
    supervisor = Supervisor()
    scratch = supervisor.make_directory(tmp_path)
    process, pids = start_helpers(supervisor, tmp_path, pipe)
    ended = threading.Event()
    process.on_exit(lambda _: ended.set())
    os.kill(supervisor.pid, signal.SIGKILL)
    assert ended.wait(10)
    assert [wait_gone(pid) for pid in pids] == [True] * 3
    process.kill()
    assert process.wait(0) == -signal.SIGKILL
    with pytest.raises(QemuError, match="supervisor process was ended"):
        supervisor.spawn(["/bin/true"], env=PATH, cwd=tmp_path, log=tmp_path / "log")
    supervisor.close()
    assert not scratch.exists()


def test_a_stopped_supervisor_does_not_hang_the_client(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    os.kill(supervisor.pid, signal.SIGSTOP)
    try:
        with pytest.raises(QemuError, match=r"did not answer 'directories' within 0\.1 s"):
            supervisor._request({"op": "directories"}, timeout=0.1)
    finally:
        os.kill(supervisor.pid, signal.SIGCONT)
    assert shell(supervisor, tmp_path, "exit 0").wait(10) == 0


KEEPER = """
import os, sys
from pathlib import Path
from pytest_nixvm.qemu.supervisor import Supervisor
supervisor = Supervisor()
place = supervisor.make_directory(Path(sys.argv[1]))
def sleep(): return supervisor.spawn(
    ["/bin/sleep", "1000"], env=dict(os.environ), cwd=place, log=place / "log")
kept, other = sleep(), sleep()
kept.keep()
print(kept.pid, other.pid, supervisor.pid, place, flush=True)
if sys.argv[2] == "close": supervisor.close()
"""


def test_a_process_that_is_kept_outlives_us_and_takes_the_rest_along_at_its_end(tmp_path):
    argv = [sys.executable, "-c", KEEPER, str(tmp_path), "close"]
    kept, other, supervisor, place = subprocess.check_output(argv, text=True, timeout=30).split()

    assert wait_gone(int(other))
    assert Path(f"/proc/{kept}").exists()
    assert Path(place).exists()

    os.kill(int(kept), signal.SIGTERM)
    assert wait_gone(int(supervisor))
    assert not Path(place).exists()
