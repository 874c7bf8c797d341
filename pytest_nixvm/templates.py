"""The templates of a fleet's machines: made once, found again, shared with other processes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import platform
import re
import threading
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nixvm.errors import MachineError, QemuError, SettingsError
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.output import make_directory
from pytest_nixvm.progress import Progress
from pytest_nixvm.qemu.accelerator import architecture, find_qemu
from pytest_nixvm.qemu.spec import LaunchSpec, arguments, environment
from pytest_nixvm.qemu.template import (
    RAM,
    CannotFreezeError,
    Template,
    load,
    power_on,
    share_memory,
)
from pytest_nixvm.settings import MachineRequest
from pytest_nixvm.store import Building, Entry, Store, key_of
from pytest_nixvm.workshop import Workshop

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

FORMAT = 1
"""Of what is in a template; another one is made anew."""

Prepare = Callable[["Machine"], object]
"""Brings a machine into the state in which it is to be frozen."""

_PATIENCE = 600.0
"""Seconds to wait, beside the boot timeout, for another process that makes the same template."""


@dataclass
class Unfreezable:
    """Why there is no template of a machine. `machine` was booted for one, and runs on."""

    reason: str
    machine: Machine | None = None


class Templates:
    """Finds or makes templates. For any thread; two that want the same one wait for each other."""

    def __init__(
        self,
        workshop: Workshop,
        store: Store,
        progress: Progress,
        power: Callable[[Machine], object],
    ) -> None:
        self._workshop = workshop
        self._store = store
        self._progress = progress
        self._power = power  # starts a machine that is going to be frozen
        self._known: dict[str, Template | Unfreezable] = {}
        self._failed: dict[str, Exception] = {}  # what `prepare` has raised
        self._entries: list[Entry] = []
        self._sealing: list[threading.Thread] = []
        self._lock = threading.RLock()

    # --- of machines ---------------------------------------------------------------------------

    def of(self, build: VmBuild, request: MachineRequest) -> Template | Unfreezable:
        """Return the template of a machine as the request wants it, booting it if there is none.

        Raises `BootError` and what else a start raises.
        """
        components = self._components(build, request)
        return self._find(
            components,
            lambda: f"another process boots {build.name}, to share its template",
            lambda ram, label: self._workshop.make(build, request, ram=ram, label=label),
            lambda _: None,
        )

    def prepared(
        self,
        name: str,
        build: VmBuild,
        request: MachineRequest,
        prepare: Prepare,
        depends: Sequence[object],
    ) -> Template | Unfreezable:
        """Return the template of a machine on which `prepare` was run.

        It is kept as long as neither the machine, nor the source of `prepare`, nor any of `depends`
        changes. Raises whatever `prepare` raises.
        """
        parent = self.of(build, request)
        if isinstance(parent, Unfreezable):
            return parent
        components = {
            **self._components(build, request),
            "parent": parent.facts["id"],
            "prepare": [name, *map(_content, (prepare, *depends))],
        }
        return self._find(
            components,
            lambda: f"another process prepares {build.name} ({name}), to share its template",
            lambda _, label: self._workshop.make(build, request, template=parent, label=label),
            prepare,
        )

    def snapshot(self, machine: Machine, name: str) -> Template:
        """Freeze a machine that runs, for this session. It goes on as the first clone.

        Raises `CannotFreezeError`.
        """
        directory = self._workshop.scratch / f"snapshot-{uuid.uuid4().hex[:8]}"
        make_directory(directory)
        step = self._progress.step(f"Freezing {machine.name} as {name!r}")
        try:
            template = self._freeze(machine, directory)
        except BaseException as error:
            step.fail(str(error).partition("\n")[0])
            raise
        step.finish()
        machine.template, machine.loaded, machine.frozen = template, False, False
        machine.start()
        return template

    # --- finding and making --------------------------------------------------------------------

    def _find(
        self,
        components: dict[str, Any],
        waits_for: Callable[[], str],
        make: Callable[[Path | None, str], Machine],
        prepare: Prepare,
    ) -> Template | Unfreezable:
        key = key_of(components)
        with self._lock:
            if key in self._failed:
                raise self._failed[key]
            if key in self._known:
                return self._known[key]
            name = components["machine"]

            def damaged(what: str) -> None:
                self._progress.step(f"{name}: its template was damaged ({what})").finish()

            entry: Entry | Building | None = self._store.open(key, components, damaged)
            template = self._of_entry(entry) if entry is not None else None
            if template is None:
                entry = self._store.begin(
                    key,
                    components,
                    self._workshop.settings.boot_timeout + _PATIENCE,
                    lambda: self._progress.step(waits_for()).finish(),
                    damaged,
                )
                if isinstance(entry, Entry):
                    template = self._of_entry(entry)
                    if template is None:
                        raise MachineError(
                            f"The template in {entry.directory} can't be read, although another "
                            "process has just made it: `nixvm cache clear` removes it."
                        )
                else:
                    try:
                        made = self._make(entry, name, make, prepare)
                    except Exception as error:
                        if "prepare" in components:  # as with boots: it is not tried again
                            self._failed[key] = error
                        raise
                    self._known[key] = made
                    return made
            self._known[key] = template
            return template

    def _of_entry(self, entry: Entry | Building) -> Template | None:
        if isinstance(entry, Building):
            return None
        try:
            template = Template.from_json(entry.directory, entry.data)
        except (KeyError, TypeError, ValueError):
            entry.close()
            return None
        self._entries.append(entry)
        return template

    def _make(
        self,
        building: Building,
        name: str,
        make: Callable[[Path | None, str], Machine],
        prepare: Prepare,
    ) -> Template | Unfreezable:
        directory = building.directory
        machine = None
        try:
            machine = make(directory / RAM, f"{name}-template")
            self._power(machine)
            prepare(machine)
            boot = machine.boot
            if boot is not None and boot.state != "running":
                # Why a unit has failed may be over the next time: it is not kept.
                directory = self._private_place(building)
            template = self._freeze(machine, directory)
        except CannotFreezeError as error:
            building.abandon()
            kept, machine = machine, None
            return Unfreezable("; ".join(map(str, error.blockers)), kept)
        except BaseException:
            building.abandon()
            raise
        finally:
            if machine is not None:
                self._workshop.end(machine)
        if directory == building.directory:
            self._seal(building, template)
        return template

    def _private_place(self, building: Building) -> Path:
        directory = self._workshop.scratch / f"template-{uuid.uuid4().hex[:8]}"
        make_directory(directory)
        if (building.directory / RAM).exists():
            (building.directory / RAM).rename(directory / RAM)
        building.abandon()
        return directory

    def _freeze(self, machine: Machine, directory: Path) -> Template:
        template = machine.freeze(directory)
        template.facts["id"] = uuid.uuid4().hex
        if template.has_ram or template.memory == 0 or not _has_ram_object(template):
            return template
        # A clone's memory is its own, so it is all in the state. Once loaded into a file it can be
        # shared by the clones of this clone.
        spare = self._workshop.make(
            machine.build,
            _as_was(machine),
            template=template,
            label=f"{machine.name}-freezing",
        )
        try:
            qemu = power_on(
                template,
                spare.spec,
                supervisor=self._workshop.supervisor,
                io=self._workshop.io,
                timeout=30,
                ram=directory / RAM,
            )
            try:
                load(qemu, template, timeout=120)
                return share_memory(qemu, template)
            finally:
                qemu.kill()
        except QemuError:
            return template  # slower to load, and nothing is shared
        finally:
            self._workshop.clear(spare)
            with suppress(OSError):
                spare.spec.console_log.unlink()
                spare.spec.qemu_log.unlink()
                spare.output.rmdir()

    def _seal(self, building: Building, template: Template) -> None:
        """Keep a template for later runs, in the background: it can be used meanwhile."""

        def seal() -> None:
            try:
                entry = building.seal(template.to_json(), writable=frozenset({RAM}))
            except (SettingsError, OSError) as error:
                step = self._progress.step("Keeping a template for the next run")
                step.fail(str(error).partition("\n")[0])
                return
            self._entries.append(entry)

        thread = threading.Thread(target=seal, name="nixvm-seal", daemon=True)
        thread.start()
        self._sealing.append(thread)

    def close(self) -> None:
        """Wait until what was made is kept, and let others remove it."""
        for thread in self._sealing:
            thread.join()
        for entry in self._entries:
            entry.close()

    # --- what could change a template ----------------------------------------------------------

    @cached_property
    def _plugin(self) -> list[str]:
        return [importlib.metadata.version("pytest-nixvm"), _sources()]

    def _components(self, build: VmBuild, request: MachineRequest) -> dict[str, Any]:
        qemu = find_qemu(build.start_script)
        accelerator = self._workshop.accelerator(build)
        guest = architecture(qemu)
        script = build.start_script.read_text(errors="replace")
        # The places differ each time; a template's are replaced in its clones.
        nowhere = Path("/nowhere")
        spec = LaunchSpec(
            name=build.name,
            start_script=build.start_script,
            accelerator=accelerator,
            sockets=nowhere,
            scratch=nowhere,
            console_log=nowhere,
            qemu_log=nowhere,
            memory=request.memory,
            cores=request.cores,
            network=request.network,
            network_options=build.network_options,
            ram=nowhere,
            arguments=("kept",) if self._workshop.settings.keep != "never" else (),
        )
        ours = {"TMPDIR", "SHARED_DIR"}
        variables = environment(spec, script, guest)
        binary = qemu.resolve().stat()
        return {
            "machine": build.name,
            "format": FORMAT,
            "plugin": self._plugin,
            "directory": str(self._store.directory),
            "build": [str(build.output), str(build.start_script)],
            "command line": list(arguments(spec, script, guest)),
            "environment": {
                name: value
                for name, value in variables.items()
                # `nix develop` has NIX_ variables that differ each time; scripts have their own.
                if name.startswith("QEMU_")
                or name in ours
                or (name.startswith("NIX_") and name in script)
            },
            "qemu": [str(qemu.resolve()), binary.st_size, binary.st_mtime_ns],
            "accelerator": accelerator.name,
            "cpu": _cpu(accelerator.name),
            "memory": request.memory,
            "cores": request.cores,
            "network": request.network,
        }


def _as_was(machine: Machine) -> MachineRequest:
    spec = machine.spec
    return MachineRequest("test", spec.memory, spec.cores, spec.network)


def _has_ram_object(template: Template) -> bool:
    return any("id=nixvm-ram" in argument for argument in template.argv)


def _cpu(accelerator: str) -> list[str]:
    """Return what a guest sees of this computer's processor: under KVM all, else its kind."""
    if accelerator != "kvm":
        return [platform.machine()]
    text = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    lines = [
        line
        for line in text.splitlines()
        if re.match(r"(model name|flags|Features|stepping|microcode|CPU part)\s*:", line)
    ]
    return [platform.release(), *lines]


def _sources() -> str:
    """Return a digest of the rooms that decide what is in a template, and how it wakes."""
    digest = hashlib.blake2b(digest_size=16)
    here = Path(__file__).parent
    for path in sorted([*here.glob("qemu/*.py"), *here.glob("guest/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _content(thing: object) -> str:
    """Return what stands for something that a prepared machine depends on, as text.

    A function is its source and what it was given when it was made, a path what it holds (a
    directory: all of it), the rest its `repr`. Raises `SettingsError`.
    """
    if isinstance(thing, Path):
        digest = hashlib.blake2b(digest_size=16)
        try:
            for path in (thing, *sorted(thing.rglob("*"))):
                if path.is_symlink() and not path.exists():
                    content = str(path.readlink()).encode()
                else:
                    content = b"" if path.is_dir() else path.read_bytes()
                runs = path.is_file() and bool(path.stat().st_mode & 0o111)
                name = path.relative_to(thing)
                digest.update(f"{name}\0{path.is_dir()} {runs} {len(content)}\0".encode() + content)
        except OSError as error:
            text = f"{thing}, which a template depends on, can't be read: {error.strerror}."
            raise SettingsError(text) from None
        return digest.hexdigest()
    return _source(thing, set()) if callable(thing) else repr(thing)


def _source(function: Callable[..., object], seen: set[int]) -> str:
    seen.add(id(function))
    text = ""
    with suppress(OSError, TypeError):
        file = inspect.getsourcefile(function)
        # For a text that was given to `exec` some Pythons find another one.
        text = inspect.getsource(function) if file and Path(file).is_file() else ""
    if not text:
        raise SettingsError(
            f"{function!r} has no source, so nobody can tell when it changes: a template's "
            "steps have to be functions of a file."
        )
    # Two functions that one function has made have the same source.
    given: list[object] = [getattr(function, "__defaults__", None)]
    given.append(getattr(function, "__kwdefaults__", None))
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not set yet
            given.append(cell.cell_contents)
    for each in given:
        if inspect.isfunction(each):
            text += "\0" + (_source(each, seen) if id(each) not in seen else "")
        elif each is not None:
            text += f"\0{each!r}"
    return text
