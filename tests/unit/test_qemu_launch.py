"""From a start script to a running QEMU: a real one, with guests of a few instructions."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from _qemu import (
    PANIC,
    POWER_OFF,
    RESET,
    needs_qemu,
    running,
    say,
    start_script,
    wait_gone,
)

from pytest_nixvm.errors import (
    MachineGoneError,
    QemuError,
    QmpError,
    SettingsError,
    WaitTimeoutError,
)
from pytest_nixvm.qemu.accelerator import Accelerator
from pytest_nixvm.qemu.launch import LaunchSpec, Qemu, launch, private_directory
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.spec import SOCKET_PATH_LIMIT, arguments, environment
from pytest_nixvm.qemu.supervisor import Supervisor
from pytest_nixvm.wait import poll

TCG = Accelerator("tcg", "these tests")

pytestmark = needs_qemu

Launch = Callable[..., Qemu]


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    supervisor = Supervisor()
    yield supervisor
    supervisor.close()


@pytest.fixture(scope="module")
def io() -> Iterator[IoThread]:
    io = IoThread()
    yield io
    io.close()


@pytest.fixture
def sockets() -> Iterator[Path]:
    # pytest's own directories are too deep for sockets.
    with tempfile.TemporaryDirectory(prefix="nixvm-") as directory:
        yield Path(directory)


@pytest.fixture
def make_spec(tmp_path: Path, sockets: Path) -> Callable[..., LaunchSpec]:
    def make(script: Path, name: str = "tiny", **more: object) -> LaunchSpec:
        values: dict[str, object] = {
            "sockets": sockets / name,
            "scratch": tmp_path / "scratch" / name,
            "console_log": tmp_path / "out" / name / "console.log",
            "qemu_log": tmp_path / "out" / name / "qemu.log",
            "accelerator": TCG,
        }
        return LaunchSpec(name=name, start_script=script, **(values | more))  # type: ignore[arg-type]

    return make


@pytest.fixture
def start(
    make_spec: Callable[..., LaunchSpec], supervisor: Supervisor, io: IoThread
) -> Iterator[Launch]:
    started: list[Qemu] = []

    def start(script: Path, name: str = "tiny", timeout: float = 30, **more: object) -> Qemu:
        spec = make_spec(script, name, **more)
        started.append(launch(spec, supervisor=supervisor, io=io, timeout=timeout))
        return started[-1]

    yield start
    for qemu in started:
        qemu.kill()


def option(argv: tuple[str, ...], name: str) -> list[str]:
    return [value for key, value in itertools.pairwise(argv) if key == name]


# --- up ---


def test_it_comes_up_as_asked(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path), memory=96, cores=2)
    assert qemu.alive
    assert qemu.monitor.execute("query-status")["status"] == "running"
    assert qemu.monitor.execute("query-memory-size-summary")["base-memory"] == 96 << 20
    assert len(qemu.monitor.execute("query-cpus-fast")) == 2
    assert qemu.monitor.execute("query-kvm")["enabled"] is False
    assert qemu.monitor.version >= (7, 0, 0)
    assert qemu.pid == qemu.process.pid
    assert option(qemu.argv, "-name") == ["tiny"]
    for path in (qemu.agent_socket, qemu.ports.first.main.socket, qemu.console_socket):
        assert path.is_socket()
    qemu.kill()
    assert not running(qemu.pid)
    assert not qemu.alive
    with pytest.raises(MachineGoneError, match="tiny"):
        qemu.monitor.execute("query-status")


def test_as_configured(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path))
    assert qemu.monitor.execute("query-memory-size-summary")["base-memory"] == 64 << 20
    assert len(qemu.monitor.execute("query-cpus-fast")) == 1


def test_the_ports_are_there(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path))
    text = qemu.monitor.hmp("info qtree")
    assert 'name = "org.qemu.guest_agent.0"' in text
    assert 'name = "org.pytest-nixvm.shell.0"' in text
    assert 'name = "org.pytest-nixvm.shell.0.err"' in text


def test_ports_are_plugged_and_unplugged(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path))
    pair = qemu.ports.plug()
    assert pair is not None
    assert 'name = "org.pytest-nixvm.shell.1.err"' in qemu.monitor.hmp("info qtree")
    assert pair.main.socket.is_socket()
    assert not qemu.ports.is_open(pair)  # no guest has opened it
    qemu.ports.unplug(pair)
    assert "shell.1" not in qemu.monitor.hmp("info qtree")
    assert not pair.main.socket.exists()
    assert [qemu.ports.plug().number for _ in range(7)] == [1, 2, 3, 4, 5, 6, 7]
    assert qemu.ports.plug() is None


@pytest.mark.parametrize(
    "options", ["-vga std -usb -device usb-tablet,bus=usb-bus.0", "-nographic"]
)
def test_the_console_is_logged_though_nobody_reads(
    start: Launch, tmp_path: Path, options: str
) -> None:
    qemu = start(start_script(tmp_path, code=say("hello there\n"), options=options))
    poll(
        lambda: "hello there\n" in qemu.console_log.read_text(),
        "the guest's words in the console's log",
        timeout=20,
        saw=lambda: qemu.console_log.read_text() + qemu.spec.qemu_log.read_text(),
    )
    assert "(qemu)" not in qemu.spec.qemu_log.read_text()


def test_the_scripts_environment(
    start: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What somebody may have set for `nix run` must not change a test.
    monkeypatch.setenv("QEMU_OPTS", "-no-such-option")
    monkeypatch.setenv("QEMU_NET_OPTS", "hostfwd=tcp::2222-:22")
    monkeypatch.setenv("QEMU_KERNEL_PARAMS", "single")
    monkeypatch.setenv("NIX_DISK_IMAGE", "/no/such/disk")
    monkeypatch.setenv("SHARED_DIR", "/no/such/dir")
    monkeypatch.setenv("KEPT", "yes")
    qemu = start(start_script(tmp_path, before='env -0 > "$TMPDIR/env"; pwd > "$TMPDIR/cwd"'))
    scratch = qemu.spec.scratch
    variables = (scratch / "env").read_text().split("\0")
    env = dict(variable.split("=", 1) for variable in variables if variable)
    assert "QEMU_OPTS" not in env
    assert env["KEPT"] == "yes"
    assert env["QEMU_NET_OPTS"] == "restrict=on"
    assert env["QEMU_KERNEL_PARAMS"] == "console=ttyS0,115200n8"
    assert env["NIX_DISK_IMAGE"] == str(scratch / "root.qcow2")
    assert (env["TMPDIR"], env["USE_TMPDIR"]) == (str(scratch), "1")
    assert Path(env["SHARED_DIR"]).is_dir()
    assert (scratch / "cwd").read_text().strip() == str(scratch)
    assert "user,id=user.0,restrict=on" in option(qemu.argv, "-netdev")
    assert (scratch / "root.qcow2").exists()


def test_two_at_once_and_one_again(start: Launch, tmp_path: Path) -> None:
    script = start_script(tmp_path)
    first, second = start(script, "first"), start(script, "second")
    first.kill()
    assert second.alive
    again = start(script, "first")  # in the same directories
    assert again.alive
    assert again.pid != first.pid


def test_a_script_that_does_not_exec(start: Launch, tmp_path: Path) -> None:
    script = start_script(tmp_path, run="", options="-vga std")
    script.write_text(script.read_text() + "\necho done\nsleep 300\n")
    qemu = start(script)
    assert qemu.pid != qemu.process.pid
    assert option(qemu.argv, "-name") == ["tiny"]
    qemu.kill()
    assert not running(qemu.pid)
    assert not running(qemu.process.pid)


# --- not up ---


def test_a_script_that_fails(start: Launch, tmp_path: Path) -> None:
    script = start_script(tmp_path, before="echo no disk for you >&2; exit 7")
    began = time.monotonic()
    with pytest.raises(QemuError, match="ended with exit status 7") as caught:
        start(script)
    assert time.monotonic() - began < 10
    assert "no disk for you" in str(caught.value)
    assert str(tmp_path / "out" / "tiny" / "qemu.log") in str(caught.value)
    assert "The disk is full" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-device no-such-device", "'no-such-device' is not a valid device model name"),
        # Found only after QEMU has sent its greeting.
        ("-kernel /no/such/kernel", "could not open kernel file '/no/such/kernel'"),
    ],
)
def test_qemu_refuses(start: Launch, tmp_path: Path, options: str, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(QemuError, match="exit status 1") as caught:
        start(start_script(tmp_path, options=options))
    assert words in str(caught.value)
    assert time.monotonic() - began < 10


def test_a_script_that_hangs(start: Launch, tmp_path: Path) -> None:
    script = start_script(tmp_path, before=f"echo waiting; echo $$ > {tmp_path}/pid; sleep 300")
    with pytest.raises(QemuError, match=r"did not come up within 0\.5 s") as caught:
        start(script, timeout=0.5)
    assert "waiting" in str(caught.value)
    assert wait_gone(int((tmp_path / "pid").read_text()))


def test_a_script_that_loses_its_qemu(start: Launch, tmp_path: Path) -> None:
    script = start_script(tmp_path, run="", options="-device no-such-device")
    script.write_text(script.read_text().replace("set -e", "") + "\nexit 0\n")
    with pytest.raises(QemuError, match="ended with exit status 0") as caught:
        start(script)
    assert "no-such-device" in str(caught.value)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    yield small
    subprocess.run(["umount", small], check=True)


def test_a_full_disk_is_named(start: Launch, small: Path, tmp_path: Path) -> None:
    script = start_script(tmp_path, before='head -c 4M /dev/zero > "$TMPDIR/big"')
    with pytest.raises(QemuError) as caught:
        start(script, scratch=small / "scratch")
    assert f"The disk is full: {small}/scratch has 0 of 1 MiB free." in str(caught.value)


def test_memory_that_is_a_file_on_a_full_disk(start: Launch, small: Path, tmp_path: Path) -> None:
    try:
        qemu = start(start_script(tmp_path), ram=small / "ram")
    except QemuError as error:
        told = str(error)
    else:  # the firmware has not touched all of it yet
        qemu.wait_exit(20)
        told = qemu.cause_of_death()
    assert "ended with signal SIGBUS" in told
    assert f"The disk is full: {small} has 0 of 1 MiB free." in told


# --- sockets ---


def test_a_socket_path_that_is_too_long(start: Launch, tmp_path: Path, sockets: Path) -> None:
    script = start_script(tmp_path, before=f"touch {tmp_path}/ran")
    room = SOCKET_PATH_LIMIT - len(str(sockets)) - len("//shell.0.err")
    with pytest.raises(SettingsError, match="108 bytes; the system's limit is 107") as caught:
        start(script, sockets=sockets / ("x" * (room + 1)))
    assert "TMPDIR" in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert list(sockets.iterdir()) == []
    assert start(script, sockets=sockets / ("x" * room)).alive  # the limit itself is none


def test_a_comma_in_a_path(start: Launch, tmp_path: Path, sockets: Path) -> None:
    script = start_script(tmp_path)
    with pytest.raises(SettingsError, match="has a comma"):
        start(script, scratch=tmp_path / "a,b")
    # Ours are escaped.
    assert start(script, sockets=sockets / "a,b", console_log=tmp_path / "c,d" / "log").alive


def test_the_private_directory(
    supervisor: Supervisor, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(sockets))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    made = private_directory()
    assert made.parent == sockets
    assert made.name.startswith("nixvm-")
    assert made.stat().st_mode & 0o777 == 0o700
    runtime = sockets / "run"
    runtime.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert private_directory(supervisor).parent == runtime
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(sockets / "absent"))
    assert private_directory().parent == sockets
    long = sockets / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert private_directory().parent == sockets
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(SettingsError, match="No room for Unix sockets") as caught:
        private_directory()
    assert f"{long} ({len(str(long))} bytes)" in str(caught.value)


# --- running ---


def test_forwarding(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path), network="isolated")
    with ThreadPoolExecutor(4) as pool:
        first, again, *others = ports = list(pool.map(qemu.forward, [22, 22, 80, 443]))
    assert first == again
    assert len({first, *others}) == 3
    for port in ports:
        socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(QemuError, match="Invalid host forwarding rule"):
        qemu.forward(-1)


def test_forwarding_without_isolation(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path), network="nat")
    assert option(qemu.argv, "-netdev") == ["user,id=user.0,"]  # as NixOS's scripts leave it
    assert qemu.forward(22) > 0


def test_forwarding_to_another_netdev(start: Launch, tmp_path: Path) -> None:
    network = (
        "-netdev hubport,id=hub,hubid=1 -netdev user,id=other "
        "-device virtio-net-pci,netdev=other -netdev user,id=second"
    )
    qemu = start(start_script(tmp_path, network=network))
    qemu.monitor.hmp("hostfwd_add second tcp:127.0.0.1:0-:22")
    port = qemu.forward(22)
    qemu.monitor.hmp(f"hostfwd_remove other tcp:127.0.0.1:{port}")
    assert f" {port} " not in qemu.monitor.hmp("info usernet")


def test_forwarding_without_a_user_network(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path, network="-nic none"))
    with pytest.raises(QemuError, match="tiny has no user-mode network"):
        qemu.forward(22)


def test_a_screenshot(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path))
    path = qemu.screenshot(tmp_path / "shots" / "screen, one.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_screenshot_of_nothing(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path, options="-vga none"))
    with pytest.raises(QmpError, match="tiny has no display device"):
        qemu.screenshot(tmp_path / "screen.png")


def test_the_guest_powers_itself_off(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path, code=say("bye\n") + POWER_OFF))
    assert qemu.wait_exit(20) == 0
    shutdown = qemu.monitor.wait_event("SHUTDOWN", timeout=10, since=0)
    assert shutdown.data["guest"] is True
    assert not qemu.alive
    assert qemu.cause_of_death() == "the guest shut down; QEMU ended with exit status 0"
    with pytest.raises(MachineGoneError, match=r"not running\. the guest shut down"):
        qemu.monitor.execute("query-status")
    qemu.kill()
    assert "the guest shut down" in qemu.cause_of_death()


def test_a_panic_stops_the_guest_and_not_qemu(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path, code=PANIC))
    assert qemu.monitor.wait_event("GUEST_PANICKED", timeout=20, since=0).data["action"] == "pause"
    assert qemu.monitor.execute("query-status")["status"] == "guest-panicked"
    assert qemu.alive


def test_a_reboot_is_no_end(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path, code=RESET, options="-vga std -no-reboot"))
    assert qemu.monitor.wait_event("RESET", timeout=20, since=0).data["guest"] is True
    mark = qemu.monitor.mark()
    qemu.reset()
    assert qemu.monitor.wait_event("RESET", timeout=20, since=mark)
    assert qemu.alive


def test_pause_and_resume(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path))
    qemu.pause()
    assert qemu.monitor.execute("query-status")["status"] == "paused"
    qemu.resume()
    assert qemu.monitor.execute("query-status")["status"] == "running"
    mark = qemu.monitor.mark()
    qemu.powerdown()
    qemu.monitor.wait_event("POWERDOWN", timeout=10, since=mark)
    with pytest.raises(WaitTimeoutError, match="tiny's QEMU to end"):
        qemu.wait_exit(0.1)  # this guest does not care


def test_a_qemu_that_is_killed_ends_the_call_under_way(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path))
    os.kill(qemu.pid, signal.SIGSTOP)
    with pytest.raises(QmpError, match=r"'query-status' within 0\.2 s"):
        qemu.monitor.execute("query-status", timeout=0.2)
    ended = threading.Event()
    qemu.process.on_exit(lambda _: ended.set())
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(qemu.monitor.execute, "query-block", timeout=60)
        began = time.monotonic()
        os.kill(qemu.pid, signal.SIGKILL)
        with pytest.raises(MachineGoneError, match="QEMU ended with signal SIGKILL"):
            call.result(10)
        assert time.monotonic() - began < 10
    assert ended.wait(5)


def test_a_qemu_that_hung_for_a_while(start: Launch, tmp_path: Path) -> None:
    qemu = start(start_script(tmp_path))
    os.kill(qemu.pid, signal.SIGSTOP)
    with pytest.raises(QmpError):
        qemu.monitor.execute("query-status", timeout=0.1)
    os.kill(qemu.pid, signal.SIGCONT)
    assert qemu.monitor.execute("query-status")["status"] == "running"


# --- what is added, by what the script has ---


def arguments_for(
    make_spec: Callable[..., LaunchSpec], text: str, guest: str, **more: object
) -> str:
    return " ".join(arguments(make_spec(Path("/run-x-vm"), **more), text, guest))


def test_nothing_is_added_twice(make_spec: Callable[..., LaunchSpec]) -> None:
    usual = arguments_for(make_spec, "", "x86_64")
    assert "-device pvpanic " in usual
    assert "vmgenid" in usual
    assert "-cpu" not in usual
    assert (
        "pvpanic"
        not in arguments_for(make_spec, "-device pvpanic-pci", "x86_64").split("-action")[1]
    )
    assert "vmgenid" not in arguments_for(make_spec, "-device vmgenid,guid=1", "x86_64")
    assert "-cpu max" in arguments_for(make_spec, "qemu -cpu host -m 1", "x86_64")
    shared = "-object memory-backend-memfd,id=mem,size=1024M,share=on"
    assert "memory-backend=" not in arguments_for(make_spec, shared, "x86_64")
    assert "memory-backend=nixvm-ram" in arguments_for(make_spec, shared, "x86_64", memory=512)


def test_a_machine_that_is_to_be_frozen_has_one_memory(
    make_spec: Callable[..., LaunchSpec],
) -> None:
    shared = "qemu -m 1024 -object memory-backend-memfd,id=mem,size=1024M,share=on"
    added = arguments_for(make_spec, shared, "x86_64", memory=512, ram=Path("/t/ram"))
    assert added.count("id=nixvm-ram") == 1
    assert "memory-backend-file,id=nixvm-ram,size=512M,mem-path=/t/ram,share=on" in added
    for own in ("-mem-path /dev/hugepages", "-numa node,memdev=mem"):
        text = f"qemu -m 1024 {own} -smp 2"
        assert "nixvm-ram" not in arguments_for(make_spec, text, "x86_64", ram=Path("/t/ram"))


def test_another_architecture(make_spec: Callable[..., LaunchSpec]) -> None:
    added = arguments_for(make_spec, "", "aarch64")
    assert "pvpanic-pci" in added
    assert "vmgenid" not in added
    env = environment(make_spec(Path("/run-x-vm")), "", "aarch64")
    assert env["QEMU_KERNEL_PARAMS"] == "console=ttyAMA0,115200n8"


def test_a_script_with_a_serial_port_of_its_own(make_spec: Callable[..., LaunchSpec]) -> None:
    env = environment(make_spec(Path("/run-x-vm")), "qemu \\\n -serial file:x \\\n", "x86_64")
    assert env["QEMU_KERNEL_PARAMS"] == "console=ttyS1,115200n8"


def test_a_machine_without_a_root_disk(make_spec: Callable[..., LaunchSpec]) -> None:
    line = 'NIX_DISK_IMAGE=$(readlink -f "${NIX_DISK_IMAGE:-}") || test -z "$NIX_DISK_IMAGE"'
    assert "NIX_DISK_IMAGE" not in environment(make_spec(Path("/run-x-vm")), line, "x86_64")
