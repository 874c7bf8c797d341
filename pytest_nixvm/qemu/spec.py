"""What a VM is started with: its sockets, its arguments, its environment.

Everything here is decided before anything runs.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pytest_nixvm.errors import SettingsError
from pytest_nixvm.qemu.accelerator import Accelerator
from pytest_nixvm.qemu.ports import BUS, Pair
from pytest_nixvm.qemu.replay import ram_arguments
from pytest_nixvm.qemu.supervisor import Supervisor

AGENT_PORT = "org.qemu.guest_agent.0"

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

_RESTRICTED = {"isolated": "restrict=on", "nat": ""}

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
    network_options: str = ""  # for QEMU's user network: the addresses that the guest expects
    ram: Path | None = None  # a file that is the memory: the machine is to be frozen
    arguments: tuple[str, ...] = ()  # more arguments for QEMU, after ours
    environment: tuple[tuple[str, str], ...] = ()  # more variables for the script, over ours

    @property
    def monitor_socket(self) -> Path:
        """Where QEMU finds us for QMP."""
        return self.sockets / "qmp"

    @property
    def agent_socket(self) -> Path:
        """The host's end of the guest agent's port."""
        return self.sockets / "agent"

    @property
    def shell_ports(self) -> Pair:
        """The ports that are free for a shell in the guest."""
        return Pair.make(self.sockets, 0)

    @property
    def console_socket(self) -> Path:
        """The host's end of the serial console."""
        return self.sockets / "console"

    @property
    def places(self) -> tuple[Path, ...]:
        """The directories that are written to."""
        memory = () if self.ram is None else (self.ram.parent,)
        logs = (self.qemu_log.parent, self.console_log.parent)
        return (self.scratch, self.sockets, *memory, *logs)

    def check(self) -> None:
        """Raise `SettingsError` for paths that QEMU could not use."""
        for path in (
            self.monitor_socket,
            self.agent_socket,
            self.console_socket,
            *(port.socket for port in self.shell_ports.both),
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
        if spec.ram is None and re.search(r"memory-backend-\w+,[^\s]*share=(on|true)", script):
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
        # A panic stops the VM and is reported; powering off ends QEMU, a reboot does not.
        "-action", "panic=pause,reboot=reset,shutdown=poweroff",
    ]  # fmt: skip
    for port in spec.shell_ports.both:
        result += [
            "-chardev", f"socket,id={port.chardev},path={_escape(port.socket)},server=on,wait=off",
            "-device", f"virtserialport,bus={BUS},id={port.id},chardev={port.chardev},"
            f"name={port.name}",
        ]  # fmt: skip
    if not re.search(r"-device[\s=]+[\"']?pvpanic", script):
        result += ["-device", "pvpanic" if x86 else "pvpanic-pci"]
    if x86 and "vmgenid" not in script:
        # Tells a clone's kernel to reseed its random numbers.
        result += ["-device", "vmgenid,guid=auto"]
    memory = spec.memory or configured_memory(script)
    # QEMU refuses to start with both. Such a machine is frozen with its memory in the state.
    own = re.search(r"-mem-path[\s=]|-numa[\s=]+[^\s]*memdev=", script)
    if spec.ram is not None and memory is not None and own is None:
        result += ram_arguments(memory, spec.ram)
    return (*result, *spec.arguments)


def configured_memory(script: str) -> int | None:
    """Return the memory that a start script configures, in MiB; None if it can't be told."""
    found = re.findall(r"(?<=\s)-m[\s=]+(\d+)(?=\s)", script)
    return int(found[-1]) if found else None


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
        "QEMU_NET_OPTS": ",".join(
            each for each in (_RESTRICTED[spec.network], spec.network_options) if each
        ),
    }
    # A machine without a root disk (`diskImage = null`) would have one made for it in vain.
    if "${NIX_DISK_IMAGE:-}" not in script:
        result["NIX_DISK_IMAGE"] = str(spec.scratch / "root.qcow2")
    return result | dict(spec.environment)


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")
