"""`nixvm init`: what it writes where, whose keys it takes, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from _documented import documented

from pytest_nixvm.cli import init, main

KEY = (
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl carol@laptop"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch) -> Path:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "carol")
    for name in ("SUDO_USER", "NIXVM_FLAKE"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return home


@pytest.fixture
def run(capsys):
    """Run `nixvm init`: status, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["init", *words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture
def mistake(run):
    """Run it with a mistake; return the one message, after which nothing is there that was not."""

    def mistake(*words: str) -> str:
        before = sorted(Path().rglob("*"))
        status, out, err = run(*words)
        assert (status, out) == (2, "")
        assert err.startswith("nixvm: ")
        assert err.count("\n") == 1
        assert sorted(Path().rglob("*")) == before
        return err

    return mistake


def users(directory: str = ".") -> str:
    return Path(directory, "lib", "users.nix").read_text()


def test_an_empty_directory_gets_a_whole_flake(run, home):
    (home / ".ssh" / "id_ed25519.pub").write_text(f"{KEY}\n")
    (home / ".ssh" / "id_ed25519-cert.pub").write_text("a certificate\n")

    status, out, err = run()

    assert (status, err) == (0, "")
    assert "dev-vm and test-vm, and the user carol" in out
    assert f"SSH keys that open the machines: {home}/.ssh/id_ed25519.pub." in out
    assert "git init and git add were done." in out
    assert "pytest --nixvm-flake=." in out
    assert "cd " not in out
    assert KEY in users()
    assert 'username = "carol";' in users()
    known = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout
    assert "machines/vms/dev-vm/configuration.nix" in known.split()


def test_a_directory_that_is_missing(run):
    status, out, _ = run("deep/config", "--vm", "web-vm", "--vm", "db-vm", "--user", "dave")

    assert status == 0
    assert "web-vm and db-vm, and the user dave" in out
    assert "No SSH key in ~/.ssh" in out
    assert "    cd deep/config\n" in out
    assert "nixvm run web-vm" in out
    assert "authorizedKeys = [ ];" in users("deep/config")
    assert not Path("deep/config/machines/vms/dev-vm").exists()


def test_keys_that_are_named_are_the_only_ones(run, home, tmp_path):
    (home / ".ssh" / "id_ed25519.pub").write_text(f"{KEY}\n")
    other = tmp_path / "other.pub"
    other.write_text("# mine\n" + KEY.replace("carol@laptop", "dave@desk") + "\n")

    status, out, _ = run("--key", str(other), "--no-git", "--json")

    assert status == 0
    told = json.loads(out)
    assert told.keys() == documented("`nixvm init`")
    assert told["keys"] == [str(other)]
    assert told["git"] is None
    assert told["vms"] == ["dev-vm", "test-vm"]
    assert told["user"] == "carol"
    assert "flake.nix" in told["files"]
    assert "dave@desk" in users()
    assert "carol@laptop" not in users()
    assert not Path(".git").exists()


def test_a_broken_key_of_one_s_own_is_left_out_and_told(run, home):
    (home / ".ssh" / "id_rsa.pub").write_text("ssh-rsa AAAA carol\n")
    status, _, err = run()
    assert status == 0
    assert "left out" in err
    assert "id_rsa.pub" in err


def test_what_is_no_file_in_one_s_ssh_is_no_key(run, home, monkeypatch):
    (home / ".ssh" / "sockets.pub").mkdir()
    (home / ".ssh" / "gone.pub").symlink_to("/nowhere")
    os.mkfifo(home / ".ssh" / "pipe.pub")
    status, out, err = run("one", "--no-git")
    assert (status, err) == (0, "")
    assert "No SSH key in ~/.ssh" in out

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(init.os, "scandir", denied)
        assert init._listed(home / ".ssh") == []


@pytest.mark.parametrize(
    ("login", "sudo", "user"),
    [
        ("root", None, "admin"),
        ("root", "dave", "dave"),
        ("Carol.Doe", None, "admin"),
        ("admin", None, "admin"),
    ],
)
def test_who_has_no_name_for_an_account(run, monkeypatch, login, sudo, user):
    monkeypatch.setenv("LOGNAME", login)
    if sudo:
        monkeypatch.setenv("SUDO_USER", sudo)
    status, out, _ = run()
    assert status == 0
    assert f'username = "{user}";' in users()
    assert ("--user NAME" in out) == (user not in (login, sudo))
    assert "You are root" not in out


def test_the_time_zone_is_this_computer_s(tmp_path, monkeypatch):
    link = tmp_path / "localtime"
    monkeypatch.setattr(init, "_LOCAL_TIME", link)
    assert init._time_zone() == "UTC"
    link.symlink_to("../usr/share/zoneinfo/America/New_York")
    assert init._time_zone() == "America/New_York"


# --- a VM more ---------------------------------------------------------------------------------


def test_a_vm_more(run):
    run()
    status, out, err = run("vm", "web-vm")
    assert (status, err) == (0, "")
    assert "machines/vms/web-vm/configuration.nix is there: git add was done." in out
    assert "web-vm is in vmMachines of flake.nix." in out
    assert "--nixvm-machine=web-vm" in out
    assert "By the way" not in out
    assert '"web-vm"' in Path("flake.nix").read_text()


def test_in_a_flake_a_name_is_a_vm_s(run):
    run()
    status, out, _ = run("web")
    assert status == 0
    assert "web is in vmMachines" in out
    assert "PURPOSE-vm here, as in web-vm" in out


def test_a_flake_elsewhere_and_several_at_once(run):
    run("config")
    status, out, _ = run("vm", "a-vm", "b-vm", "--home", "--flake", "config", "--json")
    assert status == 0
    told = json.loads(out)
    assert told[0].keys() == documented("`nixvm init vm`")
    assert [(each["name"], each["listed"], len(each["files"])) for each in told] == [
        ("a-vm", True, 2),
        ("b-vm", True, 2),
    ]
    assert Path("config/machines/vms/b-vm/home.nix").exists()


def test_a_flake_that_the_environment_names_takes_no_plain_name(run, monkeypatch):
    run("mine")
    monkeypatch.setenv("NIXVM_FLAKE", "mine")
    assert run("config")[0] == 0
    assert Path("config/flake.nix").exists()
    assert not Path("mine/machines/vms/config").exists()


def test_what_comes_next_names_a_flake_that_is_elsewhere(run, monkeypatch):
    run("config")
    assert "nixvm run a-vm --flake config  " in run("vm", "a-vm", "--flake", "config")[1]
    monkeypatch.setenv("NIXVM_FLAKE", "config")
    assert "nixvm run b-vm  " in run("vm", "b-vm")[1]


def test_where_the_list_is_something_else_the_line_is_said(run):
    run()
    Path("flake.nix").write_text("{ vmMachines = names ./.; }")
    status, out, _ = run("vm", "web-vm")
    assert status == 0
    assert 'put "web-vm" where the other VMs are named' in out


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--user", "root"], "'root' can't be a person's user name"),
        (["--user", "Carol"], "'Carol' can't be a person's user name"),
        (["--vm", "a b"], "'a b' can't be a machine's name"),
        (["--vm", "a", "--vm", "a"], "a is named twice"),
        (["--key", "/nowhere.pub"], "'/nowhere.pub' does not exist"),
        (["--home"], "--home is for a new VM"),
        (["one", "two"], "one directory"),
        (["--flake", "one"], "--flake is for a new VM"),
        (["vm"], "Which VM?"),
        (["vm", "web-vm"], "is no flake"),
        (["vm", "web-vm", "--flake", "/nowhere"], "There is no directory /nowhere"),
        (["vm", "web-vm", "--user", "carol"], "are for a new flake"),
        (["~nobody-of-that-name/config"], "Could not determine home directory"),
        (["vm", "web-vm", "--flake", "github:me/config"], "is the directory of a flake here"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_mistake_is_one_message(mistake, words, said):
    assert said in mistake(*words)


def test_a_directory_with_something_in_it(mistake):
    Path("notes.txt").write_text("mine")
    assert "is not empty (notes.txt)" in mistake()
    assert "notes.txt is a file" in mistake("notes.txt")


def test_a_flake_that_is_there(run, mistake):
    run()
    assert "There is a flake in" in mistake()
    assert "There is a machine dev-vm already" in mistake("vm", "dev-vm")
    assert "what new VMs are made from" in mistake("vm", "TEMPLATE")
    # Of several, none is made if one can't be.
    assert "can't be a machine's name" in mistake("vm", "good-vm", "b.d")
    assert "There is a machine dev-vm already" in mistake("vm", "good-vm", "dev-vm")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n", "is a private key"),
        ("", "has no SSH key in it"),
        ("hello\n", "should be a type, and the key in base64"),
        (KEY[:60], "was cut"),
    ],
)
def test_a_key_that_is_none(mistake, tmp_path, text, said):
    (tmp_path / "key").write_text(text)
    assert said in mistake("--key", str(tmp_path / "key"))


def test_a_place_that_can_not_be_written(mistake):
    assert "nixvm: /proc/" in mistake("/proc/config")
