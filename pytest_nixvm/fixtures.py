"""The fixtures: a VM, its channels, and the session they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nixvm.errors import NixvmError, NothingToTestError, SettingsError
from pytest_nixvm.items import TEMPLATE_OF, marked_machines
from pytest_nixvm.run import RUN, fail
from pytest_nixvm.secrets import Secrets
from pytest_nixvm.snapshots import check_prepare

if TYPE_CHECKING:
    from pytest_nixvm.change import Change
    from pytest_nixvm.fleet import Fleet
    from pytest_nixvm.guest.agent import Agent
    from pytest_nixvm.guest.serial import Serial
    from pytest_nixvm.guest.ssh import Ssh
    from pytest_nixvm.machine import Machine
    from pytest_nixvm.qemu.monitor import Monitor


@pytest.fixture(scope="session")
def nixvm(request: pytest.FixtureRequest) -> Fleet:
    """The session: `nixvm.machines` is what may be tested, `nixvm.start("name")` boots a VM."""
    return request.config.stash[RUN].fleet


@pytest.fixture(scope="session")
def nixvm_machine(request: pytest.FixtureRequest) -> str:
    """The name of the machine that this test runs on."""
    return str(request.param)


def template(
    machine: str | None = None,
    *,
    depends: Sequence[object] = (),
    memory: int | None = None,
    cores: int | None = None,
    network: str | None = None,
) -> Callable[[Callable[[Machine], object]], Any]:
    """Make a fixture of a function that prepares a machine: a clone of that for each test.

        @pytest_nixvm.template("db-server", depends=(Path("schema.sql"),))
        def with_data(vm):
            vm.copy_from_host("schema.sql", "/tmp/schema.sql")
            vm.succeed("psql -f /tmp/schema.sql")

        def test_query(with_data):
            assert with_data.succeed("psql -tc 'select 1'")

    The machine is prepared and frozen once, and kept between runs until it, the function's source
    or any of `depends` changes (a path is what it holds, a function its source). Without `machine`
    the test runs once for each selected one. `memory` is in MiB. Raises `SettingsError` for a
    function that can't prepare a machine.
    """
    if not isinstance(machine, str | None):
        raise SettingsError(
            "@pytest_nixvm.template takes a machine's name in brackets, or empty ones: "
            "@pytest_nixvm.template()"
        )

    def decorate(prepare: Callable[[Machine], object]) -> Any:
        check_prepare(prepare)

        def clone(request: pytest.FixtureRequest) -> Iterator[Machine]:
            run = request.config.stash[RUN]
            name = machine or request.getfixturevalue("nixvm_machine")
            try:
                snapshot = run.fleet.template(
                    name, prepare, depends=depends, memory=memory, cores=cores, network=network
                )
                run.has_snapshot(request.fixturename or "", snapshot)
                vm = snapshot.start()
            except NixvmError as error:
                fail(error)
            with vm:
                yield vm

        def clone_of_each(
            request: pytest.FixtureRequest,
            nixvm_machine: str,  # noqa: ARG001 - makes a test of each machine
        ) -> Iterator[Machine]:
            yield from clone(request)

        made = clone if machine is not None else clone_of_each
        made.__doc__ = prepare.__doc__
        setattr(made, TEMPLATE_OF, machine)
        return pytest.fixture(name=prepare.__name__)(made)

    return decorate


@pytest.fixture
def vm(request: pytest.FixtureRequest, nixvm_machine: str) -> Machine:
    """The test's machine: booted, ready, shared with others as the isolation says."""
    return _acquire(request, nixvm_machine)


@pytest.fixture
def change(request: pytest.FixtureRequest, nixvm_machine: str) -> Change:
    """A change of the test's machine: the generation that --nixvm-from names runs.

    The candidate is the flake as it is. The machine is the test's own. Without --nixvm-from, and
    where both are the same, the test is skipped with that reason.
    """
    try:
        return request.config.stash[RUN].change(request.node, nixvm_machine)
    except NothingToTestError as error:
        # At the test's place; pytest.skip() would name this line as the reason's.
        raise pytest.skip.Exception(str(error), _use_item_location=True) from None
    except NixvmError as error:
        fail(error)


@pytest.fixture
def machines(request: pytest.FixtureRequest) -> Mapping[str, Machine]:
    """Several machines by name, each ready: those that the nixvm marker names."""
    names = marked_machines(request.node)
    if not names:
        pytest.fail('The machines fixture needs @pytest.mark.nixvm("NAME", …).', pytrace=False)
    return {name: _acquire(request, name) for name in names}


@pytest.fixture
def ssh(request: pytest.FixtureRequest, vm: Machine) -> Ssh:
    """SSH to the test's machine, as the marker's `user` or whoever may log in.

    Where nobody may, the test fails with the reason.
    """
    try:
        connection = vm.ssh_as(request.config.stash[RUN].request(request.node).user)
        _ = connection.client  # logs in now: a test that asks for ssh should start with it open
    except NixvmError as error:
        fail(error)
    return connection


@pytest.fixture
def serial(vm: Machine) -> Serial:
    """The serial console of the test's machine."""
    return vm.serial


@pytest.fixture
def agent(vm: Machine) -> Agent:
    """The guest agent of the test's machine."""
    return vm.agent


@pytest.fixture
def qmp(vm: Machine) -> Monitor:
    """QEMU's monitor of the test's machine."""
    return vm.qmp


@pytest.fixture
def nixvm_secrets(vm: Machine) -> Secrets:
    """The secrets of the test's machine: what it was given, and `nixvm_secrets["name"] = "value"`.

    For another machine: `pytest_nixvm.Secrets(machine)`.
    """
    return Secrets(vm)


@pytest.fixture
def nixvm_output(request: pytest.FixtureRequest) -> Path:
    """The test's own folder in the run's output: what a test puts there stays."""
    run = request.config.stash[RUN]
    return run.case(request.node).place(run.fleet.out)


def _acquire(request: pytest.FixtureRequest, name: str) -> Machine:
    try:
        return request.config.stash[RUN].acquire(request.node, name)
    except NixvmError as error:
        fail(error)
