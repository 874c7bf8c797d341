"""What a run's VMs came to: counted once, told by xdist's workers, shown after the tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_nixvm.flake.build import Override
from pytest_nixvm.fleet import Fleet
from pytest_nixvm.guest import waking
from pytest_nixvm.report import terminal
from pytest_nixvm.report.account import Account
from pytest_nixvm.run import Run
from pytest_nixvm.settings import Settings
from pytest_nixvm.transcript import Transcript


def machine(name: str = "dev-vm", **more: Any) -> Any:
    """A machine that was booted in 9.04 s, unless told otherwise."""
    overrides = (Override("services.qemuGuest.enable", "true", "the plugin asks the agent"),)
    values: dict[str, Any] = {
        "name": name,
        "build": SimpleNamespace(name=name, overrides=overrides, evaluated=2.0, built=3.0),
        "template": None,
        "woken_in": 0.0,
        "boots": [SimpleNamespace(seconds=9.04, failed_units=())],
        "spec": SimpleNamespace(accelerator=SimpleNamespace(name="tcg")),
        "frozen": False,
        "commands_note": "",
        "output": Path(f"/out/{name}-0"),
        "transcript": Transcript(),
    }
    return SimpleNamespace(**(values | more))


def clone(seconds: float, **more: Any) -> Any:
    template = SimpleNamespace(facts={"entropy": "vmgenid"})
    values: dict[str, Any] = {"template": template, "woken_in": seconds, "boots": []}
    return machine(**(values | more))


class Reporter:
    """Takes what pytest's reporter prints."""

    verbosity = 0

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.yellow: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(f"== {title}")

    def line(self, text: str, **markup: bool) -> None:
        self.lines.append(text)
        if markup.get("yellow"):
            self.yellow.append(text)


def shown(account: Account) -> Reporter:
    reporter = Reporter()
    run: Any = SimpleNamespace(
        account=account, is_worker=False, settings=SimpleNamespace(fidelity=False)
    )
    terminal.summary(reporter, run)  # type: ignore[arg-type]
    return reporter


def test_a_template_and_its_clones() -> None:
    account = Account()
    account.add(machine(frozen=True))
    for seconds in (0.2, 0.3, 0.9):
        account.add(clone(seconds))

    said = shown(account)

    assert said.lines == [
        "== nixvm",
        "dev-vm (tcg): evaluated in 2.0 s, built in 3.0 s, booted in 9.0 s, frozen; "
        "output: /out/dev-vm-0",
        "dev-vm: 3 clones, ready after 0.30 s (median)",
        "dev-vm was not as configured: services.qemuGuest.enable = true "
        "(the plugin asks the agent)",
    ]
    assert said.yellow == said.lines[-1:]


def test_clones_of_a_template_of_an_earlier_run() -> None:
    account = Account()
    account.add(clone(0.25))
    assert shown(account).lines[1] == "dev-vm: 1 clone, ready after 0.25 s (median)"


def test_spares_are_told_in_milliseconds() -> None:
    account = Account()
    account.add(clone(0.052))
    assert "dev-vm: 1 clone, ready after 52 ms (median)" in shown(account).lines
    account.cloned["dev-vm"] = [0.0003]
    assert "dev-vm: 1 clone, ready after less than 1 ms (median)" in shown(account).lines


def test_a_clone_that_was_booted_once_more_has_both_lines() -> None:
    account = Account()
    account.add(clone(0.2, boots=[SimpleNamespace(seconds=5.0, failed_units=("a.service",))]))
    lines = shown(account).lines
    assert "booted in 5.0 s" in lines[1]
    assert lines[2] == "    failed units: a.service"
    assert "1 clone" in lines[3]


def test_a_clone_that_never_woke_makes_the_others_no_quicker() -> None:
    account = Account()
    account.add(clone(0.4))
    account.add(clone(0.0))
    assert "dev-vm: 1 clone, ready after 0.40 s (median)" in shown(account).lines
    only = Account()
    only.add(clone(0.0))
    assert not [line for line in shown(only).lines if "clone" in line]


def test_why_a_machine_has_no_template() -> None:
    account = Account(unfreezable={"dev-vm": "the 9p share 'home' (mount it elsewhere)"})
    account.add(machine())
    said = shown(account)
    [line] = [line for line in said.lines if "frozen" in line]
    assert line == (
        "dev-vm: each test booted a VM of its own, for it can't be frozen: "
        "the 9p share 'home' (mount it elsewhere)"
    )
    assert line in said.yellow


def test_clones_that_may_draw_the_same_random_numbers_are_named_once() -> None:
    template = SimpleNamespace(facts={"entropy": waking.NONE})
    account = Account()
    account.add(clone(0.2, template=template))
    other = Account()
    other.add(clone(0.2, template=template))
    account.hear(other.told())
    [line] = [line for line in shown(account).lines if "random" in line]
    assert line.startswith("dev-vm: its clones may draw the same random numbers")


def test_evaluation_and_build_are_told_with_the_first_vm_only() -> None:
    account = Account()
    account.add(machine())
    account.add(machine())
    lines = [line for line in shown(account).lines if "booted" in line]
    assert ["evaluated" in line for line in lines] == [True, False]


def test_nothing_is_said_where_there_was_no_vm() -> None:
    assert shown(Account()).lines == []


def test_workers_tell_plain_data_that_adds_up() -> None:
    gateway = pytest.importorskip("execnet.gateway_base")
    here, there = Account(), Account()
    here.add(machine(frozen=True))
    here.add(clone(0.2))
    there.add(clone(0.4))
    there.add(clone(0.1, name="web"))
    there.add(machine("web", output=Path("/out/web-0")))
    there.unfreezable["mail"] = "a TPM"
    there.kept.append(["mail is left running", "  ssh …"])

    # As xdist sends it.
    here.hear(gateway.loads(gateway.dumps(there.told())))

    assert here.cloned == {"dev-vm": [0.2, 0.4], "web": [0.1]}
    assert [each["name"] for each in here.booted] == ["dev-vm", "web"]
    assert here.unfreezable == {"mail": "a TPM"}
    assert here.kept == [["mail is left running", "  ssh …"]]
    assert set(here.overrides) == {"dev-vm", "web"}
    assert here.shows(Path("/out/web-0"))
    assert not here.shows(Path("/out/web-1"))
    assert "dev-vm: 2 clones, ready after 0.30 s (median)" in shown(here).lines


def test_a_run_hears_its_workers_and_those_that_died_have_told_nothing(tmp_path: Path) -> None:
    controller, worker = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    worker.account.add(clone(0.2))
    controller.hear(worker.told())
    controller.hear(None)
    assert controller.account.cloned == {"dev-vm": [0.2]}


def make_run(directory: Path) -> Run:
    settings = Settings.make(cache=str(directory / "cache"), output=str(directory / "out"))
    config: Any = SimpleNamespace(
        pluginmanager=SimpleNamespace(hasplugin=lambda _: False, getplugin=lambda _: None),
        option=SimpleNamespace(verbose=0),
    )
    return Run(config, settings)


@pytest.mark.parametrize("keep", ["never", "failed"])
def test_a_vm_that_is_there_at_the_end_is_counted_once(tmp_path: Path, keep: str) -> None:
    run = make_run(tmp_path)
    fleet = run.__dict__["fleet"] = Fleet(run.settings)
    fleet.on_end = run._ended
    fleet.__dict__["_workshop"] = SimpleNamespace(clear=lambda _: None, close=lambda: None)
    left = machine(output=tmp_path / "vm", leave_running=lambda: None)
    fleet.started.append(left)
    if keep == "failed":
        fleet._left_running.append(left)

    run.close()
    run.close()

    assert len(run.account.booted) == 1
