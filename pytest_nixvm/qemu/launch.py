"""A start script becomes a running QEMU under control.

The script is run as `nix run` would run it, with devices added as arguments: they are quoted by
its `"$@"`, where `$QEMU_OPTS` is split at spaces. Of two options of a kind QEMU takes the later
one, so ours win.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_nixvm.errors import MachineGoneError, QemuError, QmpError, SettingsError, tail
from pytest_nixvm.qemu.accelerator import Accelerator, architecture, find_qemu
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.qemu.supervisor import Process, Supervisor, describe_status
from pytest_nixvm.wait import Deadline, timed_out

AGENT_PORT = "org.qemu.guest_agent.0"
SHELL_PORT = "org.pytest-nixvm.shell"

# sockaddr_un.sun_path has 108 bytes, the last of them 0 (unix(7)).
SOCKET_PATH_LIMIT = 107
# What is put below `private_directory()` at most: a VM's directory and a socket's name, the
# longest being swtpm's.
_BELOW_PRIVATE = len("/xxxxxxxxxxxx/tpm/socket.ctrl")

# What the caller's shell may hold for `nix run` must not leak into a test.
_SCRIPT_VARIABLES = frozenset(
    {
        "QEMU_OPTS",
        "QEMU_NET_OPTS",
        "QEMU_KERNEL_PARAMS",
        "NIX_DISK_IMAGE",
        "SHARED_DIR",
        "TMPDIR",
        "USE_TMPDIR",
        "NIX_EFI_VARS",
        "NIX_SWTPM_DIR",
        "NOTIFY_SOCKET",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
    }
)

_FULL = re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE)


# --- sockets ----------------------------------------------------------------------------------


def check_socket_path(path: Path) -> None:
    """Raise `SettingsError` if `path` is too long for a Unix socket."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_LIMIT:
        raise SettingsError(
            f"The socket path {path} has {length} bytes; the system's limit is "
            f"{SOCKET_PATH_LIMIT}. Set XDG_RUNTIME_DIR or TMPDIR to a directory with a shorter "
            "path."
        )


def private_parent() -> Path:
    """Return the directory in which to make one for sockets.

    It is XDG_RUNTIME_DIR where that is usable and short enough, else the temporary directory
    (TMPDIR). Raises `SettingsError` if both are too long.
    """
    candidates = [Path(tempfile.gettempdir())]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_absolute() and os.access(runtime, os.W_OK | os.X_OK):
        candidates.insert(0, Path(runtime))
    room = SOCKET_PATH_LIMIT - len("/nixvm-xxxxxxxx") - _BELOW_PRIVATE
    for candidate in candidates:
        if len(os.fsencode(candidate)) <= room:
            return candidate
    listed = " and ".join(f"{path} ({len(os.fsencode(path))} bytes)" for path in candidates)
    raise SettingsError(
        f"No room for Unix sockets: {listed}. A socket's path is limited to {SOCKET_PATH_LIMIT} "
        f"bytes, which leaves {room} for the directory. Set XDG_RUNTIME_DIR or TMPDIR to a "
        "shorter one."
    )


def private_directory(supervisor: Supervisor | None = None) -> Path:
    """Make a private directory (0700) for the sockets of a session.

    With `supervisor` it is removed at the session's end, however that comes. Raises
    `SettingsError` as `private_parent`, and if it can't be made.
    """
    parent = private_parent()
    try:
        if supervisor is not None:
            return supervisor.make_directory(parent)
        return Path(tempfile.mkdtemp(prefix="nixvm-", dir=parent))
    except OSError as error:
        raise SettingsError(
            f"No directory for sockets can be made in {parent}: {error.strerror}"
        ) from None


# --- what is to be started --------------------------------------------------------------------


@dataclass(frozen=True)
class LaunchSpec:
    """What to start, and where it may write."""

    name: str
    start_script: Path
    accelerator: Accelerator
    sockets: Path  # private short directory (0700) for the Unix sockets of this VM
    scratch: Path  # directory on disk for the overlay, and the script's TMPDIR
    console_log: Path
    qemu_log: Path  # stdout and stderr of the script and QEMU
    memory: int | None = None  # MiB, None = as configured
    cores: int | None = None
    network: Literal["isolated", "nat"] = "isolated"
    arguments: tuple[str, ...] = ()  # more arguments for QEMU, after ours

    @property
    def monitor_socket(self) -> Path:
        """Where QEMU finds us for QMP."""
        return self.sockets / "qmp"

    @property
    def agent_socket(self) -> Path:
        """The host's end of the guest agent's port."""
        return self.sockets / "agent"

    @property
    def shell_socket(self) -> Path:
        """The host's end of the port that is free for a shell."""
        return self.sockets / "shell"

    @property
    def console_socket(self) -> Path:
        """The host's end of the serial console."""
        return self.sockets / "console"

    def check(self) -> None:
        """Raise `SettingsError` for paths that QEMU could not use."""
        for path in (
            self.monitor_socket,
            self.agent_socket,
            self.shell_socket,
            self.console_socket,
        ):
            check_socket_path(path)
        if "," in str(self.scratch):
            # The scripts put it unescaped into `-drive file=…,…`.
            raise SettingsError(
                f"{self.scratch} has a comma in its path, which ends a value on QEMU's command "
                "line. Set TMPDIR to a directory without one."
            )


def arguments(spec: LaunchSpec, script: str, guest: str) -> tuple[str, ...]:
    """Return what is added to the start script's arguments.

    `script` is the start script's text: what it has itself is not added twice. `guest` is the
    architecture.
    """
    x86 = guest in ("x86_64", "i386")
    result = ["-display", "none", "-monitor", "none"]
    # `-accel` is refused beside the script's `-machine accel=…`; a later -machine is merged.
    result += ["-machine", f"accel={spec.accelerator.name}"]
    if spec.accelerator.name == "tcg" and re.search(r"-cpu[\s=]+host\b", script):
        result += ["-cpu", "max"]  # "CPU model 'host' requires KVM"
    if spec.memory is not None:
        result += ["-m", str(spec.memory)]
        if re.search(r"memory-backend-\w+,[^\s]*share=(on|true)", script):
            # virtiofs: guest memory in a file of a fixed size, that has to be ours then.
            result += [
                "-object", f"memory-backend-memfd,id=nixvm-ram,size={spec.memory}M,share=on",
                "-machine", "memory-backend=nixvm-ram",
            ]  # fmt: skip
    if spec.cores is not None:
        result += ["-smp", str(spec.cores)]
    result += [
        "-chardev", f"socket,id=nixvm-qmp,path={_escape(spec.monitor_socket)}",
        "-mon", "chardev=nixvm-qmp,mode=control",
        "-chardev", f"socket,id=nixvm-console,path={_escape(spec.console_socket)},server=on,"
        f"wait=off,logfile={_escape(spec.console_log)},logappend=on",
        "-serial", "chardev:nixvm-console",
        "-device", "virtio-serial-pci,id=nixvm-ports",
        "-chardev", f"socket,id=nixvm-agent,path={_escape(spec.agent_socket)},server=on,wait=off",
        "-device", "virtserialport,bus=nixvm-ports.0,id=nixvm-agent-port,chardev=nixvm-agent,"
        f"name={AGENT_PORT}",
        "-chardev", f"socket,id=nixvm-shell,path={_escape(spec.shell_socket)},server=on,wait=off",
        "-device", "virtserialport,bus=nixvm-ports.0,id=nixvm-shell-port,chardev=nixvm-shell,"
        f"name={SHELL_PORT}",
        # A panic stops the VM and is reported; powering off ends QEMU, a reboot does not.
        "-action", "panic=pause,reboot=reset,shutdown=poweroff",
    ]  # fmt: skip
    if not re.search(r"-device[\s=]+[\"']?pvpanic", script):
        result += ["-device", "pvpanic" if x86 else "pvpanic-pci"]
    if x86 and "vmgenid" not in script:
        # Tells a clone's kernel to reseed its random numbers.
        result += ["-device", "vmgenid,guid=auto"]
    return (*result, *spec.arguments)


def environment(spec: LaunchSpec, script: str, guest: str) -> dict[str, str]:
    """Return the start script's environment: ours, and all places it writes to in `scratch`."""
    result = {name: value for name, value in os.environ.items() if name not in _SCRIPT_VARIABLES}
    # The serial port that ours becomes; the script may have some itself.
    number = len(re.findall(r"(?<=\s)-serial(?=\s)", script))
    terminal = "ttyAMA" if guest in ("aarch64", "arm") else "ttyS"
    result |= {
        "TMPDIR": str(spec.scratch),
        "USE_TMPDIR": "1",
        "SHARED_DIR": str(spec.scratch / "shared"),
        "NIX_EFI_VARS": str(spec.scratch / "efi-vars.fd"),
        # swtpm makes its control socket in there, so the path has to be short.
        "NIX_SWTPM_DIR": str(spec.sockets / "tpm"),
        # The last console= is /dev/console, which is the screen where graphics are on.
        "QEMU_KERNEL_PARAMS": f"console={terminal}{number},115200n8",
        "QEMU_NET_OPTS": "restrict=on" if spec.network == "isolated" else "",
    }
    # A machine without a root disk (`diskImage = null`) would have one made for it in vain.
    if "${NIX_DISK_IMAGE:-}" not in script:
        result["NIX_DISK_IMAGE"] = str(spec.scratch / "root.qcow2")
    return result


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")


# --- starting ---------------------------------------------------------------------------------


def launch(spec: LaunchSpec, *, supervisor: Supervisor, io: IoThread, timeout: float) -> Qemu:
    """Run the start script and return the QEMU it became, once that answers commands.

    Raises `SettingsError` for paths that can't work, `MissingProgramError` without a QEMU, and
    `QemuError` with what the script and QEMU said, as soon as they end or after `timeout` seconds.
    """
    spec.check()
    guest = architecture(find_qemu(spec.start_script))
    script = spec.start_script.read_text(errors="replace")
    return start(
        spec,
        (str(spec.start_script), *arguments(spec, script, guest)),
        environment(spec, script, guest),
        supervisor=supervisor,
        io=io,
        timeout=timeout,
    )


def start(
    spec: LaunchSpec,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    supervisor: Supervisor,
    io: IoThread,
    timeout: float,
) -> Qemu:
    """Run any command that becomes a QEMU with the sockets of `spec` and return it as `launch`."""
    spec.check()
    deadline = Deadline(timeout)
    began = time.monotonic()
    try:
        spec.scratch.mkdir(parents=True, exist_ok=True)
        (spec.scratch / "shared").mkdir(exist_ok=True)
        spec.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        for log in (spec.console_log, spec.qemu_log):
            log.parent.mkdir(parents=True, exist_ok=True)
        monitor = Monitor(io, spec.monitor_socket, name=spec.name)
    except OSError as error:
        raise QemuError(
            f"{spec.name} can't be started: {error}{_full_disk(spec, str(error))}"
        ) from None
    process: Process | None = None
    try:
        process = supervisor.spawn(argv, env=env, cwd=spec.scratch, log=spec.qemu_log)
        monitor.connect(process, deadline.remaining())
        return Qemu(spec, process, monitor, time.monotonic() - began)
    except BaseException as error:
        monitor.close()
        ended = process.returncode if process is not None else None
        if process is not None:
            process.kill()
        if isinstance(error, MachineGoneError) and ended is not None:
            raise _failed(spec, f"ended with {describe_status(ended)}") from None
        if isinstance(error, QmpError | MachineGoneError):
            raise _failed(spec, f"did not come up within {timeout:g} s") from error
        if isinstance(error, QemuError):
            raise QemuError(f"{spec.name}: {error}{_full_disk(spec, str(error))}") from None
        raise


def _failed(spec: LaunchSpec, what: str) -> QemuError:
    said = _read(spec.qemu_log)
    text = f"{spec.name}: QEMU's start script {what}.{_full_disk(spec, said)}"
    if said.strip():
        text += "\nIt said:\n" + _indent(tail(said, 25))
    else:
        text += " It said nothing."
    return QemuError(f"{text}\nStart script: {spec.start_script}\nIts output: {spec.qemu_log}")


def _full_disk(spec: LaunchSpec, said: str) -> str:
    """Return a sentence that names the full file system, if that is what `said` is about."""
    if not _FULL.search(said):
        return ""
    rooms = {}
    for path in (spec.scratch, spec.sockets, spec.qemu_log.parent, spec.console_log.parent):
        with contextlib.suppress(OSError):
            while not path.exists():
                path = path.parent
            usage = os.statvfs(path)
            rooms[path] = (usage.f_bavail * usage.f_frsize, usage.f_blocks * usage.f_frsize)
    if not rooms:
        return ""
    path = min(rooms, key=lambda path: rooms[path][0])
    free, size = (number / (1 << 20) for number in rooms[path])
    return (
        f"\nThe disk is full: {path} has {free:.0f} of {size:.0f} MiB free. Make room, or set "
        "TMPDIR to a directory on another disk."
    )


def _read(path: Path, last: int = 1 << 16) -> str:
    """Return the end of a file, "" if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - last))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


# --- running ----------------------------------------------------------------------------------

_SHUTDOWN_REASONS = {
    "guest-shutdown": "the guest shut down",
    "guest-reset": "the guest rebooted, and its command line forbids that",
    "guest-panic": "the guest's kernel panicked",
    "host-qmp-quit": "QMP's quit was called",
    "host-signal": "a signal ended it",
    "host-error": "an error on the host ended it",
    "subsystem-reset": "a subsystem was reset",
}


class Qemu:
    """One running QEMU. All methods may be called from several threads."""

    def __init__(
        self, spec: LaunchSpec, process: Process, monitor: Monitor, started_in: float
    ) -> None:
        self.spec = spec
        self.process = process
        self.monitor = monitor
        self.started_in = started_in  # seconds from the script's start to the first answer
        self.agent_socket = spec.agent_socket
        self.shell_socket = spec.shell_socket
        self.console_socket = spec.console_socket
        self.console_log = spec.console_log
        self.pid = monitor.pid or process.pid
        self.argv = _command_line(self.pid)  # as QEMU got it, () if it was already gone
        self._killed = False
        self._forwarding = threading.Lock()
        monitor.describe_end = self.cause_of_death

    def __repr__(self) -> str:
        return f"<Qemu {self.spec.name} pid={self.pid} {'alive' if self.alive else 'gone'}>"

    @property
    def alive(self) -> bool:
        """Whether QEMU runs (a paused or panicked guest's does)."""
        return self.process.returncode is None and self.monitor.connected

    # --- power ---

    def powerdown(self) -> None:
        """Press the power button (ACPI); the guest decides. See `wait_exit`."""
        self.monitor.execute("system_powerdown")

    def reset(self) -> None:
        """Press the reset button: the guest starts anew at once, disks as they are."""
        self.monitor.execute("system_reset")

    def pause(self) -> None:
        """Stop the guest's processors."""
        self.monitor.execute("stop")

    def resume(self) -> None:
        """Let the guest's processors go on."""
        self.monitor.execute("cont")

    def kill(self) -> None:
        """End it at once with its helpers; return when they are dead. May be called twice."""
        if self.process.returncode is None:
            self._killed = True
        try:
            self.process.kill()
        finally:
            self.monitor.close()

    def wait_exit(self, timeout: float) -> int:
        """Wait until QEMU has ended and return its exit status (negative for a signal).

        Raises `WaitTimeoutError` after `timeout` seconds.
        """
        try:
            return self.process.wait(timeout)
        except TimeoutError:
            raise timed_out(f"{self.spec.name}'s QEMU to end", timeout) from None

    def cause_of_death(self) -> str:
        """Say how QEMU ended: who ended it, its exit status or signal, its last words."""
        if self.alive:
            return "it is running"
        # The monitor's end is seen a moment before the process's.
        with contextlib.suppress(TimeoutError):
            self.process.wait(1.0)
        status = self.process.returncode
        if self._killed:
            return "it was killed by the tests"
        if status is None:
            return "QEMU closed its monitor, but its start script still runs"
        ended = f"QEMU ended with {describe_status(status)}"
        shutdowns = self.monitor.events("SHUTDOWN")
        if shutdowns:
            reason = str(shutdowns[-1].data.get("reason", ""))
            ended = f"{_SHUTDOWN_REASONS.get(reason, reason or 'it was shut down')}; {ended}"
        if self.monitor.events("GUEST_PANICKED"):
            ended = f"the guest's kernel had panicked; {ended}"
        said = _read(self.spec.qemu_log)
        if status != 0 and said.strip():
            ended += f"{_full_disk(self.spec, said)}\nIts last words:\n" + _indent(tail(said, 15))
        return ended

    # --- network ---

    def forward(self, guest_port: int) -> int:
        """Forward a free port of 127.0.0.1, chosen by QEMU, to a TCP port of the guest.

        Return the host's port. That it accepts connections proves nothing about the guest: QEMU
        accepts first. Raises `QemuError` if the VM has no user-mode network.
        """
        netdev = self._user_netdev()
        with self._forwarding:
            before = self._forwards(netdev)
            said = self.monitor.hmp(f"hostfwd_add {netdev} tcp:127.0.0.1:0-:{guest_port}").strip()
            if said:
                raise QemuError(
                    f"{self.spec.name}: QEMU can't forward a port to port {guest_port}: {said}"
                )
            new = self._forwards(netdev) - before
        ports = [host for host, guest in new if guest == guest_port]
        if not ports:
            raise QemuError(
                f"{self.spec.name}: QEMU forwards a port to port {guest_port}, but does not say "
                f"which:\n{self.monitor.hmp('info usernet')}"
            )
        return ports[0]

    def _user_netdev(self) -> str:
        for option, value in zip(self.argv, self.argv[1:], strict=False):
            if option in ("-netdev", "-nic", "-net", "--netdev", "--nic", "--net") and re.match(
                r"(type=)?user\b", value
            ):
                match = re.search(r"\bid=([^,]+)", value)
                if match:
                    return match[1]
        raise QemuError(
            f"{self.spec.name} has no user-mode network (`-netdev user,id=…`) on its QEMU command "
            "line, so no port can be forwarded into it. Does its configuration replace "
            "virtualisation.qemu.networkingOptions?"
        )

    def _forwards(self, netdev: str) -> set[tuple[int, int]]:
        """Return (host port, guest port) of the TCP forwards of `netdev`.

        `info usernet` prints a line for each back end, then a table:

            Hub -1 (user.0):
              Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
              TCP[HOST_FORWARD]  12       127.0.0.1 36519       10.0.2.15    22     0     0
        """
        found = set()
        ours = True
        for line in self.monitor.hmp("info usernet").splitlines():
            header = re.match(r"\S.*?\(?([^\s()]+)\)?:\s*$", line)
            if header:
                ours = header[1] == netdev
                continue
            match = re.match(r"\s*TCP\[HOST_FORWARD\]\s+-?\d+\s+\S+\s+(\d+)\s+\S+\s+(\d+)\b", line)
            if match and ours:
                found.add((int(match[1]), int(match[2])))
        return found

    # --- screen ---

    def screenshot(self, path: Path) -> Path:
        """Write the screen as PNG to `path` and return it.

        Raises `QmpError` if the VM has no display device, or QEMU can't write there.
        """
        path = path.absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.monitor.execute("screendump", {"filename": str(path), "format": "png"}, timeout=20)
        return path


def _command_line(pid: int) -> tuple[str, ...]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(os.fsdecode(argument) for argument in raw.split(b"\0")[:-1])
