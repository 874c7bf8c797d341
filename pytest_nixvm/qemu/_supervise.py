"""The supervisor: a small process that outlives pytest by moments and leaves nothing behind.

It is run as `python -I -S _supervise.py CLIENT_PID` with its end of a socket pair as stdin,
so it may use nothing but the standard library, and imports little of that: it has to be up
within some 30 ms. `supervisor.py` is the client.

Why a process of its own: pytest runs no teardown on SIGTERM, SIGHUP, SIGKILL or pytest-timeout's
`thread` method, and PR_SET_PDEATHSIG alone both fires too early (when the *thread* that started
QEMU ends) and misses QEMU's helpers (swtpm and virtiofsd make daemons of themselves). So:

* This process is single-threaded, lives in its own session (Ctrl-C in the terminal does not reach
  it) and takes no notice of polite signals. It ends when its client does: the socket reports EOF,
  or, should a forked child of the client hold the socket open, the client's pidfd becomes ready.
* It is a "child subreaper" (prctl(2)): whatever daemonises below it becomes its child, never
  init's. Its descendants are therefore exactly what it has to kill.
* Each VM has the environment marker `NIXVM_VM=TOKEN-N`, which tells whose helper an orphan is.
* If this process is itself killed, PR_SET_PDEATHSIG takes the VMs along, and the client sweeps.

The protocol is one JSON object a line. Requests carry an `id` and are answered by
`{"id": …, "ok": true, …}` or `{"id": …, "error": "…"}`:

    {"op": "spawn", "vm": "TOKEN-N", "argv": […], "env": {…}, "cwd": "…", "log": "…"}  -> pid
    {"op": "kill", "vm": "TOKEN-N"}         answered when the VM and all its helpers are dead
    {"op": "keep", "vm": "TOKEN-N"}         the VM may outlive the client, see `Server.outlive`
    {"op": "directories", "add": […], "remove": […]}        what to remove at the end

Events have no id: `{"event": "exit", "vm": …, "returncode": …}`, and `{"event": "fatal",
"text": …}` before a crash. Strings that are no UTF-8 use Python's surrogate escapes.
"""

# pathlib would be a third of the start-up time; execve is what this is for.
# ruff: noqa: PTH101, PTH106, PTH108, PTH110, PTH123, PTH208, S606

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import stat
import sys
import time
import traceback
from typing import Any

MARKER = "NIXVM_VM"

# A helper of a VM that ended by itself gets this long to notice and finish (swtpm writes its
# state), before it is killed.
GRACE = 1.0
# How long a kill may take before its caller is told that it did not work (a process in
# uninterruptible sleep).
KILL_TIMEOUT = 5.0
# At the end: a caller counts on "within 3 s".
END_TIMEOUT = 2.0
TICK = 0.005

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


# --- processes, as /proc tells them -----------------------------------------------------------


def children(pid: int) -> list[int]:
    """Return the direct children of `pid`, [] if there is no such process."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += [int(child) for child in file.read().split()]
        except FileNotFoundError:
            if not _HAS_CHILDREN_FILES:
                return _children_by_scan(pid)
        except OSError:
            continue
    return found


def _children_by_scan(parent: int) -> list[int]:
    # For kernels without CONFIG_PROC_CHILDREN.
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with (
                contextlib.suppress(OSError, ValueError, IndexError),
                open(f"/proc/{entry}/stat", "rb") as file,
            ):
                # "pid (name) state ppid …"; the name may hold anything, even ") R 1".
                if int(file.read().rpartition(b")")[2].split()[1]) == parent:
                    found.append(int(entry))
    return found


_HAS_CHILDREN_FILES = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def descendants(pid: int) -> list[int]:
    """Return everything below `pid`, not itself."""
    found: list[int] = []
    todo = children(pid)
    while todo:
        found += todo
        todo = [grandchild for child in todo for grandchild in children(child)]
    return found


def marker(pid: int) -> str | None:
    """Return the value of the environment marker of `pid`, None if it has none or is not ours."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            environment = file.read()
    except OSError:
        return None
    wanted = MARKER.encode() + b"="
    for variable in environment.split(b"\0"):
        if variable.startswith(wanted):
            return variable[len(wanted) :].decode("ascii", "replace")
    return None


def kill(pid: int) -> None:
    """Send SIGKILL, if the process is (still) there."""
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def sweep(token: str) -> bool:
    """Kill every process whose marker begins with `token`; return whether there was any.

    For the client, should the supervisor have been killed: its orphans are then init's children.
    """
    found = False
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (marker(int(entry)) or "").startswith(f"{token}-"):
            found = True
            kill(int(entry))
    return found


# --- directories ------------------------------------------------------------------------------


def remove_tree(path: str) -> bool:
    """Remove a file or directory with all below it, also what is read-only.

    Symbolic links are removed, not followed. Return whether it is gone.
    """
    try:
        is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if not is_directory:
        with contextlib.suppress(OSError):
            os.unlink(path)
        return not os.path.lexists(path)
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return not os.path.lexists(path)


# --- one VM -----------------------------------------------------------------------------------


class Vm:
    """A start script, what it became, and its helpers."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid  # also its process group and session
        self.returncode: int | None = None
        self.ended = 0.0
        self.kill_started: float | None = None
        self.kill_requests: list[int] = []
        self.kept = False


def spawn(argv: list[str], env: dict[str, str], cwd: str, log: str) -> int:
    """Start `argv` in a session of its own and return its pid once it was executed."""
    command = [_bytes(argument) for argument in argv]
    environment = {_bytes(name): _bytes(value) for name, value in env.items()}
    supervisor = os.getpid()
    log_fd = os.open(
        _bytes(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY, 0o600
    )
    # The pipe closes when execve succeeds, else it carries the error.
    reading, writing = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                    signal.signal(number, signal.SIG_DFL)
                for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_SETMASK, [])
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != supervisor:  # it died before the line above took effect
                    os._exit(127)
                # A core file would hold the guest's memory, secrets and all.
                resource.setrlimit(
                    resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
                )
                os.chdir(_bytes(cwd))
                os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
                os.dup2(log_fd, 1)
                os.dup2(log_fd, 2)
                os.execve(command[0], command, environment)
            except OSError as error:
                os.write(writing, b"%d:%s" % (error.errno or 0, error.filename or b""))
            finally:
                os._exit(127)
    finally:
        os.close(log_fd)
        os.close(writing)
    with open(reading, "rb") as pipe:
        failure = pipe.read()
    if failure:
        os.waitpid(pid, 0)
        code, _, where = failure.partition(b":")
        raise OSError(int(code), os.strerror(int(code)), where.decode("utf-8", "surrogateescape"))
    return pid


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option})")


# --- the server -------------------------------------------------------------------------------


class Server:
    """The loop: requests, deaths, and the end."""

    def __init__(self, channel: socket.socket, client: int) -> None:
        self.channel = channel
        self.client = client
        self.input = b""
        self.output = b""
        self.vms: dict[str, Vm] = {}
        self.by_pid: dict[int, Vm] = {}
        self.owners: dict[int, str | None] = {}  # orphans among our children -> VM
        self.directories: set[str] = set()
        self.ended = False
        self.wake, wake_writer = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(wake_writer, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve until the client is gone, then clean up."""
        poll = select.poll()
        poll.register(self.wake, select.POLLIN)
        # Without pidfd (Linux < 5.3) the parent is asked for twice a second.
        client_pidfd = -1
        with contextlib.suppress(OSError, AttributeError):
            client_pidfd = os.pidfd_open(self.client)
            poll.register(client_pidfd, select.POLLIN)
        try:
            while not self.ended:
                poll.register(self.channel, select.POLLIN | (select.POLLOUT if self.output else 0))
                busy = any(vm.kill_started or vm.ended for vm in self.vms.values())
                ready = dict(poll.poll(TICK * 1000 if busy else 500))
                if client_pidfd in ready or os.getppid() != self.client:
                    return
                if self.wake in ready:
                    self.drain()
                self.reap()
                if self.channel.fileno() in ready:
                    self.receive()
                self.advance()
                self.flush()
        finally:
            self.end()

    def drain(self) -> None:
        """Empty the pipe that SIGCHLD fills."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.wake, 4096)) == 4096:
                pass

    def reap(self) -> None:
        """Take note of everything below us that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.owners.pop(pid, None)
            vm = self.by_pid.pop(pid, None)
            if vm is not None:
                vm.returncode = os.waitstatus_to_exitcode(status)
                vm.ended = time.monotonic()
                self.send({"event": "exit", "vm": vm.name, "returncode": vm.returncode})

    def orphans(self) -> dict[int, str | None]:
        """Return our children that are no start scripts: daemonised helpers, and whose they are."""
        found = {}
        for pid in children(os.getpid()):
            if pid in self.by_pid:
                continue
            if self.owners.get(pid) is None:
                owner = marker(pid)
                if owner is None:  # its environment can't be read, or it made a new one
                    with contextlib.suppress(OSError):
                        session = os.getsid(pid)
                        owner = next((v.name for v in self.vms.values() if v.pid == session), None)
                self.owners[pid] = owner
            found[pid] = self.owners[pid]
        return found

    def advance(self) -> None:
        """Move every VM that is dying one step on."""
        now = time.monotonic()
        orphans = self.orphans()
        for vm in list(self.vms.values()):
            if vm.kill_started is None and vm.returncode is None:
                continue
            helpers = descendants(vm.pid) if vm.returncode is None else []
            for pid, owner in orphans.items():
                if owner == vm.name:
                    helpers += [pid, *descendants(pid)]
            if vm.returncode is not None and not helpers:
                del self.vms[vm.name]
                for request in vm.kill_requests:
                    self.send({"id": request, "ok": True})
                continue
            if vm.kill_started is not None or now - vm.ended > GRACE:
                if vm.returncode is None:
                    kill(vm.pid)
                    with contextlib.suppress(OSError):
                        os.killpg(vm.pid, signal.SIGKILL)
                for pid in helpers:
                    kill(pid)
            if vm.kill_started is not None and now - vm.kill_started > KILL_TIMEOUT:
                left = [pid for pid in (vm.pid, *helpers) if os.path.exists(f"/proc/{pid}")]
                for request in vm.kill_requests:
                    self.send({"id": request, "error": f"still there after SIGKILL: {left}"})
                vm.kill_requests.clear()
        for pid, owner in orphans.items():
            # A latecomer of a VM that is no more, or one without a marker that left its session:
            # it can be anybody's, so it may stay as long as there is anybody.
            if (owner or "") not in self.vms and (owner is not None or not self.vms):
                for stray in (*descendants(pid), pid):
                    kill(stray)

    # --- requests ---

    def receive(self) -> None:
        """Read what the client sent, and serve every complete line of it."""
        try:
            data = self.channel.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return
        *lines, self.input = (self.input + data).split(b"\n")
        for line in lines:
            self.serve(json.loads(line))

    def serve(self, request: dict[str, Any]) -> None:
        """Do what one request asks for."""
        number = request["id"]
        try:
            if request["op"] == "spawn":
                pid = spawn(request["argv"], request["env"], request["cwd"], request["log"])
                vm = Vm(request["vm"], pid)
                self.vms[vm.name] = self.by_pid[pid] = vm
                self.send({"id": number, "ok": True, "pid": pid})
            elif request["op"] == "kill":
                known = self.vms.get(request["vm"])
                if known is None:
                    self.send({"id": number, "ok": True})
                else:
                    known.kill_started = time.monotonic()
                    known.kill_requests.append(number)
            elif request["op"] == "keep":
                self.vms[request["vm"]].kept = True
                self.send({"id": number, "ok": True})
            elif request["op"] == "directories":
                self.directories.update(request.get("add", ()))
                self.directories.difference_update(request.get("remove", ()))
                self.send({"id": number, "ok": True})
            else:
                self.send({"id": number, "error": f"unknown operation {request['op']!r}"})
        except KeyError as error:
            self.send({"id": number, "error": f"there is no {error}"})
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            self.send({"id": number, "error": f"{error.strerror or error}{where}"})

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message for the client."""
        self.output += json.dumps(message).encode() + b"\n"

    def flush(self) -> None:
        """Write as much of the queue as the socket takes: a stopped client must not stop us."""
        while self.output:
            try:
                self.output = self.output[self.channel.send(self.output) :]
            except BlockingIOError:
                return
            except OSError:
                self.ended = True
                return

    # --- the end ---

    def end(self) -> None:
        """Kill everything below us that is not kept, then remove the directories."""
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            spared = self.spared()
            left = [pid for pid in descendants(os.getpid()) if pid not in spared]
            for pid in left:
                kill(pid)
            self.reap()
            if not left or time.monotonic() > deadline:
                break
            select.select([self.wake], [], [], TICK)
            self.drain()
        self.flush()
        self.outlive()
        for directory in sorted(self.directories):
            for _ in range(3):
                if remove_tree(directory):
                    break

    def spared(self) -> set[int]:
        """Return the processes of the VMs that are kept."""
        kept = {vm.name: vm.pid for vm in self.vms.values() if vm.kept and vm.returncode is None}
        found = [pid for pid, owner in self.orphans().items() if owner in kept] if kept else []
        found += kept.values()
        return {each for pid in found for each in (pid, *descendants(pid))}

    def outlive(self) -> None:
        """Stay for as long as a VM that is kept runs: who ends it ends its helpers and us."""
        with contextlib.suppress(OSError):
            self.channel.close()
        self.vms = {vm.name: vm for vm in self.vms.values() if vm.kept}
        while self.vms:
            select.select(
                [self.wake], [], [], TICK if any(v.ended for v in self.vms.values()) else 60
            )
            self.drain()
            self.reap()
            self.advance()
            self.output = b""


def main() -> None:
    """Take over the socket on stdin and serve."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # A service manager that stops us sends SIGTERM to everything at once. Whoever asked for
        # the end ended the client too, and that is what we act upon.
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=os.dup(0))
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    channel.setblocking(False)
    try:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        Server(channel, int(sys.argv[1])).run()
    except BaseException:
        message = {"event": "fatal", "text": traceback.format_exc()}
        with contextlib.suppress(OSError):
            channel.setblocking(True)
            channel.sendall(json.dumps(message).encode() + b"\n")
        raise


if __name__ == "__main__":
    main()
