"""Run one program for a bounded time, and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_nixvm.wait import Deadline

# Started in its own session, so that Ctrl-C in a terminal reaches only us, nix would outlive a
# pytest that is killed. PR_SET_PDEATHSIG (1) has the kernel send a signal then. It is set between
# fork and exec by this little program: `preexec_fn` is not safe beside threads. Costs 15 ms.
# prctl(2); the parent may have died before the call, hence the look at getppid.
_GUARD = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,int(sys.argv[2]));"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);os.execv(sys.argv[3],sys.argv[3:])"
)

# What git and nix would take from a surrounding git command (a commit hook that runs pytest):
# the repository has to be the one that is asked for.
_GIT_VARIABLES = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
    "GIT_OBJECT_DIRECTORY",
)


@dataclass(frozen=True)
class Ended:
    """How a program ended: exit status (negative: a signal's number) and standard output."""

    returncode: int
    stdout: bytes


class ProgramTimeoutError(Exception):
    """The program did not end in time and was killed."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for git and nix: no colours, no questions, English messages."""
    env = {name: value for name, value in os.environ.items() if name not in _GIT_VARIABLES}
    env.update(TERM="dumb", NO_COLOR="1", LC_ALL="C.UTF-8", GIT_TERMINAL_PROMPT="0")
    env.update(extra or {})
    return env


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] = lambda _: None,
    stop: signal.Signals = signal.SIGKILL,
) -> Ended:
    """Run `argv` (its program as absolute path) and hand each line of stderr to `on_line`.

    Whatever ends this call (the program, `timeout` seconds, KeyboardInterrupt), the program and
    the processes it started have ended too; even SIGKILL for our own process stops it. `stop` is
    sent first: SIGTERM for a program that has to end others itself, and does so in time.

    Raises:
        ProgramTimeoutError: after `timeout` seconds.
        OSError: if the program can't be started.
    """
    command = list(argv)
    if sys.executable:
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            _GUARD,
            str(os.getpid()),
            str(int(stop)),
            *command,
        ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(env) if env is not None else environment(),
        cwd=cwd,
        start_new_session=True,
    )
    try:
        stdout = _read(process, Deadline(timeout), on_line)
        return Ended(process.wait(), stdout)
    finally:
        _end(process, stop)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _read(
    process: subprocess.Popen[bytes], deadline: Deadline, on_line: Callable[[str], None]
) -> bytes:
    """Read until the program has ended; a grandchild that keeps a pipe open does not hold us."""
    out = bytearray()
    rest = b""
    with selectors.DefaultSelector() as selector:
        for name, stream in (("out", process.stdout), ("err", process.stderr)):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, name)
        while selector.get_map():
            if deadline.expired:
                raise ProgramTimeoutError
            ready = selector.select(deadline.remaining(at_most=0.25))
            if not ready and process.poll() is not None:
                break
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.data == "out":
                    out += data
                else:
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        on_line(line.decode(errors="replace"))
        if rest:
            on_line(rest.decode(errors="replace"))
    while process.poll() is None:
        if deadline.expired:
            raise ProgramTimeoutError
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(deadline.remaining(at_most=1))
    return bytes(out)


def _end(process: subprocess.Popen[bytes], stop: signal.Signals, grace: float = 2.0) -> None:
    """Stop what still runs, with all it started."""
    if process.poll() is not None:
        return
    others = _descendants(process.pid)
    try:
        process.send_signal(stop)
        process.wait(grace)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Builders have process groups of their own; what is left of them is killed one by one.
        if process.poll() is None:
            # Stopped first, so that nothing is forked between the look and the kill.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGSTOP)
            others |= _descendants(process.pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for pid, started in others:
            if _started(pid) == started:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + grace
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)


def _descendants(root: int) -> set[tuple[int, str]]:
    """Return the processes below `root`, each with its start time: a pid alone may be reused."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[tuple[int, str]] = set()
    todo = [root]
    while todo:
        for pid in children.get(todo.pop(), ()):
            todo.append(pid)
            found.add((pid, _started(pid)))
    return found


def _started(pid: int) -> str:
    fields = _stat(pid)
    return fields[19] if fields else ""


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name (state, parent, …), see proc(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
