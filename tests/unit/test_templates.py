"""When a template is found again, and when the machine is booted anew: real store, real files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_nixvm import templates
from pytest_nixvm.errors import BootError, SettingsError
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.progress import Silent
from pytest_nixvm.qemu.accelerator import Accelerator
from pytest_nixvm.qemu.blockers import Blocker
from pytest_nixvm.qemu.template import CannotFreezeError, Template
from pytest_nixvm.settings import MachineRequest, Settings
from pytest_nixvm.store import Store
from pytest_nixvm.templates import Templates, Unfreezable


class Machine:
    """A machine that leaves what a frozen one does."""

    def __init__(self, workshop: Workshop, build: VmBuild, template: Template | None) -> None:
        self.name = build.name
        self.build = build
        self.template = template
        self.workshop = workshop
        self.boot = SimpleNamespace(state=workshop.state)
        self.on = False
        self.done: list[str] = []

    def freeze(self, directory: Path) -> Template:
        if self.workshop.blocker:
            raise CannotFreezeError(self.name, (Blocker(self.workshop.blocker, "do without"),))
        self.on = False
        (directory / "ram").write_bytes(b"memory" * 1000)
        (directory / "state").write_text(" ".join(self.done))
        return Template(
            directory=directory,
            argv=("qemu", "-m", "64"),
            sockets=Path("/s"),
            scratch=Path("/x"),
            console_log=Path("/c"),
            disks=(),
            memory=64,
            has_ram=True,
            version=(7, 2, 0),
            facts={},
        )


class Workshop:
    """Makes machines, and counts the boots and the clones that were prepared."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.settings = settings
        self.scratch = directory / "scratch"
        self.how = Accelerator("tcg", "these tests")
        self.state = "running"
        self.blocker = ""
        self.booted: list[Machine] = []
        self.cloned: list[Machine] = []
        self.ended: list[Machine] = []

    def accelerator(self, _: VmBuild) -> Accelerator:
        return self.how

    def make(
        self,
        build: VmBuild,
        request: MachineRequest,
        *,
        template: Template | None = None,
        ram: Path | None = None,
        label: str = "",
    ) -> Machine:
        machine = Machine(self, build, template)
        (self.booted if template is None else self.cloned).append(machine)
        return machine

    def end(self, machine: Machine) -> None:
        machine.on = False
        self.ended.append(machine)


class World:
    """One computer, one user, one machine of a flake; each `run` is a pytest run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.qemu = directory / "bin" / "qemu-system-x86_64"
        self.qemu.parent.mkdir()
        self.qemu.write_text("#!/bin/sh\n")
        self.script = directory / "run-vm"
        self.script.write_text(f'exec {self.qemu} -name vm -m 512 -smp 1 "$NIX_DISK_IMAGE"\n')
        self.output = directory / "output-1"
        self.cache = directory / "cache"
        self.options: dict[str, object] = {}
        self.request: dict[str, object] = {
            "isolation": "test", "memory": None, "cores": None, "network": "isolated"
        }  # fmt: skip
        self.name = "dev-vm"
        self.how = Accelerator("tcg", "these tests")
        self.data = directory / "data"
        self.data.mkdir()
        (self.data / "schema.sql").write_text("create table a;\n")
        (self.data / "run.sh").write_text("#!/bin/sh\n")

    @property
    def build(self) -> VmBuild:
        return VmBuild(
            self.name, "nixosConfigurations.x", self.script, self.output, None, "x86_64-linux",
            (), True, 0.0, 0.0,
        )  # fmt: skip

    def run(self) -> Run:
        return Run(self)

    def boots(self) -> int:
        """How many boots a run needs that wants the machine once."""
        with self.run() as run:
            run.of()
            return len(run.workshop.booted)

    def prepares(self, prepare: Callable[..., object], *depends: object, name: str = "x") -> int:
        """How many clones a run prepares that wants the prepared machine once."""
        with self.run() as run:
            run.prepared(prepare, *depends, name=name)
            return len(run.workshop.cloned)


class Run:
    def __init__(self, world: World) -> None:
        self.world = world
        settings = Settings.make(cache=str(world.cache), **world.options)
        self.workshop = Workshop(world.directory, settings)
        self.workshop.how = world.how
        self.templates = Templates(
            self.workshop,  # type: ignore[arg-type]
            Store(world.cache / "templates"),
            Silent(),
            self.power,  # type: ignore[arg-type]
        )
        self.power_error: Exception | None = None

    def power(self, machine: Machine) -> None:
        if self.power_error is not None:
            raise self.power_error
        machine.on = True

    def of(self) -> Template | Unfreezable:
        return self.templates.of(self.world.build, MachineRequest(**self.world.request))  # type: ignore[arg-type]

    def prepared(
        self, prepare: Callable[..., object], *depends: object, name: str = "x"
    ) -> Template | Unfreezable:
        request = MachineRequest(**self.world.request)  # type: ignore[arg-type]
        return self.templates.prepared(name, self.world.build, request, prepare, depends)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.templates.close()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def prepare(vm: Machine) -> None:
    vm.done.append("prepared")


# --- found again --------------------------------------------------------------------------------


def test_the_second_run_boots_nothing(world: World) -> None:
    assert world.boots() == 1
    assert world.boots() == 0
    with world.run() as run:
        template = run.of()
        assert isinstance(template, Template)
        assert (template.directory / "ram").read_bytes() == b"memory" * 1000
        assert run.of() is template


def test_one_run_boots_a_machine_once_for_all_its_threads(world: World) -> None:
    with world.run() as run:
        found: list[object] = []
        threads = [threading.Thread(target=lambda: found.append(run.of())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(run.workshop.booted) == 1
        assert len(found) == 4
        assert len({id(each) for each in found}) == 1


def test_who_logs_in_changes_no_template(world: World) -> None:
    world.boots()
    world.request["user"] = "alice"
    assert world.boots() == 0


def test_the_shell_in_which_pytest_runs_changes_no_template(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.boots()
    for name in ("NIX_BUILD_TOP", "NIX_DISK_IMAGE", "TMPDIR", "QEMU_OPTS", "HOME"):
        monkeypatch.setenv(name, f"/somewhere/{name}")
    assert world.boots() == 0


# --- made anew ----------------------------------------------------------------------------------


def _touch_qemu(world: World) -> None:
    status = world.qemu.stat()
    os.utime(world.qemu, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def _grow_qemu(world: World) -> None:
    status = world.qemu.stat()
    world.qemu.write_text("#!/bin/sh\n# another one\n")
    os.utime(world.qemu, ns=(status.st_atime_ns, status.st_mtime_ns))


def _link_qemu(world: World) -> None:
    # As a profile that was switched: the path stays.
    other = world.qemu.with_name("other")
    world.qemu.rename(other)
    world.qemu.symlink_to(other)


def _script(text: str) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.script.write_text(f"{world.script.read_text()}# {text}\n")

    return change


def _set(name: str, value: object) -> Callable[[World], None]:
    return lambda world: setattr(world, name, value)


CHANGES: dict[str, Callable[[World], None]] = {
    "another build": lambda world: _set("output", world.directory / "output-2")(world),
    "another start script": lambda world: _set(
        "script", world.script.rename(world.script.with_name("run-other"))
    )(world),
    "more memory in the start script": _script(" -m 2048 "),
    "a serial port in the start script": _script(" -serial stdio "),
    "QEMU is newer": _touch_qemu,
    "QEMU is larger": _grow_qemu,
    "QEMU is another": _link_qemu,
    "the accelerator": _set("how", Accelerator("kvm", "these tests")),
    "memory": lambda world: world.request.update(memory=1024),
    "cores": lambda world: world.request.update(cores=2),
    "network": lambda world: world.request.update(network="nat"),
    "keep": lambda world: world.options.update(keep="failed"),
    "the cache": lambda world: _set("cache", world.directory / "cache-2")(world),
    "the machine": _set("name", "other-vm"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_boots_the_machine_anew(world: World, change: str) -> None:
    assert world.boots() == 1
    CHANGES[change](world)
    assert world.boots() == 1
    assert world.boots() == 0


@pytest.mark.parametrize("variable", ["QEMU_AUDIO_DRV", "NIX_SPECIAL"])
def test_a_variable_that_the_start_script_or_qemu_reads_boots_it_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    _script('"$NIX_SPECIAL"')(world)
    world.boots()
    monkeypatch.setenv(variable, "none")
    assert world.boots() == 1


def test_another_version_of_the_plugin_boots_it_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.boots()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "99.0")
    assert world.boots() == 1


@pytest.mark.parametrize("room", ["qemu", "guest"])
def test_another_source_of_the_plugin_boots_it_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    monkeypatch.setattr(templates, "__file__", str(world.directory / "plugin" / "templates.py"))
    file = world.directory / "plugin" / room / "spec.py"
    file.parent.mkdir(parents=True)
    file.write_text("a = 1\n")
    world.boots()
    assert world.boots() == 0
    file.write_text("a = 2\n")
    assert world.boots() == 1


def test_a_machine_whose_units_failed_is_not_kept(world: World) -> None:
    with world.run() as run:
        run.workshop.state = "degraded"
        template = run.of()
        assert isinstance(template, Template)
        assert (template.directory / "ram").exists()
        assert run.of() is template
        assert not template.directory.is_relative_to(world.cache / "templates")
    assert world.boots() == 1


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_machine_that_can_not_be_frozen_is_booted_once_and_told_why(world: World) -> None:
    with world.run() as run:
        run.workshop.blocker = "a share"
        found = run.of()
        assert isinstance(found, Unfreezable)
        assert "a share" in found.reason
        assert run.of() is found
        assert len(run.workshop.booted) == 1
    assert world.boots() == 1  # the next run tries again


def test_a_boot_that_fails_leaves_nothing_and_can_be_tried_again(world: World) -> None:
    with world.run() as run:
        run.power_error = BootError("no", stage="x")
        with pytest.raises(BootError):
            run.of()
        assert run.workshop.ended == run.workshop.booted
        run.power_error = None
        assert isinstance(run.of(), Template)
    assert world.boots() == 0


def test_a_template_that_was_damaged_is_made_anew(world: World) -> None:
    world.boots()
    [state] = world.cache.rglob("state")
    state.chmod(0o600)
    state.write_text("x")
    assert world.boots() == 1
    assert world.boots() == 0


# --- prepared machines --------------------------------------------------------------------------


def test_a_prepared_machine_is_prepared_once(world: World) -> None:
    assert world.prepares(prepare) == 1
    assert world.prepares(prepare) == 0
    with world.run() as run:
        template = run.prepared(prepare)
        assert isinstance(template, Template)
        assert (template.directory / "state").read_text() == "prepared"
        assert run.workshop.booted == []


def test_a_machine_that_changed_is_prepared_anew(world: World) -> None:
    world.prepares(prepare)
    world.output = world.directory / "output-2"
    assert world.prepares(prepare) == 1


def test_a_parent_that_was_booted_anew_is_prepared_anew(world: World) -> None:
    world.prepares(prepare)
    [state] = (path for path in world.cache.rglob("state") if path.read_text() == "")
    state.chmod(0o600)
    state.write_text("damaged")
    assert world.prepares(prepare) == 1


def test_another_name_is_another_template(world: World) -> None:
    world.prepares(prepare)
    assert world.prepares(prepare, name="y") == 1


def _load(path: Path, text: str) -> Any:
    path.write_text(text)
    names: dict[str, Any] = {}
    exec(compile(text, str(path), "exec"), names)
    return names["step"]


def test_a_function_that_was_edited_prepares_anew(world: World, tmp_path: Path) -> None:
    text = "def step(vm):\n    vm.done.append('{}')\n"
    assert world.prepares(_load(tmp_path / "a.py", text.format("one"))) == 1
    assert world.prepares(_load(tmp_path / "b.py", text.format("one"))) == 0
    assert world.prepares(_load(tmp_path / "c.py", text.format("two"))) == 1


def test_a_function_that_it_depends_on_prepares_anew(world: World, tmp_path: Path) -> None:
    text = "def step(vm):\n    return {}\n"
    helper = _load(tmp_path / "a.py", text.format(1))
    world.prepares(prepare, helper)
    assert world.prepares(prepare, helper) == 0
    assert world.prepares(prepare, _load(tmp_path / "b.py", text.format(2))) == 1


def test_a_value_that_it_depends_on_prepares_anew(world: World) -> None:
    world.prepares(prepare, "14", {"a": 1})
    assert world.prepares(prepare, "14", {"a": 1}) == 0
    assert world.prepares(prepare, "15", {"a": 1}) == 1
    assert world.prepares(prepare, "14") == 1


def test_functions_that_were_made_with_other_values_are_others(world: World) -> None:
    def with_rows(rows: int, helper: Callable[[], str] = lambda: "") -> Callable[[Machine], None]:
        def step(vm: Machine, prefix: str = helper()) -> None:
            vm.done.append(f"{prefix}{rows}")

        return step

    with world.run() as run:
        few, many = run.prepared(with_rows(1)), run.prepared(with_rows(1000))
        assert isinstance(few, Template)
        assert isinstance(many, Template)
        assert (few.directory / "state").read_text() == "1"
        assert (many.directory / "state").read_text() == "1000"
    assert world.prepares(with_rows(1)) == 0
    assert world.prepares(with_rows(1, lambda: "p")) == 1


def test_a_function_that_calls_itself_is_no_trouble(world: World) -> None:
    def countdown(vm: Machine, left: int = 2) -> None:
        if left:
            countdown(vm, left - 1)

    assert world.prepares(countdown) == 1
    assert world.prepares(countdown) == 0


FILES: dict[str, Callable[[Path], object]] = {
    "a file's content": lambda data: (data / "schema.sql").write_text("create table b;\n"),
    "a file's name": lambda data: (data / "schema.sql").rename(data / "other.sql"),
    "a file that runs": lambda data: (data / "run.sh").chmod(0o755),
    "another file": lambda data: (data / "more.sql").write_text(""),
    "a file that is gone": lambda data: (data / "run.sh").unlink(),
    "a file further down": lambda data: _deep(data),
    "an empty directory": lambda data: (data / "empty").mkdir(),
    "a link that leads nowhere": lambda data: (data / "link").symlink_to("nowhere"),
    "where one file ends": lambda data: _moved_border(data),
}


def _deep(data: Path) -> None:
    (data / "a" / "b").mkdir(parents=True)
    (data / "a" / "b" / "c").write_text("c")


def _moved_border(data: Path) -> None:
    # The same bytes one after the other, in one file less.
    both = (data / "run.sh").read_bytes() + b"schema.sql\0" + (data / "schema.sql").read_bytes()
    (data / "run.sh").write_bytes(both)
    (data / "schema.sql").unlink()


@pytest.mark.parametrize("change", FILES)
def test_what_a_path_holds_prepares_anew(world: World, change: str) -> None:
    assert world.prepares(prepare, world.data) == 1
    assert world.prepares(prepare, world.data) == 0
    FILES[change](world.data)
    assert world.prepares(prepare, world.data) == 1


def test_a_single_file_and_where_it_lies(world: World) -> None:
    file = world.data / "schema.sql"
    world.prepares(prepare, file)
    moved = file.rename(world.directory / "schema.sql")
    assert world.prepares(prepare, moved) == 0  # the same content elsewhere
    moved.write_text("other")
    assert world.prepares(prepare, moved) == 1


def test_an_empty_directory_can_be_depended_on(world: World) -> None:
    empty = world.directory / "empty"
    empty.mkdir()
    world.prepares(prepare, empty)
    assert world.prepares(prepare, empty) == 0
    (empty / "file").write_text("x")
    assert world.prepares(prepare, empty) == 1


def test_what_can_not_be_read_or_has_no_source_is_said(world: World, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere, which a template depends on, can't be read"):
        world.prepares(prepare, tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="has no source"):
        world.prepares(prepare, len)
    with pytest.raises(SettingsError, match="has no source"):
        world.prepares(eval("lambda vm: None"))


def test_what_a_prepare_function_raises_is_raised_and_nothing_is_kept(world: World) -> None:
    def broken(_: Machine) -> None:
        raise RuntimeError("no such table")

    with world.run() as run:
        with pytest.raises(RuntimeError, match="no such table"):
            run.prepared(broken)
        assert run.workshop.ended[-1] is run.workshop.cloned[-1]
        with pytest.raises(RuntimeError, match="no such table"):
            run.prepared(broken)
    assert world.prepares(prepare) == 1


def test_a_machine_that_can_not_be_frozen_is_not_prepared(world: World) -> None:
    with world.run() as run:
        run.workshop.blocker = "a share"
        assert isinstance(run.prepared(prepare), Unfreezable)
        assert run.workshop.cloned == []
