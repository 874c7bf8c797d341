"""A machine that was frozen ready, and the clones that are started from it.

    template = freeze(qemu, directory, facts={})    # ends that QEMU
    qemu = power_on(template, spec, supervisor=supervisor, io=io, timeout=10)
    ...                                             # connect to its sockets
    load(qemu, template, timeout=10)                # as it was frozen, paused
    qemu.resume()

The guest's memory is a file that QEMU maps: shared while the template is made, so that freezing
has nothing to write, and private in the clones, which share its pages until they write to them
(`x-ignore-shared`, see migration/ram.c of QEMU). What is left of the state is less than a MiB. A
machine whose memory is no such file is frozen with its memory in the state: the second choice,
slower to load and with nothing shared.

Protocol: https://www.qemu.org/docs/master/devel/migration/main.html
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_nixvm.errors import MachineGoneError, QemuError, QmpError
from pytest_nixvm.qemu import blockers
from pytest_nixvm.qemu.blockers import Blocker
from pytest_nixvm.qemu.drives import Drive, drives
from pytest_nixvm.qemu.launch import start
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.qemu.replay import clone_argv, memory_of
from pytest_nixvm.qemu.running import Qemu
from pytest_nixvm.qemu.spec import LaunchSpec
from pytest_nixvm.qemu.supervisor import Supervisor
from pytest_nixvm.wait import Deadline

RAM, STATE, CONSOLE, SCRATCH = "ram", "state", "console.log", "scratch.tar"

FREEZE_TIMEOUT = 120.0
"""Seconds; milliseconds are usual, but with its memory in the state a large guest takes a while."""

_MOST_SCRATCH = 64 * 2**20
_MAGIC = b"QEVM"  # how a state begins, see migration/savevm.h
_READ_ONLY_RAM = (8, 2)  # the first QEMU that maps a file private without a right to write to it


class CannotFreezeError(QemuError):
    """The machine can't be frozen; it runs on. `blockers` says why, and what would lift it."""

    def __init__(self, name: str, found: tuple[Blocker, ...]) -> None:
        super().__init__(f"{name} can't be frozen: " + "; ".join(map(str, found)))
        self.blockers = found


@dataclass(frozen=True)
class Disk:
    """A writable drive of a template."""

    file: str  # its name in the template's directory, "disk-0"
    path: str  # as it stands on the template's command line
    format: str  # of the file: "qcow2", "raw"

    @property
    def overlay(self) -> str:
        """An empty overlay over it, in the same directory: a clone's disk is a copy of that."""
        return self.file.replace("disk", "overlay")


@dataclass(frozen=True)
class Template:
    """A frozen machine. `facts` is what the rooms above want to know again, as JSON has it."""

    directory: Path
    argv: tuple[str, ...]
    sockets: Path  # where those of its spec were, for they are in `argv`
    scratch: Path
    console_log: Path
    disks: tuple[Disk, ...]
    memory: int  # MiB
    has_ram: bool  # whether the memory is a file of its own, to be shared by the clones
    version: tuple[int, int, int]  # QEMU's
    facts: dict[str, Any] = field(default_factory=dict)
    # What was found out of clones that nobody had used yet; for this process.
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the directory."""
        data = asdict(self)
        del data["directory"], data["memo"]
        return data | {
            "sockets": str(self.sockets),
            "scratch": str(self.scratch),
            "console_log": str(self.console_log),
        }

    @classmethod
    def from_json(cls, directory: Path, data: Mapping[str, Any]) -> Template:
        """Make one of what `to_json` has returned. Raises `KeyError`, `TypeError`, `ValueError`."""
        major, minor, micro = data["version"]
        return cls(
            directory=directory,
            argv=tuple(data["argv"]),
            sockets=Path(data["sockets"]),
            scratch=Path(data["scratch"]),
            console_log=Path(data["console_log"]),
            disks=tuple(Disk(**disk) for disk in data["disks"]),
            memory=int(data["memory"]),
            has_ram=bool(data["has_ram"]),
            version=(major, minor, micro),
            facts=dict(data["facts"]),
        )


# --- freezing ----------------------------------------------------------------------------------


def freeze(
    qemu: Qemu,
    directory: Path,
    *,
    facts: dict[str, Any],
    origin: Template | None = None,
) -> Template:
    """Freeze a machine into `directory`, and end its QEMU.

    Its memory stays in the file `ram` of the directory if QEMU was started with that (see
    `replay.ram_arguments`); else it goes into the state. `origin` is the template whose clone it
    is, if it is one. Raises `CannotFreezeError`, and lets the machine run on; `QemuError` if it
    can't be written, when it has ended.
    """
    monitor, spec = qemu.monitor, qemu.spec
    has_ram = (directory / RAM).exists()
    reasons = monitor.execute("query-migrate").get("blocked-reasons", [])
    told = [blockers.explain(reason, qemu.argv) for reason in reasons]
    found = (*blockers.found(qemu.argv, spec.scratch, monitor.version), *told)
    found = tuple(dict.fromkeys(each for each in found if has_ram or not each.ram_only))
    if found:
        raise CannotFreezeError(spec.name, found)
    monitor.execute("stop")
    try:
        _set_up(monitor, has_ram)
        monitor.execute("migrate-set-parameters", {"max-bandwidth": 2**40})
        _migrate(monitor, "migrate", directory / STATE)
    except MachineGoneError:
        raise
    except QmpError as error:
        monitor.execute("cont")
        text = error.description or str(error)
        raise CannotFreezeError(spec.name, (blockers.explain(text, qemu.argv),)) from None
    version, argv = monitor.version, qemu.argv
    qemu.kill()
    try:
        disks = _keep_disks(qemu, directory, origin)
        if spec.console_log.exists():
            shutil.copyfile(spec.console_log, directory / CONSOLE)
        _keep_scratch(spec.scratch, directory / SCRATCH)
    except OSError as error:
        raise QemuError(f"{spec.name} can't be kept as a template: {error}") from None
    if has_ram and version[:2] >= _READ_ONLY_RAM:
        (directory / RAM).chmod(0o400)
    made_by = origin or Template(
        directory=directory,
        argv=argv,
        sockets=spec.sockets,
        scratch=spec.scratch,
        console_log=spec.console_log,
        disks=disks,
        memory=memory_of(argv),
        has_ram=has_ram,
        version=version,
    )
    return replace(made_by, directory=directory, disks=disks, has_ram=has_ram, facts=facts, memo={})


def share_memory(qemu: Qemu, template: Template) -> Template:
    """Make a template whose clones share their memory of one that has it in its state.

    `qemu` was powered on with the file `ram` of the template's directory, and loaded; it ends.
    """
    state = template.directory / f"{STATE}.new"
    _set_up(qemu.monitor, True)
    qemu.monitor.execute("migrate-set-parameters", {"max-bandwidth": 2**40})
    _migrate(qemu.monitor, "migrate", state)
    qemu.kill()
    state.replace(template.directory / STATE)
    if template.version[:2] >= _READ_ONLY_RAM:
        (template.directory / RAM).chmod(0o400)
    return replace(template, has_ram=True)


def _set_up(monitor: Monitor, has_ram: bool) -> None:
    names = {"events": True, "x-ignore-shared": has_ram}
    monitor.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": on} for name, on in names.items()]},
    )


def _migrate(monitor: Monitor, command: str, state: Path, timeout: float = FREEZE_TIMEOUT) -> None:
    """Write the state, or read it, and wait for the end of that. Raises `QmpError`."""
    if monitor.version >= (8, 2, 0):
        uri = f"file:{state}"
    else:
        way = ">" if command == "migrate" else "<"
        uri = f"exec:cat {way}{shlex.quote(str(state))}"
    deadline = Deadline(timeout)
    mark = monitor.mark()
    monitor.execute(command, {"uri": uri})
    while True:
        try:
            event = monitor.wait_event("MIGRATION", timeout=deadline.remaining(), since=mark)
        except QmpError:
            if not deadline.expired:
                raise
            monitor.execute("migrate_cancel")
            said = f"it was not done within {timeout:g} s"
            raise QmpError(f"{monitor.name}: {command} failed: {said}", description=said) from None
        mark = event.sequence
        if event.data["status"] == "completed":
            return
        if event.data["status"] in ("failed", "cancelled"):
            said = str(monitor.execute("query-migrate").get("error-desc", "QEMU does not say why"))
            raise QmpError(f"{monitor.name}: {command} failed: {said}", description=said)


def _keep_disks(qemu: Qemu, directory: Path, origin: Template | None) -> tuple[Disk, ...]:
    """Move the writable disks into the directory, and make an empty overlay over each."""
    kept: list[Disk] = []
    names = {disk.file: disk.path for disk in origin.disks} if origin else {}
    for number, drive in enumerate(_writable(qemu.argv)):
        file, now = f"disk-{number}", qemu.spec.scratch / drive.path  # QEMU's directory is scratch
        # A clone's disk has another path than the template's, and is always qcow2.
        path = names.get(file, drive.path)
        form = drive.format or _guess(now)
        shutil.move(now, directory / file)
        (directory / file).chmod(0o400)
        kept.append(Disk(file, path, form))
        _qemu_img(
            qemu.argv[0],
            "create", "-q", "-f", "qcow2", "-F", form, "-b", str(directory / file),
            str(directory / kept[-1].overlay),
        )  # fmt: skip
    return tuple(kept)


def _writable(argv: tuple[str, ...]) -> list[Drive]:
    return [drive for drive in drives(argv) if not drive.readonly]


def _guess(path: Path) -> str:
    with path.open("rb") as file:
        return "qcow2" if file.read(4) == b"QFI\xfb" else "raw"


def _qemu_img(qemu: str, *arguments: str) -> None:
    beside = Path(qemu).parent / "qemu-img"
    program = str(beside) if beside.exists() else shutil.which("qemu-img")
    if program is None:
        raise QemuError(f"There is no qemu-img beside {qemu}, nor on PATH.")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise QemuError(f"qemu-img {arguments[0]} failed: {done.stderr.strip()}")


def _keep_scratch(scratch: Path, archive: Path) -> None:
    """Keep what else the start script has made: QEMU's command line may name it."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted(scratch.rglob("*")):
            # Nothing that is as large can be needed by a clone.
            if path.is_dir() or (path.is_file() and path.lstat().st_size <= _MOST_SCRATCH):
                tar.add(path, str(path.relative_to(scratch)), recursive=False)


# --- clones ------------------------------------------------------------------------------------


def power_on(
    template: Template,
    spec: LaunchSpec,
    *,
    supervisor: Supervisor,
    io: IoThread,
    timeout: float,
    ram: Path | None = None,
) -> Qemu:
    """Start the QEMU of a clone, with disks of its own over the template's; see `load`.

    Its memory is the template's, private; with `ram` it is that file, shared: the memory of a
    template to be. Raises as `launch`.
    """
    try:
        spec.scratch.mkdir(parents=True, exist_ok=True)
        spec.console_log.parent.mkdir(parents=True, exist_ok=True)
        disks = {}
        for disk in template.disks:
            # Where the start script looks for it, should the clone be switched on once more.
            overlay = spec.scratch / _below(disk.path, template.scratch, disk.file)
            overlay.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(template.directory / disk.overlay, overlay)
            disks[disk.path] = (str(overlay), "qcow2")
        with tarfile.open(template.directory / SCRATCH) as tar:
            # Ours, and sealed; Python 3.11.3 and older have no filters.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(spec.scratch)  # noqa: S202
        if (template.directory / CONSOLE).exists():
            shutil.copyfile(template.directory / CONSOLE, spec.console_log)
        if template.has_ram:
            (template.directory / RAM).stat()  # QEMU would make one of zeros
    except OSError as error:
        raise QemuError(f"{spec.name} can't be cloned: {error}") from None
    argv = clone_argv(
        template.argv,
        moved={
            str(template.sockets): str(spec.sockets),
            str(template.scratch): str(spec.scratch),
            str(template.console_log): str(spec.console_log),
        },
        disks=disks,
        ram=ram or (template.directory / RAM if template.has_ram else None),
        qemu_version=template.version,
        share=ram is not None,
    )
    env = {"PATH": os.environ.get("PATH", ""), "TMPDIR": str(spec.scratch)}
    return start(spec, argv, env, supervisor=supervisor, io=io, timeout=timeout)


def _below(path: str, scratch: Path, otherwise: str) -> str:
    """Return the path of a disk as seen from the scratch directory."""
    for directory in (scratch, scratch.resolve()):
        with suppress(ValueError):
            return str(Path(path).relative_to(directory))
    return otherwise


def load(qemu: Qemu, template: Template, timeout: float) -> None:
    """Let the clone be as the template was frozen: paused. Its sockets should be connected by now.

    A port whose host's end is closed would make its reader in the guest look around in vain.
    Raises `QmpError`, and `MachineGoneError` if QEMU refuses the state, which ends it.
    """
    state = template.directory / STATE
    try:
        with state.open("rb") as file:
            begin = file.read(len(_MAGIC))
    except OSError as error:
        raise QemuError(f"{qemu.spec.name} can't be cloned: {error}") from None
    if begin != _MAGIC:  # QEMU 7.2 waits for the rest of a state that ends here
        raise QemuError(f"{qemu.spec.name} can't be cloned: {state} is no state of QEMU's.")
    _set_up(qemu.monitor, template.has_ram)
    _migrate(qemu.monitor, "migrate-incoming", state, timeout)
