"""The session's VMs: what runs, what is ready, and the end of all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pytest_nixvm import keep
from pytest_nixvm.by_hand import ByHand
from pytest_nixvm.changes import Changes
from pytest_nixvm.errors import BootError, MachineGoneError, SettingsError
from pytest_nixvm.flake.build import MachineInfo, VmBuild
from pytest_nixvm.keep import Kept
from pytest_nixvm.options import NETWORKS
from pytest_nixvm.progress import Progress
from pytest_nixvm.settings import MachineRequest, Settings
from pytest_nixvm.snapshots import Snapshot, check_prepare
from pytest_nixvm.spares import Spares, Want
from pytest_nixvm.store import Store
from pytest_nixvm.templates import Prepare, Templates, Unfreezable
from pytest_nixvm.verbs.infra import MACHINES
from pytest_nixvm.workshop import Workshop

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.qemu.template import Template


@dataclass(frozen=True)
class Wanted:
    """What the next test is going to start, and who will log in by SSH."""

    what: Snapshot | tuple[str, MachineRequest]
    users: tuple[str | None, ...] = ()


@dataclass(frozen=True)
class _Shared:
    """What tests must have in common to share a VM."""

    name: str
    request: MachineRequest
    scope: str


class Fleet(Changes, ByHand):
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
        super().__init__(settings, progress=progress, output=output, known=known)
        self.started: list[Machine] = []
        self.kept: list[Kept] = []
        # Called with each machine before it is powered on; `shared` is False for those of `start`.
        self.on_start: Callable[[Machine, bool], None] = lambda *_: None
        self.on_end: Callable[[Machine], None] = lambda _: None
        self._template_of: dict[tuple[str, MachineRequest], Template | None] = {}
        self._booted: dict[tuple[str, MachineRequest], Machine] = {}  # used by nobody yet
        self._shared: dict[_Shared, Machine] = {}
        self._left_running: list[Machine] = []
        self._unbootable: dict[_Shared, BootError] = {}
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

    # --- what runs -------------------------------------------------------------------------------

    def prepare(self, name: str, request: MachineRequest | None = None) -> None:
        """Do all that a start needs and that only the user can mend. Raises `UserError`."""
        request = request or self._request()
        build = self._built(name, request)
        if request.generations is not None:
            for candidate in request.generations.candidates:
                self.candidate(name, candidate, build, boot_loader=request.boot_loader)
        self._workshop.accelerator(build)
        _ = self._workshop.scratch, self._workshop.sockets

    def start(
        self,
        name: str,
        *,
        memory: int | None = None,
        cores: int | None = None,
        network: str | None = None,
    ) -> Machine:
        """Start a VM of its own, as it is after its boot, and return it ready.

        With isolation `test` that is a clone of its template, which is booted if there is none yet;
        else, and where the machine can't be frozen, it boots on a fresh disk. It lasts until the
        session ends; `with` ends it earlier. `memory` is in MiB. Raises `FlakeError` if it can't
        be built, `QemuError` if QEMU does not start, `BootError` if it does not get ready.
        """
        return self._fresh(name, self._request(memory, cores, network), shared=False)

    def _request(
        self,
        memory: int | None = None,
        cores: int | None = None,
        network: str | None = None,
        boot_loader: bool | None = None,
    ) -> MachineRequest:
        settings = self.settings
        if network not in (None, *NETWORKS):
            raise SettingsError(f"network: {network!r} is not one of {', '.join(NETWORKS)}.")
        return MachineRequest(
            isolation=settings.isolation,
            memory=memory or settings.memory,
            cores=cores or settings.cores,
            network="nat" if (network or settings.network) == "nat" else "isolated",
            boot_loader=settings.boot_loader if boot_loader is None else boot_loader,
        )

    def acquire(self, name: str, request: MachineRequest, scope: str) -> Machine:
        """Return the VM that the tests of `scope` share, ready.

        One that has ended is replaced. A machine that did not boot once is not tried again: its
        `BootError` is raised for every test.
        """
        key = _Shared(name, replace(request, user=None, isolation="test"), scope)
        with self._lock:
            machine = self._shared.get(key)
            if machine is not None and machine.is_up():
                return machine
            if machine is not None:
                self.end(self._shared.pop(key))
            failed = replace(key, scope="")
            if failed in self._unbootable:
                raise self._unbootable[failed]
            try:
                machine = self._fresh(name, request, shared=True)
            except BootError as error:
                self._unbootable[failed] = error
                raise
            self._shared[key] = machine
            return machine

    def release(self, scope: str) -> None:
        """End the VMs that the tests of `scope` shared."""
        with self._lock:
            for key in [key for key in self._shared if key.scope == scope]:
                self.end(self._shared.pop(key))

    def expect(self, wanted: Sequence[Wanted]) -> None:
        """Have spares ready for the next test: clones that are loaded in the background.

        Returns at once; machines of which there is no template yet are left out.
        """
        with self._lock:
            wants = []
            for each in wanted:
                if isinstance(each.what, Snapshot):
                    template = each.what.template
                    make: Callable[[Template], Machine] = each.what.make_clone
                else:
                    name, request = each.what
                    template = self._template_of.get((name, replace(request, user=None)))
                    make = self._cloner(name, request)
                if template is not None:
                    wants.append(Want(template, partial(make, template), each.users))
            self._spares.expect(wants)

    def _built(self, name: str, request: MachineRequest) -> VmBuild:
        return self.build(
            name,
            freezable=self._freezes(request),
            boot_loader=request.boot_loader,
            generations=request.generations,
        )

    def _freezes(self, request: MachineRequest) -> bool:
        # With another isolation the VM is the one that `nix run` starts, shares and all.
        return "test" in (self.settings.isolation, request.isolation)

    def _fresh(self, name: str, request: MachineRequest, *, shared: bool) -> Machine:
        """Return a machine that is ready and was used by nobody."""
        template = self._template(name, request) if self._freezes(request) else None
        if template is not None:
            return self._wake(template, self._cloner(name, request), shared)
        booted = self._booted.pop((name, replace(request, user=None)), None)
        if booted is not None and booted.is_up():
            self._hand_out(booted, shared)
            return booted
        build = self._built(name, request)
        return self._power(self._workshop.make(build, request), shared)

    def _template(self, name: str, request: MachineRequest) -> Template | None:
        key = (name, replace(request, user=None))
        with self._lock:
            if key not in self._template_of:
                found = self._templates.of(self._built(name, request), request)
                if isinstance(found, Unfreezable):
                    self.unfreezable.setdefault(name, found.reason)
                    if found.machine is not None:
                        self._booted[key], found.machine = found.machine, None
                else:
                    self.unfreezable.pop(name, None)  # it could not be built without shares
                self._template_of[key] = None if isinstance(found, Unfreezable) else found
            return self._template_of[key]

    def _cloner(self, name: str, request: MachineRequest) -> Callable[[Template], Machine]:
        # The build is looked up now: a spare is made while somebody who waits for it has our lock.
        build = self._built(name, request)
        return lambda template: self._workshop.make(build, request, template=template)

    def _wake(
        self, template: Template, make: Callable[[Template], Machine], shared: bool
    ) -> Machine:
        spare = self._spares.take(template)
        if spare is None:
            return self._power(make(template), shared)
        try:
            self._hand_out(spare, shared)
            spare.wake()
        except BaseException:
            self.end(spare)
            raise
        return spare

    def _to_start(self, name: str, request: MachineRequest) -> Machine:
        """Return a machine that is off, for somebody who is going to start it."""
        template = self._template(name, request) if self._freezes(request) else None
        build = self._built(name, request)
        machine = self._workshop.make(build, request, template=template)
        self._hand_out(machine, shared=False)
        self._workshop.reserve(machine)
        return machine

    def _hand_out(self, machine: Machine, shared: bool) -> None:
        """Note that somebody gets a machine; a spare was nobody's until then."""
        if machine not in self.started:
            self.started.append(machine)
        MACHINES[machine.name] = MACHINES[machine.build.name] = machine
        self.on_start(machine, shared)

    def _power(self, machine: Machine, shared: bool) -> Machine:
        """Start a machine for the first time, when there is memory for it."""
        try:
            self._hand_out(machine, shared)
            self._workshop.reserve(machine)
            machine.start()
            self._workshop.started(machine)
        except BaseException:
            if machine.template is not None:
                self.end(machine)
            raise
        return machine

    # --- snapshots -------------------------------------------------------------------------------

    def template(
        self,
        name: str,
        prepare: Prepare,
        *,
        title: str = "",
        depends: Sequence[object] = (),
        memory: int | None = None,
        cores: int | None = None,
        network: str | None = None,
    ) -> Snapshot:
        """Prepare a machine with `prepare(vm)`, freeze it, and return where clones are had.

            def with_data(vm):
                vm.succeed("systemctl start postgresql")

            prepared = nixvm.template("db-server", with_data)
            vm = prepared.start()

        It is kept between runs, and made anew when the machine changes, or the source of `prepare`,
        or any of `depends`: functions that it calls, files that it copies, values. Raises what
        `prepare` raises.
        """
        check_prepare(prepare)
        request = replace(self._request(memory, cores, network), isolation="test")
        title = title or getattr(prepare, "__name__", "prepared")
        build = self._built(name, request)
        with self._lock:
            found = self._templates.prepared(title, build, request, prepare, depends)
        if isinstance(found, Unfreezable):
            self.unfreezable.setdefault(name, found.reason)
            if found.machine is not None:
                booted, found.machine = found.machine, None
                self.end(booted)

            def boot() -> Machine:
                machine = self._fresh(name, request, shared=False)
                prepare(machine)
                return machine

            return Snapshot(title, name, None, boot, self._cloner(name, request))
        return self._snapshot_of(title, name, found, self._cloner(name, request))

    def _snapshot(self, machine: Machine, name: str) -> Snapshot:
        """Do what `Machine.snapshot` promises."""
        with self._lock:
            template = self._templates.snapshot(machine, name)
        spec = machine.spec
        request = MachineRequest("test", spec.memory, spec.cores, spec.network)

        def make(template: Template) -> Machine:
            return self._workshop.make(machine.build, request, template=template)

        return self._snapshot_of(name, machine.name, template, make)

    def _snapshot_of(
        self, title: str, name: str, template: Template, make: Callable[[Template], Machine]
    ) -> Snapshot:
        def start() -> Machine:
            return self._wake(template, make, shared=False)

        return Snapshot(title, name, template, start, make)

    # --- the end of machines ---------------------------------------------------------------------

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

    def end(self, machine: Machine) -> None:
        """End a machine and remove what it has on disk, unless it is to be kept."""
        if machine in self._left_running:
            return
        if self.settings.keep == "always" and machine in self.started:
            self.keep(machine)
            return
        self._workshop.clear(machine)
        if machine in self.started:
            self.started.remove(machine)
            self.on_end(machine)

    def close(self) -> None:
        """End every VM and remove what they left. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._shared.clear()
            if self.settings.keep == "always":
                for machine in self.started:
                    self.keep(machine)
            made = self.__dict__
            if "_spares" in made:
                self._spares.close()
            for machine in list(self.started):
                if machine in self._left_running:
                    machine.leave_running()
                else:
                    self.end(machine)
            if "_templates" in made:
                self._templates.close()
            self._workshop.close()
            if "out" in made:
                self.out.close()

    # --- made when they are needed ---------------------------------------------------------------

    @cached_property
    def _workshop(self) -> Workshop:
        workshop = Workshop(self.settings, self.progress, lambda: self.out)
        workshop.make_room = lambda: self._spares.drop()
        workshop.snapshot = self._snapshot
        workshop.end = self.end
        return workshop

    @cached_property
    def _templates(self) -> Templates:
        store = Store(self.settings.cache / "templates", self.settings.cache_size)
        return Templates(
            self._workshop, store, self.progress, lambda machine: self._power(machine, True)
        )

    @cached_property
    def _spares(self) -> Spares:
        return Spares(self._workshop)
