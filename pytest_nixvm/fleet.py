"""The session's VMs: what may be tested, what runs, and the end of all of it."""

from __future__ import annotations

import fnmatch
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pytest_nixvm import keep
from pytest_nixvm.errors import BootError, MachineGoneError, SettingsError
from pytest_nixvm.flake.build import MachineInfo, VmBuild
from pytest_nixvm.flake.flake import Flake
from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.flake.reference import FlakeReference
from pytest_nixvm.keep import Kept
from pytest_nixvm.output import Output, make_directory
from pytest_nixvm.progress import Progress, Silent
from pytest_nixvm.qemu.accelerator import Accelerator, choose, find_qemu
from pytest_nixvm.qemu.launch import LaunchSpec, private_directory
from pytest_nixvm.qemu.loop import IoThread
from pytest_nixvm.qemu.supervisor import Supervisor
from pytest_nixvm.settings import MachineRequest, Settings

if TYPE_CHECKING:
    from pytest_nixvm.guest.keys import KeyPair
    from pytest_nixvm.machine import Machine

# SSH and pexpect are imported when the first VM starts: a run that only collects is quicker.

LEAST_FREE = 256 * 2**20
"""Bytes that must be free where overlays are written; a boot alone writes some tens of MiB."""


@dataclass(frozen=True)
class _Shared:
    """What tests must have in common to share a VM."""

    name: str
    memory: int | None
    cores: int | None
    network: str
    scope: str


class Fleet:
    """The machines of one flake, their builds and their running VMs.

        with Fleet(settings) as fleet:
            vm = fleet.start("dev-vm")
            vm.succeed("true")

    Nothing is evaluated, built or started before it is asked for. `close`, or the death of this
    process however it comes, ends every VM and removes what it left on disk. `known` replaces the
    evaluation of the flake's machines (an xdist worker is told them).
    """

    def __init__(
        self,
        settings: Settings,
        *,
        progress: Progress | None = None,
        output: Path | None = None,
        known: Sequence[MachineInfo] | None = None,
    ) -> None:
        self.settings = settings
        self.progress: Progress = progress or Silent()
        self._output = output
        self.started: list[Machine] = []
        self.kept: list[Kept] = []
        # Called with each machine before it is powered on; `shared` is False for those of `start`.
        self.on_start: Callable[[Machine, bool], None] = lambda *_: None
        self._known = None if known is None else tuple(known)
        self._builds: dict[str, VmBuild] = {}
        self._shared: dict[_Shared, Machine] = {}
        self._left_running: list[Machine] = []
        self._unbootable: dict[_Shared, BootError] = {}
        self._lock = threading.RLock()
        self._closed = False

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @cached_property
    def out(self) -> Output:
        """Where this run leaves what it has to show. Raises `SettingsError`."""
        if self._output is not None:
            return Output(self._output)
        if self.settings.output is not None:
            return Output.below(self.settings.output)
        return Output.fresh(self.settings.cache / "runs")

    @property
    def output(self) -> Path:
        """The directory of `out`."""
        return self.out.path

    # --- what may be tested ----------------------------------------------------------------------

    @cached_property
    def nix(self) -> Nix:
        """The nix command. Raises `MissingProgramError`."""
        return Nix.find(options=self.settings.nix_option, offline=self.settings.offline)

    @cached_property
    def flake(self) -> Flake:
        """The flake under test. Raises `SettingsError` if there is none, or `FlakeError`."""
        if self.settings.flake is None:
            raise SettingsError(
                "No flake to test: give --nixvm-flake=REF (--nixvm-flake=. is the one in this "
                "directory), or nixvm_flake in the ini file."
            )
        reference = FlakeReference.parse(self.settings.flake, Path.cwd())
        return Flake(
            reference,
            nix=self.nix,
            cache=self.settings.cache,
            override_inputs=self.settings.override_input,
            progress=self.progress,
            logs=self.out.shared("nix"),
        )

    @cached_property
    def every_machine(self) -> tuple[MachineInfo, ...]:
        """Every machine of the flake, the ones that can't be tested here included."""
        return self._known if self._known is not None else self.flake.machines()

    @cached_property
    def machines(self) -> tuple[MachineInfo, ...]:
        """The machines that --nixvm-machine selects, all if it is not given.

        Raises `SettingsError` for a glob that matches nothing.
        """
        selected = self.every_machine
        globs = self.settings.machine
        names = [machine.name for machine in selected]
        for glob in globs:
            if not fnmatch.filter(names, glob):
                raise SettingsError(
                    f"--nixvm-machine {glob!r} matches no machine of {self.settings.flake}. "
                    f"Its machines: {', '.join(names) or 'none'}."
                )
        return tuple(
            machine
            for machine in selected
            if not globs or any(fnmatch.fnmatchcase(machine.name, glob) for glob in globs)
        )

    def build(self, name: str) -> VmBuild:
        """Build a machine's VM, once. Raises `FlakeError` or one of its children."""
        with self._lock:
            if name not in self._builds:
                self._builds[name] = self.flake.build(name)
            return self._builds[name]

    def prepare(self, name: str) -> None:
        """Do all that a start needs and that only the user can mend. Raises `UserError`."""
        self.accelerator(self.build(name))
        _ = self._scratch, self._sockets

    def accelerator(self, build: VmBuild) -> Accelerator:
        """Return how this build's QEMU will run its guest, after a trial where one is needed."""
        qemu = find_qemu(build.start_script)
        return choose(qemu, self.settings.accel, self.settings.cache)

    # --- what runs -------------------------------------------------------------------------------

    def start(
        self,
        name: str,
        *,
        memory: int | None = None,
        cores: int | None = None,
        network: str | None = None,
    ) -> Machine:
        """Boot a VM of its own, on a fresh disk, and return it ready.

        `memory` is in MiB. Raises `FlakeError` if it can't be built, `QemuError` if QEMU does not
        start, `BootError` if it does not get ready.
        """
        machine = self._make(name, self._request(memory, cores, network))
        machine.start()
        return machine

    def _request(
        self, memory: int | None = None, cores: int | None = None, network: str | None = None
    ) -> MachineRequest:
        settings = self.settings
        return MachineRequest(
            isolation=settings.isolation,
            memory=memory or settings.memory,
            cores=cores or settings.cores,
            network="nat" if (network or settings.network) == "nat" else "isolated",
        )

    def acquire(self, name: str, request: MachineRequest, scope: str) -> Machine:
        """Return the VM that the tests of `scope` share, booted and ready.

        One that has ended is replaced. A machine that did not boot once is not tried again: its
        `BootError` is raised for every test.
        """
        key = _Shared(name, request.memory, request.cores, request.network, scope)
        with self._lock:
            machine = self._shared.get(key)
            if machine is not None and machine.is_up():
                return machine
            if machine is not None:
                self._discard(key)
            failed = _Shared(name, request.memory, request.cores, request.network, "")
            if failed in self._unbootable:
                raise self._unbootable[failed]
            try:
                machine = self._make(name, request)
                machine.start()
            except BootError as error:
                self._unbootable[failed] = error
                raise
            self._shared[key] = machine
            return machine

    def release(self, scope: str) -> None:
        """End the VMs that the tests of `scope` shared."""
        with self._lock:
            for key in [key for key in self._shared if key.scope == scope]:
                self._discard(key)

    def keep(self, machine: Machine) -> None:
        """Leave a VM running when the session ends; nobody gets it from now on.

        `kept` says how to get in. Does nothing for one that does not run.
        """
        with self._lock:
            if machine in self._left_running:
                return
            try:
                self.kept.append(keep.describe(machine))
            except MachineGoneError:
                return
            self._left_running.append(machine)
            self._shared = {k: each for k, each in self._shared.items() if each is not machine}

    def _discard(self, key: _Shared) -> None:
        self._end(self._shared.pop(key))

    def _end(self, machine: Machine) -> None:
        machine.kill()
        shutil.rmtree(machine.spec.scratch, ignore_errors=True)

    def _make(self, name: str, request: MachineRequest) -> Machine:
        from pytest_nixvm.machine import Machine

        with self._lock:
            if self._closed:
                raise SettingsError("The fleet is closed: its session has ended.")
            build = self.build(name)
            number = len(self.started)
            label = f"{name}-{number}"
            output = self.out.directory(label)
            sockets, scratch = self._sockets / str(number), self._scratch / label
            make_directory(scratch)
            sockets.mkdir(mode=0o700)
            machine = Machine(
                build,
                LaunchSpec(
                    name=name,
                    start_script=build.start_script,
                    accelerator=self.accelerator(build),
                    sockets=sockets,
                    scratch=scratch,
                    console_log=output / "console.log",
                    qemu_log=output / "qemu.log",
                    memory=request.memory,
                    cores=request.cores,
                    network=request.network,
                    arguments=keep.arguments(sockets) if self.settings.keep != "never" else (),
                ),
                supervisor=self._supervisor,
                io=self._io,
                keys=self._keys,
                progress=self.progress,
                boot_timeout=self.settings.boot_timeout,
                output=output,
            )
            self.started.append(machine)
            return machine

    def run_test_script(
        self,
        text: str | Path,
        machines: Mapping[str, str | Machine] | Sequence[str | Machine],
        *,
        name: str = "testScript",
    ) -> None:
        """Run a script of the NixOS test driver, a `testScript`, as it is.

            nixvm.run_test_script(text, ["dev-vm", "test-vm"])       # VMs of its own, by name
            nixvm.run_test_script(text, {"machine": vm})             # a VM that is there already

        A name of the flake's is a VM of the script's own: started when the script first uses it,
        ended with the script. `text` may be a file's path. The script's output goes to stdout;
        `name` stands in tracebacks. Raises `ScriptError` for a syntax error in the script, and
        whatever the script raises.
        """
        from pytest_nixvm import script

        __tracebackhide__ = True  # the script's own lines are what its author reads
        made: list[Machine] = []

        def make(machine: str) -> Machine:
            made.append(self._make(machine, self._request()))
            return made[-1]

        try:
            script.run(text, script.makers(machines, make), name)
        except BaseException:
            if self.settings.keep == "failed":
                for machine in made:
                    self.keep(machine)
            raise
        finally:
            for machine in made:
                if machine not in self._left_running and self.settings.keep != "always":
                    self._end(machine)

    def interact(self, machine: Machine) -> None:
        """Open a shell in a VM on this terminal, for a look around; `pytest -s` has one.

        Raises `MachineError` where there is no terminal.
        """
        from pytest_nixvm import interact

        interact.shell(machine)

    def close(self) -> None:
        """End every VM and remove what they left. May be called twice."""
        with self._lock:
            self._closed = True
            self._shared.clear()
            if self.settings.keep == "always":
                for machine in self.started:
                    self.keep(machine)
            for machine in self.started:
                if machine in self._left_running:
                    machine.leave_running()
                else:
                    machine.kill()
            made = self.__dict__
            if "_supervisor" in made:
                self._supervisor.close()
            if "_io" in made:
                self._io.close()
            if "out" in made:
                self.out.close()

    # --- what VMs need, made when the first one starts -------------------------------------------

    @cached_property
    def _io(self) -> IoThread:
        return IoThread()

    @cached_property
    def _supervisor(self) -> Supervisor:
        return Supervisor()

    @cached_property
    def _sockets(self) -> Path:
        return private_directory(self._supervisor)

    @cached_property
    def _scratch(self) -> Path:
        """A directory on disk for overlays: not in /tmp, which may be memory."""
        base = self.settings.cache / "scratch"
        make_directory(base)
        free = shutil.disk_usage(base).free
        if free < LEAST_FREE:
            raise SettingsError(
                f"The disk under {base} is full: {free // 2**20} MiB are free, and the VMs' disks "
                f"need at least {LEAST_FREE // 2**20}. Free some, or name another place with "
                "--nixvm-cache."
            )
        return self._supervisor.make_directory(base)

    @cached_property
    def _keys(self) -> KeyPair:
        from pytest_nixvm.guest.keys import KeyPair

        return KeyPair.generate(self._sockets)
