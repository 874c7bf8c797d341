"""`nixvm list` and `nixvm build` on tiny flakes, with real nix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _documented import documented
from _flake import OPTIONS, git, machine, needs_nix, write_flake

from pytest_nixvm import tested
from pytest_nixvm.cli import main
from pytest_nixvm.deploy.result import Result

pytestmark = needs_nix

VM = "{ vm.enable = true; }"
THROWS = '{ vm.enable = throw "broken"; }'
NO_BUILD = '{ test.build = "exit 3"; }'


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)


@pytest.fixture
def flake(tmp_path) -> Path:
    body = machine("web", "web") + machine("dev-vm", "dev-vm", VM) + machine("bad", "bad", THROWS)
    return write_flake(tmp_path / "config", body + machine("red", "red", NO_BUILD))


@pytest.fixture
def run(tmp_path, flake, capsys):
    """Return a function that runs `nixvm` on the flake: status, stdout, stderr."""

    def run(name: str, *words: str) -> tuple[int, str, str]:
        more = [word for option in OPTIONS for word in ("--nix-option", *option)]
        status = main(
            [name, "--flake", str(flake), "--cache", str(tmp_path / "cache"), *more, *words]
        )
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


def test_list_tells_machines_apart(run):
    status, out, _ = run("list")
    assert status == 0
    header, *rows = out.splitlines()
    assert header.split()[0] == "machine"
    kinds = {row.split()[0]: row.split()[1] for row in rows}
    assert kinds == {"web": "physical", "dev-vm": "vm", "bad": "?", "red": "physical"}
    assert all("not tested" in row for row in rows)


def test_what_is_written_for_scripts_is_documented(run):
    [first, *_] = json.loads(run("list", "--json")[1])
    assert first.keys() == documented("`nixvm list`")
    assert first["tests"].keys() == documented("… its `tests`")
    [built] = json.loads(run("build", "web", "--json")[1])
    assert built.keys() == documented("`nixvm build`")
    deployed = Result("web", "host", "committed", "/old", "/new", "7")
    assert deployed.to_json().keys() == documented("`nixvm deploy`")
    status, out, err = run("build", "dev-mv", "--json")
    assert (status, out, err.count("nixvm: /")) == (2, "", 1)


def test_list_asks_nix_once_until_something_changes(run, flake):
    assert "Evaluating" in run("list")[2]
    assert "Evaluating" not in run("list")[2]
    text = (flake / "flake.nix").read_text()
    (flake / "flake.nix").write_text(text.replace(THROWS, VM))
    assert {each["name"]: each["kind"] for each in json.loads(run("list", "--json")[1])} == {
        "web": "physical",
        "dev-vm": "vm",
        "bad": "vm",
        "red": "physical",
    }


def test_list_shows_who_can_not_be_tested(tmp_path, run, flake):
    (flake / "flake.nix").write_text(
        (flake / "flake.nix").read_text().replace("outputs", "outputs", 1).replace(
            'nixosConfigurations."web" = nixosSystem {',
            'darwinConfigurations.mac = { };\n'
            'nixosConfigurations."web" = nixosSystem { system = "riscv64-linux";',
        )
    )  # fmt: skip
    found = {each["name"]: each for each in json.loads(run("list", "--json")[1])}
    assert found["mac"]["kind"] == "darwin"
    assert found["mac"]["testable"] is False
    assert "riscv64-linux" in found["web"]["why"]
    assert "no: it is for riscv64-linux" in run("list")[1]


def test_list_knows_the_last_tests(run, flake):
    def tests(*words: str) -> dict[str, str]:
        found = json.loads(run("list", "--json", *words)[1])
        return {each["name"]: each["tests"]["verdict"] for each in found}

    system = run("build", "web", "--toplevel")[1].strip()
    tested.Tested().add(system, machine="web", flake=str(flake), outcomes={"t::a": "passed"})
    assert tests() == {"web": "passed", "dev-vm": "none", "bad": "none", "red": "none"}
    assert tests("--tested")["web"] == "passed"
    tested.Tested().add(system, machine="web", flake=f"{flake}#web", outcomes={"t::a": "failed"})
    assert tests()["web"] == "failed"
    tested.Tested().add(system, machine="web", flake=f"{flake}#web", outcomes={"t::a": "passed"})

    (flake / "flake.nix").write_text(
        (flake / "flake.nix").read_text().replace('hostName = "web"', 'hostName = "other"')
    )
    assert tests()["web"] == "passed"  # of the system that was tested last
    assert tests("--tested")["web"] == "none"


def test_build_prints_the_start_script_and_nothing_else(run, flake):
    status, out, err = run("build", "dev-vm", "web")
    assert status == 0
    first, second = map(Path, out.splitlines())
    assert (first.name, second.name) == ("run-dev-vm-vm", "run-web-vm")
    assert first.is_file()
    assert "dev-vm: nothing differs from its own configuration." in err
    assert git(flake, "status", "--porcelain") == ""


def test_build_says_what_differs(run, flake):
    text = (flake / "flake.nix").read_text()
    off = "{ virtualisation.vmVariant.services.qemuGuest.enable = false; }"
    (flake / "flake.nix").write_text(text.replace(VM, off))
    _, out, err = run("build", "dev-vm")
    assert "services.qemuGuest.enable = true" in err
    assert len(out.splitlines()) == 1
    [built] = json.loads(run("build", "dev-vm", "--json")[1])
    assert built["overrides"][0]["option"] == "services.qemuGuest.enable"
    assert built["path"] == out.strip()


def test_build_of_the_real_system(run, tmp_path):
    link = tmp_path / "result"
    status, out, _ = run("build", "web", "--toplevel", "--out-link", str(link), "--json")
    [built] = json.loads(out)
    assert status == 0
    assert built["kind"] == "toplevel"
    assert link.readlink() == Path(built["output"])
    assert (link / "what").read_text() == "agent off\n"  # none of the VM's settings
    roots = (tmp_path / "cache/roots").glob("web-*")
    assert built["output"] in [str(root.readlink()) for root in roots]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["dev-mv"], 2, "dev-vm"),
        ([], 2, "Missing argument"),
        (["web", "--toplevel", "--image", "raw"], 2, "--toplevel and --image are two things"),
        (["web", "dev-vm", "--out-link", "x"], 2, "--out-link is for one machine"),
        (["web", "--out-link", "/"], 2, "--out-link /: that exists, and is no link"),
        (["web", "--out-link", "/nowhere/x"], 2, "there is no directory /nowhere"),
        (["red"], 1, "exit code 3"),
        (["red", "--toplevel"], 1, "exit code 3"),
    ],
)
def test_a_mistake_is_told_in_one_message(run, words, status, says):
    got, out, err = run("build", *words)
    assert (got, out) == (status, "")
    assert says in err
    assert sum(line.startswith("nixvm: ") for line in err.splitlines() if "…" not in line) >= 1


def test_list_of_one_machine_evaluates_no_other(run, flake):
    text = (flake / "flake.nix").read_text()
    (flake / "flake.nix").write_text(text.replace(THROWS, "{ vm.enable = 1 + [ ]; }"))
    status, out, err = run("list", "--flake", f"{flake}#dev-vm")
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["dev-vm", "vm"]]
    assert "failed" not in err

    # What Nix can't catch hides no other.
    _, out, err = run("list")
    kinds = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert kinds == {"web": "physical", "dev-vm": "vm", "bad": "?", "red": "physical"}


@pytest.mark.parametrize("name", ["NIXVM_OVERRIDE_INPUT", "NIXVM_NIX_OPTION"])
def test_a_variable_with_half_a_pair_is_a_mistake(run, monkeypatch, name):
    monkeypatch.setenv(name, "sandbox false nixpkgs")
    status, out, err = run("list")
    assert (status, out) == (2, "")
    assert f"{name} should be names and values in turn: 'nixpkgs'." in err
