"""The command `nixvm deploy`: what it refuses, how it says so, and how it may be ended."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from _deploy_host import SWITCH
from _deploy_host import Host as FakeHost
from _documented import documented
from _flake import OPTIONS, Workshop, machine, needs_nix, write_flake
from _guest import until

from pytest_nixvm.cli import deploy, main
from pytest_nixvm.errors import MachineError
from pytest_nixvm.tested import Tested as Records  # or pytest takes it for a test

pytestmark = needs_nix


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeHost(tmp_path / "host")
    for name in ("R", "NIXVM_DEPLOY_ROOT", "PATH"):
        monkeypatch.setenv(name, fake.env[name])
    monkeypatch.setattr(deploy, "Host", partial(deploy.Host, script=fake.script))
    return fake


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    workshop = Workshop(tmp_path)
    write_flake(tmp_path / "config", machine("server", workshop.host))
    return workshop


@pytest.fixture
def nixvm(workshop, fake, capsys):
    def call(*words, to="ssh://root@host"):
        options = [word for pair in OPTIONS for word in ("--nix-option", *pair)]
        place = ("--flake", str(workshop.tmp / "config"), "--cache", str(workshop.cache))
        status = main(["deploy", "--to", to, *place, *options, *words])
        return status, capsys.readouterr().err

    return call


def record(workshop, outcome):
    toplevel = workshop.flake(workshop.tmp / "config").real_toplevel("server")
    Records().add(toplevel, machine="server", flake=".", outcomes={"t.py::test": outcome})
    return toplevel


def test_untested_system_is_refused_before_anything_is_built(nixvm, workshop, fake):
    status, said = nixvm("server")
    assert status == 2
    assert "server as it is now was not tested" in said
    assert "--nixvm-machine=server" in said
    assert not list((workshop.cache / "roots").glob("server-*"))
    assert not (fake.root / "ssh").exists()


def test_system_whose_tests_failed_is_refused_and_they_are_named(nixvm, workshop):
    record(workshop, "failed")
    status, said = nixvm("server")
    assert status == 2
    assert "t.py::test" in said
    [file] = (workshop.tmp / "state/pytest-nixvm/tested").glob("*.json")
    assert str(file) in said


def test_changed_configuration_is_another_system(nixvm, workshop):
    record(workshop, "passed")
    write_flake(
        workshop.tmp / "config",
        machine("server", workshop.host, '{ test.build = "echo more"; }'),
        tracked=False,
    )
    status, said = nixvm("server")
    assert (status, "was not tested" in said) == (2, True)


def test_tested_system_is_built_as_the_real_machine_has_it(nixvm, workshop, fake):
    toplevel = record(workshop, "passed")
    fake.behave("unreachable", "")
    status, said = nixvm("server")
    assert status == 1
    assert "No connection to ssh://root@host: ssh: connect to host: Connection timed out" in said
    roots = (workshop.cache / "roots").glob("server-*")
    assert toplevel in [str(root.readlink()) for root in roots]
    assert (Path(toplevel) / "what").read_text() == "agent off\n"


def test_force_wants_a_reason_and_goes_on(nixvm, fake):
    assert nixvm("server", "--force", " ") == (
        2,
        "nixvm: --force wants a reason, which the host's journal keeps.\n",
    )
    (fake.root / "etc/NIXOS").unlink()
    status, said = nixvm("server", "--force", "a fire")
    assert status == 1
    assert "server is deployed by force: not tested." in said
    assert "ssh://root@host is no NixOS" in said


def test_force_leaves_the_record_to_its_machine_and_flake(nixvm, workshop, fake, monkeypatch):
    toplevel = record(workshop, "failed")
    monkeypatch.setattr(deploy, "Deploy", lambda *_: (_ for _ in ()).throw(MachineError("later")))
    with monkeypatch.context() as m:
        m.chdir(workshop.tmp / "config")
        assert nixvm("server@qcow2", "--force", "a fire", "--flake", ".")[1].endswith("later\n")
    kept = Records().record(toplevel)
    assert (kept.machine, kept.flake) == ("server", str(workshop.tmp / "config"))
    assert kept.forced[0]["reason"] == "a fire"


@pytest.mark.parametrize(
    ("words", "to", "said"),
    [
        (("server",), "host", "should be ssh://root@HOST"),
        (("sever",), "ssh://host", "Did you mean"),
        (("server", "--timeout", "0"), "ssh://host", "--timeout"),
        (("server", "--timeout", "nan"), "ssh://host", "--timeout"),
        (("server", "--switch-timeout", "1e9"), "ssh://host", "--switch-timeout"),
        (("server", "--boot=x"), "ssh://host", "--boot"),
    ],
)
def test_mistakes_are_one_message(nixvm, words, to, said):
    status, text = nixvm(*words, to=to)
    assert status == 2
    assert said in text
    assert "Traceback" not in text


def test_system_that_cannot_be_built_is_told_by_its_log(nixvm, workshop):
    write_flake(
        workshop.tmp / "config",
        machine("server", workshop.host, '{ test.build = "echo it is broken; exit 1"; }'),
        tracked=False,
    )
    status, said = nixvm("server", "--force", "a fire")
    assert status == 1
    assert "it is broken" in said


# --- a process of its own, to the end; what is "copied" is in the same store ----------------------


PROCESS = """
import sys
from functools import partial
from pytest_nixvm.cli import deploy, main
deploy.Host = partial(deploy.Host, script=sys.argv.pop(1))
sys.exit(main())
"""


@pytest.fixture
def begin(workshop, fake, monkeypatch):
    """Begin to deploy a system that can be switched to."""
    switch = workshop.tmp / "switch-to-configuration"
    fake.program(switch, SWITCH)
    into = f"mkdir $out/bin; cp {switch} $out/bin/"
    write_flake(
        workshop.tmp / "config",
        machine("server", workshop.host, f"""{{ test.build = "trap '{into}' EXIT"; }}"""),
        tracked=False,
    )
    copies = 'for word; do [ "$word" != copy ] || exit 0; done'
    # Behind the host's own programs, which have a nix-store, too.
    ours = workshop.tmp / "bin"
    ours.mkdir()
    nix = shutil.which("nix")
    fake.program(ours / "nix", f'{copies}\nexec {nix} "$@"')
    fake.program(ours / "nix-store", f'exec {nix}-store "$@"')
    monkeypatch.setenv("PATH", fake.env["PATH"].replace(":", f":{ours}:", 1))
    toplevel = record(workshop, "passed")
    begun = []

    def begin(*words):
        options = [word for pair in OPTIONS for word in ("--nix-option", *pair)]
        place = ("--flake", str(workshop.tmp / "config"), "--cache", str(workshop.cache))
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", PROCESS, fake.script, "deploy", "server"),
                *("--to", "ssh://root@host", *words, *place, *options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process

    begin.toplevel = toplevel
    yield begin
    for process in begun:
        process.kill()
        process.communicate()
    fake.stop()


def test_tested_system_is_deployed_and_told_for_scripts(begin, fake):
    out, err = begin("--json", "--check", "true").communicate(timeout=60)
    assert out, err
    result = json.loads(out)
    assert (result["outcome"], result["generation"]) == ("committed", "2"), err
    assert result["new"] == begin.toplevel
    assert {Path(begin.toplevel).name} == {*fake.runs()}


def test_system_that_would_fill_the_host_is_not_copied(begin, fake):
    fake.behave("lacks", Path(begin.toplevel).name)
    little = "printf 'Filesystem 1024-blocks Used Available\\n/dev/sda 9 9 262144 1%% /\\n'"
    fake.program(fake.root / "bin" / "df", little)
    process = begin()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        "has 256 MiB free in /nix/store, and what it lacks of the system (1 store path) takes 1 MiB"
        in err
    )
    assert fake.runs() == ("old", "old", "old")
    assert not fake.rooted


def test_dry_run_changes_nothing(begin, fake, workshop):
    process = begin("--dry-run")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"{begin.toplevel} (1 test passed" in out
    assert "Nothing was changed" in out
    assert fake.runs() == ("old", "old", "old")


def test_dry_run_that_fails_says_so(begin, fake):
    name = Path(begin.toplevel).name
    fake.behave(f"{name}.dry-activate", "echo pre-switch check failed; exit 1")
    process = begin("--dry-run")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "pre-switch check failed" in out) == (1, True), err
    assert "dry run on ssh://root@host failed: exit status 1." in err

    process = begin("--dry-run", "--json")
    out, err = process.communicate(timeout=60)
    told = json.loads(out)
    assert (process.returncode, told["ok"]) == (1, False), err
    assert told.keys() == documented("`nixvm deploy --dry-run`")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)]
)
@pytest.mark.parametrize("when", ["activating", "waiting"])
def test_command_that_is_ended_leaves_the_old_system(begin, fake, number, status, when):
    if when == "activating":
        name = Path(begin.toplevel).name
        fake.behave(f"{name}.test", 'ln -sfn "$me" "$R/run/current-system"; sleep 2')
    # Only the killed one can't ask the host to go back.
    timeout = "1" if number == signal.SIGKILL else "60"
    process = begin("--timeout", timeout, "--check", "sleep 3; false")
    until(fake.state, "the deployment, after an evaluation and a build", timeout=60)
    fake.until(when)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert fake.ended(timeout=40) == "rolled-back"
    assert fake.runs() == ("old", "old", "old")
    if status == 130:
        assert "was not switched to server: it was interrupted" in err
