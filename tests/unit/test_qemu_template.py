"""Freezing and cloning with a real QEMU, whose guest is a boot sector that knows what it was told.

The guest waits for bytes on its serial port. For each it says the one before as its disk has it,
the one before as its memory has it, and keeps the new one in both.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _guest import until
from _qemu import needs_qemu, say, start_script

from pytest_nixvm.errors import MachineGoneError, QemuError
from pytest_nixvm.qemu import template as template_room
from pytest_nixvm.qemu.accelerator import Accelerator
from pytest_nixvm.qemu.launch import LaunchSpec, Qemu, launch
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.supervisor import Supervisor
from pytest_nixvm.qemu.template import (
    RAM,
    STATE,
    CannotFreezeError,
    Disk,
    Template,
    freeze,
    load,
    power_on,
    share_memory,
)

MEMORY = 64  # MiB, in the start script
LOAD_TIMEOUT = 30.0

REMEMBERS = bytes.fromhex(
    "31c0 8ed8 8ec0"  # ds = es = 0
    "bafd03 ec a801 74fb"  # until the serial port has a byte
    "baf803 ec a2 007a"  # keep it
    "b80102 bb0080 b90200 ba8000 cd13"  # read the second sector
    "a0 0080 baf803 ee"  # what the disk has
    "a0 007e ee"  # what the memory has
    "a0 007a a2 007e"
    "b80103 bb007e b90200 ba8000 cd13"  # write the second sector
    "ebc2"  # the next one
)


def test_a_template_is_the_same_after_json(tmp_path: Path) -> None:
    template = Template(
        directory=tmp_path,
        argv=("qemu", "-m", "64"),
        sockets=Path("/run/s"),
        scratch=Path("/cache/s"),
        console_log=Path("/out/console.log"),
        disks=(Disk("disk-0", "/cache/s/root.qcow2", "qcow2"), Disk("disk-1", "x", "raw")),
        memory=64,
        has_ram=True,
        version=(7, 2, 0),
        facts={"uptime": 1.5, "boot": None},
    )
    told = json.loads(json.dumps(template.to_json()))

    assert Template.from_json(tmp_path, told) == template
    assert str(tmp_path) not in json.dumps(told)  # it is found by where it is
    assert template.disks[1].overlay == "overlay-1"
    broken: Any
    for broken in ({**told, "version": [7]}, {**told, "disks": [{}]}, {"argv": []}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Template.from_json(tmp_path, broken)


# --- with QEMU ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools() -> Iterator[SimpleNamespace]:
    supervisor, io = Supervisor(), IoThread()
    yield SimpleNamespace(supervisor=supervisor, io=io)
    supervisor.close()
    io.close()


class Lab:
    """Starts machines and clones, and ends them."""

    def __init__(self, directory: Path, sockets: Path, tools: SimpleNamespace) -> None:
        self.directory = directory
        self._sockets = sockets
        self._tools = tools
        self._number = 0
        self._started: list[Qemu] = []

    def spec(self, **more: object) -> LaunchSpec:
        self._number += 1
        name = f"vm-{self._number}"
        out = self.directory / "out" / name
        values: dict[str, object] = {
            "name": name,
            "start_script": self.directory / "run-tiny-vm",
            "accelerator": Accelerator("tcg", "these tests"),
            "sockets": self._sockets / name,
            "scratch": self.directory / "scratch" / name,
            "console_log": out / "console.log",
            "qemu_log": out / "qemu.log",
        }
        return LaunchSpec(**(values | more))  # type: ignore[arg-type]

    def boot(self, into: Path | None = None, *, before: str = "", options: str = "") -> Guest:
        """Boot a machine that is to be frozen into a directory, or has its memory for itself."""
        script = start_script(
            self.directory, code=say("ready") + REMEMBERS, before=before, options=options
        )
        ram = None
        if into is not None:
            into.mkdir()
            ram = into / RAM
        spec = self.spec(start_script=script, ram=ram)
        qemu = launch(
            spec, supervisor=self._tools.supervisor, io=self._tools.io, timeout=LOAD_TIMEOUT
        )
        self._started.append(qemu)
        guest = Guest(qemu)
        guest.until(b"ready")
        return guest

    def power_on(self, template: Template, ram: Path | None = None) -> Qemu:
        spec = self.spec()
        self._started.append(
            power_on(
                template,
                spec,
                supervisor=self._tools.supervisor,
                io=self._tools.io,
                timeout=LOAD_TIMEOUT,
                ram=ram,
            )
        )
        return self._started[-1]

    def clone(self, template: Template) -> Guest:
        qemu = self.power_on(template)
        guest = Guest(qemu)
        load(qemu, template, LOAD_TIMEOUT)
        assert qemu.monitor.execute("query-status")["status"] != "running"
        qemu.resume()
        return guest

    def end(self) -> None:
        for qemu in self._started:
            qemu.kill()


class Guest:
    """The serial port of a machine."""

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(qemu.console_socket))

    def until(self, end: bytes) -> None:
        """Read on; what it said before we were there is in its log."""
        said = self.qemu.console_log.read_bytes()
        while end not in said:
            said += self._socket.recv(100)

    def tell(self, letter: str) -> str:
        """Return the letter before this one, as the disk has it and as the memory has it."""
        self._socket.sendall(letter.encode())
        said = b""
        while len(said) < 2:
            said += self._socket.recv(2 - len(said))
        return said.decode()

    def freeze(self, directory: Path, origin: Template | None = None) -> Template:
        self._socket.close()
        return freeze(self.qemu, directory, facts={"uptime": 1.0}, origin=origin)

    @property
    def status(self) -> str:
        return str(self.qemu.monitor.execute("query-status")["status"])


@pytest.fixture
def lab(tmp_path: Path, tools: SimpleNamespace) -> Iterator[Lab]:
    # pytest's own directories are too deep for sockets.
    with tempfile.TemporaryDirectory(prefix="nixvm-") as sockets:
        lab = Lab(tmp_path, Path(sockets), tools)
        yield lab
        lab.end()


def hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }


@needs_qemu
def test_clones_go_on_where_the_machine_was_frozen_each_for_itself(
    lab: Lab, tmp_path: Path
) -> None:
    guest = lab.boot(tmp_path / "template")
    guest.tell("a")
    assert guest.tell("b") == "aa"

    template = guest.freeze(tmp_path / "template")

    assert not guest.qemu.alive
    assert template.has_ram
    assert template.memory == MEMORY
    assert (tmp_path / "template" / STATE).stat().st_size < 2**20
    assert (tmp_path / "template" / "disk-0").stat().st_mode & 0o222 == 0
    before = hashes(template.directory)
    one, two = lab.clone(template), lab.clone(template)
    assert one.tell("c") == "bb"
    assert two.tell("d") == "bb"
    assert one.tell("x") == "cc"
    assert two.tell("x") == "dd"
    assert hashes(template.directory) == before
    assert lab.clone(template).tell("x") == "bb"


@needs_qemu
def test_a_template_of_another_run_is_as_good(lab: Lab, tmp_path: Path) -> None:
    guest = lab.boot(tmp_path / "template")
    guest.tell("a")
    told = json.dumps(guest.freeze(tmp_path / "template").to_json())

    again = Template.from_json(tmp_path / "template", json.loads(told))

    assert lab.clone(again).tell("b") == "aa"


@needs_qemu
def test_a_machine_whose_memory_is_no_file_is_frozen_with_its_memory_in_the_state(
    lab: Lab, tmp_path: Path
) -> None:
    guest = lab.boot()
    guest.tell("a")
    (tmp_path / "template").mkdir()

    template = guest.freeze(tmp_path / "template")

    assert not template.has_ram
    one, two = lab.clone(template), lab.clone(template)
    assert (one.tell("b"), two.tell("c"), one.tell("d"), two.tell("e")) == ("aa", "aa", "bb", "cc")


@needs_qemu
def test_what_the_start_script_has_made_comes_back(lab: Lab, tmp_path: Path) -> None:
    guest = lab.boot(
        tmp_path / "template",
        before='mkdir -p "$TMPDIR/a dir/empty"; echo kept >"$TMPDIR/a dir/file"; '
        'echo named >"$TMPDIR/named"; chmod 640 "$TMPDIR/named"; truncate -s 65M "$TMPDIR/huge"',
        options='-vga std -fw_cfg name=opt/x,file="$TMPDIR"/named',
    )
    scratch = guest.qemu.spec.scratch

    clone = lab.clone(guest.freeze(tmp_path / "template"))

    assert clone.qemu.spec.scratch != scratch
    place = clone.qemu.spec.scratch
    assert (place / "a dir" / "file").read_text() == "kept\n"
    assert (place / "a dir" / "empty").is_dir()
    assert (place / "xchg").is_dir()
    assert not (place / "huge").exists()
    assert (place / "named").stat().st_mode & 0o777 == 0o640
    assert f"name=opt/x,file={place}/named" in clone.qemu.argv
    assert not any(str(scratch) in argument for argument in clone.qemu.argv)


@needs_qemu
def test_the_console_log_goes_on_in_the_clone(lab: Lab, tmp_path: Path) -> None:
    guest = lab.boot(tmp_path / "template")
    guest.tell("a")
    clone = lab.clone(guest.freeze(tmp_path / "template"))
    clone.tell("b")

    log = clone.qemu.console_log
    until(lambda: log.read_bytes().endswith(b"aa"), "the log to have what the clone said")
    assert b"ready" in log.read_bytes()


@needs_qemu
@pytest.mark.parametrize("place", ["outside", "nvme"])
def test_a_machine_that_can_not_be_frozen_runs_on(lab: Lab, tmp_path: Path, place: str) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(2**20))
    if place == "outside":
        options, words = f"-drive file={other},format=raw,if=virtio", str(other)
    else:
        options, words = "-device nvme,drive=n,serial=n -drive id=n,if=none,file=n.img", "nvme"
        options += ",format=raw"
    guest = lab.boot(
        tmp_path / "template", before='truncate -s 1M "$TMPDIR/n.img"', options=options
    )
    guest.tell("a")

    with pytest.raises(CannotFreezeError, match=words) as caught:
        freeze(guest.qemu, tmp_path / "template", facts={})

    assert caught.value.blockers
    assert str(caught.value).startswith(f"{guest.qemu.spec.name} can't be frozen: ")
    assert guest.status == "running"
    assert guest.tell("b") == "aa"
    assert not (tmp_path / "template" / "disk-0").exists()


@needs_qemu
def test_a_state_that_can_not_be_written_leaves_the_machine_running(
    lab: Lab, tmp_path: Path
) -> None:
    guest = lab.boot()
    guest.tell("a")

    with pytest.raises(CannotFreezeError):
        freeze(guest.qemu, tmp_path / "nowhere", facts={})

    assert guest.status == "running"
    assert guest.tell("b") == "aa"
    (tmp_path / "template").mkdir()
    assert lab.clone(guest.freeze(tmp_path / "template")).tell("c") == "bb"


@needs_qemu
def test_a_state_that_takes_too_long_leaves_the_machine_running(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = lab.boot()
    guest.tell("a")
    (tmp_path / "slow").mkdir()
    os.mkfifo(tmp_path / "slow" / STATE)
    nobody = os.open(tmp_path / "slow" / STATE, os.O_RDWR)  # who reads nothing
    with monkeypatch.context() as patch:
        patch.setattr(template_room, "_migrate", partial(template_room._migrate, timeout=0.5))
        with pytest.raises(CannotFreezeError, match=r"it was not done within 0\.5 s"):
            freeze(guest.qemu, tmp_path / "slow", facts={})
    assert guest.tell("b") == "aa"

    os.close(nobody)
    query = guest.qemu.monitor.execute
    until(lambda: query("query-migrate")["status"] == "cancelled", "the migration to end")
    (tmp_path / "template").mkdir()
    assert lab.clone(guest.freeze(tmp_path / "template")).tell("c") == "bb"


@needs_qemu
def test_a_clone_that_is_frozen_shares_its_memory_with_clones_of_its_own(
    lab: Lab, tmp_path: Path
) -> None:
    guest = lab.boot(tmp_path / "parent")
    guest.tell("a")
    parent = guest.freeze(tmp_path / "parent")
    prepared = lab.clone(parent)
    prepared.tell("b")
    child = tmp_path / "child"
    child.mkdir()
    before = hashes(parent.directory)

    heavy = prepared.freeze(child, origin=parent)
    assert not heavy.has_ram
    qemu = lab.power_on(heavy, ram=child / RAM)
    Guest(qemu)
    load(qemu, heavy, LOAD_TIMEOUT)
    template = share_memory(qemu, heavy)

    assert not qemu.alive
    assert template.has_ram
    assert (child / STATE).stat().st_size < 2**20
    assert (child / RAM).stat().st_size == MEMORY * 2**20
    assert sorted(path.name for path in child.iterdir() if ".new" in path.name) == []
    after = hashes(child)
    one, two = lab.clone(template), lab.clone(template)
    assert (one.tell("c"), two.tell("d"), one.tell("x"), two.tell("x")) == ("bb", "bb", "cc", "dd")
    for clone in (one, two):
        assert str(child / RAM) in Path(f"/proc/{clone.qemu.pid}/maps").read_text()
    assert hashes(child) == after
    assert hashes(parent.directory) == before
    assert lab.clone(parent).tell("x") == "aa"


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "half of it": lambda state: state[: len(state) // 2],
    "nothing": lambda _: b"",
    "a byte": lambda state: state[:1],
    "something else": lambda state: b"GARBAGE!" * (len(state) // 8),
}


@needs_qemu
@pytest.mark.parametrize("what", [*BROKEN, "no file"])
def test_a_state_that_is_broken_ends_the_clone_with_a_reason(
    lab: Lab, tmp_path: Path, what: str
) -> None:
    template = lab.boot(tmp_path / "template").freeze(tmp_path / "template")
    state = template.directory / STATE
    if what == "no file":
        state.unlink()
    else:
        state.write_bytes(BROKEN[what](state.read_bytes()))
    qemu = lab.power_on(template)
    began = time.monotonic()

    with pytest.raises(QemuError) as caught:
        load(qemu, template, LOAD_TIMEOUT)

    assert time.monotonic() - began < LOAD_TIMEOUT / 2
    if isinstance(caught.value, MachineGoneError):
        assert "last words" in str(caught.value)  # QEMU's own reason
    else:
        assert str(caught.value).startswith(f"{qemu.spec.name} can't be cloned: ")
        assert str(state) in str(caught.value)


@needs_qemu
@pytest.mark.parametrize("lost", ["overlay-0", "scratch.tar", RAM])
def test_a_template_that_lost_a_file_is_no_traceback(lab: Lab, tmp_path: Path, lost: str) -> None:
    template = lab.boot(tmp_path / "template").freeze(tmp_path / "template")
    (template.directory / lost).unlink()

    with pytest.raises(QemuError, match=f"can't be cloned: .*{lost}"):
        lab.power_on(template)
    assert not (template.directory / lost).exists()
