"""pytest's hooks: options, which test runs on which machine, builds before tests, reports.

Order of a run: the settings are read when pytest is configured; the flake's machines are listed
(one evaluation) when the first test that needs one is collected; what the selected tests need is
built before the first of them runs; VMs boot when a test asks for one. A mistake of the user's on
that way is a `pytest.UsageError`: one message, exit status 4, no traceback.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING

import pytest

from pytest_nixvm import hookspecs
from pytest_nixvm.errors import UserError
from pytest_nixvm.fixtures import (
    agent,
    change,
    machines,
    nixvm,
    nixvm_machine,
    nixvm_output,
    nixvm_secrets,
    qmp,
    serial,
    ssh,
    vm,
)
from pytest_nixvm.options import OPTIONS
from pytest_nixvm.report import terminal
from pytest_nixvm.report.cases import shorten
from pytest_nixvm.report.session import Session
from pytest_nixvm.run import MACHINES, RUN, Run
from pytest_nixvm.settings import Settings

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

__all__ = [
    "agent",
    "change",
    "machines",
    "nixvm",
    "nixvm_machine",
    "nixvm_output",
    "nixvm_secrets",
    "qmp",
    "serial",
    "ssh",
    "vm",
]

MARKER = (
    "nixvm(*machines, isolation=None, memory=None, cores=None, network=None, boot_loader=None, "
    "user=None): run the test on these machines of the flake, each in a VM with these properties "
    "(memory in MiB); user is who the ssh fixture logs in as."
)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks that a conftest.py may implement."""
    pluginmanager.add_hookspecs(hookspecs)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register every option on the command line and in the ini file."""
    group = parser.getgroup("nixvm", "NixOS machines in VMs")
    for option in OPTIONS:
        if option.values == 0:
            group.addoption(option.flag, dest=option.ini, action="store_true", help=option.help)
            parser.addini(option.ini, option.help, default="")
            continue
        group.addoption(
            option.flag,
            dest=option.ini,
            action="append" if option.repeat else "store",
            nargs=option.values if option.values > 1 else None,
            metavar=option.metavar,
            help=option.help,
        )
        if option.repeat:
            parser.addini(option.ini, option.help, type="linelist", default=[])
        else:
            parser.addini(option.ini, option.help, default="")


def pytest_configure(config: pytest.Config) -> None:
    """Read the settings; nothing is evaluated yet."""
    config.addinivalue_line("markers", MARKER)
    try:
        ini_directory = config.inipath.parent if config.inipath else config.rootpath
        settings = Settings.read(config.getoption, config.getini, ini_directory)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error
    run = config.stash[RUN] = Run(config, settings)
    _take_checks(config, settings.check)
    if config.pluginmanager.hasplugin("pytest11.testinfra"):
        # For its own `host` fixture, --hosts=nixvm://NAME; our side is imported when needed.
        import testinfra.backend

        testinfra.backend.BACKENDS["nixvm"] = "pytest_nixvm.infra.NixvmBackend"
    if not run.is_worker:
        config.pluginmanager.register(Session(run), "nixvm-session")


def _take_checks(config: pytest.Config, every: bool) -> None:
    """Have checks collected: those that the command line names, all with --nixvm-check."""
    from pytest_nixvm.check_items import MARKER as CHECK_MARKER
    from pytest_nixvm.check_items import Collection, take_arguments

    config.addinivalue_line("markers", CHECK_MARKER)
    told = getattr(config, "workerinput", {}).get("nixvm_checks")
    if told is None:
        rest, wanted = take_arguments(config.args)
        told = {"wanted": wanted, "only": bool(wanted) and not rest}
        if wanted:
            config.args = rest
    if every or told["wanted"]:
        config.pluginmanager.register(Collection(**told), "nixvm-checks")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End every VM, also when the session did not come as far as its end."""
    run = config.stash.get(RUN, None)
    if run is not None:
        run.close()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """List the machines before xdist starts its workers, which are told them."""
    run = session.config.stash[RUN]
    if run.is_controller:
        run.for_worker()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is tested and how the guests will run."""
    return terminal.header(config.stash[RUN])


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Say which machines are not tested because they are unchanged."""
    return terminal.left_out(config.stash[RUN])


# --- collection ----------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a VM once for each machine it is meant for."""
    if "nixvm_machine" in metafunc.fixturenames:
        metafunc.config.stash[RUN].parametrize(metafunc)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out tests of machines that are not selected; stop at mistakes found on the way."""
    run = config.stash[RUN]
    gone = [item for item in items if not run.is_selected(item)]
    if gone:
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=gone)
    run.check(session, items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Build what the selected tests need before the first of them runs."""
    if not session.config.option.collectonly and not session.testsfailed:
        session.config.stash[RUN].prepare(session.items)
    return (yield)


# --- tests ---------------------------------------------------------------------------------------


def pytest_runtest_call(item: pytest.Item) -> None:
    """Prepare for the next test while this one runs."""
    item.config.stash[RUN].set_up()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Gather what a failed test's VMs have to say, before anything is torn down."""
    if call.excinfo is not None:
        shorten(call.excinfo)
    report = yield
    run = item.config.stash[RUN]
    if report.failed:
        run.failed(item, report)
    elif report.when == "call" and report.passed:
        run.passed(item)
    setattr(report, MACHINES, run.machines_of(item, failed=report.failed))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Note which test is under way; when it is over, end the VMs that no later test shares."""
    run = item.config.stash[RUN]
    run.begin(item, nextitem)
    try:
        return (yield)
    finally:
        # Not sooner: its fixtures may need them to the end, and so do the reports.
        run.leave(item, nextitem)
        run.forget(item)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End every VM; a worker tells the controller what it booted."""
    run = session.config.stash[RUN]
    run.close()
    run.finish(interrupted=session.exitstatus == pytest.ExitCode.INTERRUPTED)
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and run.nothing_changed:
        session.exitstatus = pytest.ExitCode.OK
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["nixvm"] = run.told()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was booted, how long that took, and where its output is."""
    terminal.summary(terminalreporter, config.stash[RUN])


# --- xdist: the controller evaluates and builds, its workers are told -----------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    """Tell a worker the flake's machines and the run's output directory."""
    node.workerinput["nixvm"] = node.config.stash[RUN].for_worker()
    checks = node.config.pluginmanager.getplugin("nixvm-checks")
    if checks is not None:
        node.workerinput["nixvm_checks"] = checks.told()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: WorkerController, ids: Iterable[str]) -> None:
    """Build what the collected tests need before a worker starts them."""
    node.config.stash[RUN].prepare_ids(ids)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController, error: object) -> None:  # noqa: ARG001 - the hook's
    """Take what a worker booted into the summary."""
    node.config.stash[RUN].hear(getattr(node, "workeroutput", {}).get("nixvm"))
