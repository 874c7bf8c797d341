"""Clones, spares, and the other ways to a pristine machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.machines import MACHINE
from benchmarks.side_by_side import Contender
from pytest_nixvm import Fleet, Machine
from pytest_nixvm.errors import NixvmError
from pytest_nixvm.qemu.launch import start
from pytest_nixvm.qemu.running import Qemu
from pytest_nixvm.qemu.template import Template, power_on
from pytest_nixvm.settings import MachineRequest
from pytest_nixvm.spares import Want

LONG = 120.0


class Lab:
    """A fleet with a template of the machine, and what contenders do with them.

    It uses what `Fleet` itself uses. `vm` is a clone that lasts, `turn` that of the contender whose
    turn it is.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.vm = fleet.start(MACHINE)
        if self.vm.template is None:
            raise SystemExit(f"{MACHINE} can't be frozen: {fleet.unfreezable.get(MACHINE)}")
        self.template = self.vm.template
        self.request: MachineRequest = fleet._request()
        self.workshop, self.spares = fleet._workshop, fleet._spares
        self.turn: Machine | None = None
        self.has_spares = (os.cpu_count() or 1) > 1
        self._bare: Machine | None = None
        self._argv: tuple[str, ...] = ()
        for _ in range(3):
            self.vm.run("true", check=True)
            self.vm.ssh.run("true", check=True)

    def make(self, template: Template | None = None) -> Machine:
        """Return a clone that is off."""
        self.turn = self.fleet._cloner(MACHINE, self.request)(template or self.template)
        return self.turn

    def current(self) -> Machine:
        """Return the machine of the contender whose turn it is."""
        assert self.turn is not None
        return self.turn

    def end(self) -> None:
        """End the machine of the contender whose turn it is."""
        if self.turn is not None:
            self.fleet.end(self.turn)
            self.turn = None

    def start(self) -> Machine:
        """Start a machine as a test does: it is a spare if there is one, else a clone."""
        self.turn = self.fleet.start(MACHINE)
        return self.turn

    def start_and_run(self) -> None:
        """Start a machine as a test does, and run a command in it."""
        self.start().run("true", check=True)

    def expect(self, users: tuple[str | None, ...] = ()) -> Want:
        """Have a spare made; it is ready when the `done` of what this returns is set."""
        make = partial(self.fleet._cloner(MACHINE, self.request), self.template)
        want = Want(self.template, make, users)
        self.spares.expect([want])
        return want

    def spare(self, users: tuple[str | None, ...] = ()) -> Want:
        """Have a spare made, and wait until it is ready."""
        want = self.expect(users)
        if not want.done.wait(LONG) or want.machine is None:
            raise SystemExit("No spare could be made.")
        return want

    def resting_spare(self) -> None:
        """Have a spare that nobody has taken for so long that it was paused."""
        want = self.spare()
        want.rests_at = None
        assert want.machine is not None
        want.machine.rest()

    # --- QEMU alone ----------------------------------------------------------------------------

    def bare(self, machine: Machine) -> Qemu:
        """Start the QEMU of a clone that is off: it loads nothing, its processors are stopped.

        It waits for a state, so it has not put kernel and firmware into its memory either.
        """
        timeout, shared = 30.0, (self.workshop.supervisor, self.workshop.io)
        if machine is not self._bare:
            # So that its disks and directories are there.
            qemu = power_on(
                self.template, machine.spec, supervisor=shared[0], io=shared[1], timeout=timeout
            )
            qemu.kill()
            self._bare, self._argv = machine, (*qemu.argv, "-S")
        environment = {"PATH": os.environ.get("PATH", ""), "TMPDIR": str(machine.spec.scratch)}
        return start(
            machine.spec,
            self._argv,
            environment,
            supervisor=shared[0],
            io=shared[1],
            timeout=timeout,
        )


def contenders(lab: Lab) -> dict[str, Contender]:
    """Return what the figures of clones and spares are made of, by name."""
    qemu = _Bare(lab)

    def clone_to_agent() -> None:
        machine = lab.current()
        machine.load()
        on = machine._on
        assert on is not None
        on.qemu.resume()
        on.agent.ping(LONG)

    def clone_to_ready() -> None:
        lab.current().start()

    def round_trip() -> None:
        lab.vm.qemu.resume()
        on = lab.vm._on
        assert on is not None
        on.agent.ping(LONG)

    def start_with_ssh() -> None:
        lab.spare((None,))
        lab.start()

    found = {
        "qemu": Contender("QEMU to its first answer", qemu.run, after=qemu.end),
        "agent": Contender(
            "clone: QEMU's start to the agent's answer",
            clone_to_agent,
            before=lab.make,
            after=lab.end,
        ),
        "ready": Contender(
            "clone: QEMU's start to ready, clock set",
            clone_to_ready,
            before=lab.make,
            after=lab.end,
        ),
        "round trip": Contender(
            "cont and an agent round trip", round_trip, before=lambda: lab.vm.qemu.pause()
        ),
        "run": Contender("vm.run", lambda: lab.vm.run("true", check=True)),
        "ssh": Contender("exec on an open connection", lambda: lab.vm.ssh.run("true", check=True)),
    }
    if lab.has_spares:
        found |= {
            "spare": Contender(
                "spare: wait between two tests", lab.start, before=lab.spare, after=lab.end
            ),
            "resting spare": Contender(
                "spare that was paused: wait between two tests",
                lab.start,
                before=lab.resting_spare,
                after=lab.end,
            ),
            "spare's ssh": Contender(
                "spare: ssh, first exec",
                lambda: lab.current().ssh.run("true", check=True),
                before=start_with_ssh,
                after=lab.end,
            ),
        }
    return found


class _Bare:
    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._machine = lab.make()
        self._qemu: Qemu | None = None
        lab.bare(self._machine).kill()
        lab.turn = None

    def run(self) -> None:
        self._qemu = self._lab.bare(self._machine)

    def end(self) -> None:
        if self._qemu is not None:
            self._qemu.kill()


# --- the ways to a pristine machine ------------------------------------------------------------


def pristine(lab: Lab, every: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the ways to a pristine machine, to the first command's result, and what failed.

    Boots take part in each `every`th round only.
    """
    found: dict[str, Contender] = {}
    refused: dict[str, str] = {}
    if lab.has_spares:
        found["spare"] = Contender(
            "spare", lab.start_and_run, "cont, clock set", before=lab.spare, after=lab.end
        )
    found["clone"] = Contender("clone", lab.start_and_run, "RAM file, copy on write", after=lab.end)
    others: dict[str, Callable[[Lab], Contender]] = {"migrate": _migrate, "loadvm": _loadvm}
    for name, make in others.items():
        try:
            found[name] = make(lab)
        except NixvmError as error:
            refused[name] = str(error)
    boot = Contender("boot on a fresh overlay", partial(_boot, lab))
    boot.after, boot.every = lab.end, every
    boot.note = f"the start script, {lab.workshop.accelerator(lab.vm.build).name}"
    found["boot"] = boot
    return found, refused


def _boot(lab: Lab) -> None:
    build = lab.fleet.build(MACHINE)
    lab.turn = machine = lab.workshop.make(build, lab.request)
    machine.start()
    machine.run("true", check=True)


def _migrate(lab: Lab) -> Contender:
    """A template with its memory in its state, which each clone reads whole."""
    directory = lab.workshop.scratch / "in-state"
    directory.mkdir()
    machine = lab.workshop.make(lab.fleet.build(MACHINE, freezable=True), lab.request)
    try:
        machine.start()
        template = machine.freeze(directory)
    finally:
        lab.workshop.clear(machine)
    size = _allocated(directory / "state") / 2**20

    def run() -> None:
        vm = lab.current()
        vm.start()
        vm.run("true", check=True)

    return Contender(
        "migrate from a file",
        run,
        f"{size:.0f} MiB of state",
        before=lambda: lab.make(template),
        after=lab.end,
    )


def _loadvm(lab: Lab) -> Contender:
    """A snapshot within the disks of a machine that runs on: a clone, for all of its are qcow2."""
    machine = lab.fleet.start(MACHINE)
    on = machine._on
    assert on is not None
    # Else memory that is mapped from a file might be left out.
    capability = {"capability": "x-ignore-shared", "state": False}
    machine.qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})
    on.shell.remembered()  # there is one shell, and it waits
    on.health.close()  # what comes is no reboot
    machine.qmp.hmp("savevm bench", timeout=LONG)

    def run() -> None:
        on.qemu.monitor.hmp("loadvm bench", timeout=LONG)
        on.shell.run(f"date -s @{time.time():.6f}", timeout=LONG, check=True)
        on.shell.run("true", timeout=LONG, check=True)

    run()
    return Contender("loadvm in place", run, "clock set, channels as they were")


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


# --- a test beside a spare that is being prepared ----------------------------------------------


def beside(lab: Lab, alone: Contender, prepared: Contender) -> None:
    """Run commands until a spare is ready, then as many without; append seconds per command."""
    want = lab.expect()
    count, began = 0, time.perf_counter()
    while not want.done.is_set():
        lab.vm.run("true", check=True)
        count += 1
    prepared.seconds.append((time.perf_counter() - began) / max(1, count))
    began = time.perf_counter()
    for _ in range(max(1, count)):
        lab.vm.run("true", check=True)
    alone.seconds.append((time.perf_counter() - began) / max(1, count))
    prepared.note = f"{count} commands"
    lab.spares.drop()
