"""The options of the module `vm`, as the guest has them: one machine, booted once."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pytest_nixvm import Fleet, Settings
from pytest_nixvm.errors import QemuError
from pytest_nixvm.machine import Machine

PASSWORD = "swordfish"
MIB = 2**20


@dataclass
class Host:
    """What of this computer the machine is given."""

    flake: Path
    key: Path
    work: Path
    music: Path
    port: int


@dataclass
class Booted(Host):
    vm: Machine


@pytest.fixture(scope="module")
def host(flake_copy, free_port, tmp_path_factory) -> Host:
    here = tmp_path_factory.mktemp("host")
    key, work, music = here / "key", here / "our work", here / "music"
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", key]
    subprocess.run(keygen, check=True, timeout=60)
    work.mkdir()
    music.mkdir()
    (work / "from-host").write_text("hello guest\n")
    (music / "song").write_text("la la\n")
    port = free_port()
    flake = flake_copy("vm_options")
    values = {
        "key": key.with_suffix(".pub").read_text().strip(),
        "work": str(work),
        "music": str(music),
        "port": port,
    }
    (flake / "here.nix").write_text(f"builtins.fromJSON ''{json.dumps(values)}''\n")
    return Host(flake, key, work, music, port)


@pytest.fixture(scope="module")
def booted(host, arguments_of, tmp_path_factory):
    given = arguments_of(host.flake)
    pairs = {"--nixvm-override-input": [], "--nixvm-nix-option": []}
    for flag, *pair in zip(given[::3], given[1::3], given[2::3], strict=True):
        pairs[flag].append(pair)
    settings = Settings.make(
        flake=str(host.flake),
        override_input=pairs["--nixvm-override-input"],
        nix_option=pairs["--nixvm-nix-option"],
        isolation="session",  # shares are there as long as nothing is frozen
    )
    with Fleet(settings, output=tmp_path_factory.mktemp("options-output")) as fleet:
        yield Booted(**vars(host), vm=fleet.start("options-vm"))


@pytest.fixture
def vm(booted):
    return booted.vm


def ssh(booted: Booted, user: str) -> subprocess.CompletedProcess[str]:
    """Log in as somebody does who has the key, by the port that the configuration forwards."""
    options = ("UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "BatchMode=yes",
               "IdentitiesOnly=yes")  # fmt: skip
    return subprocess.run(
        ["ssh", "-F", "/dev/null", "-i", booted.key, "-p", str(booted.port)]
        + [word for option in options for word in ("-o", option)]
        + [f"{user}@127.0.0.1", "id -un"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_nothing_had_to_be_changed_for_the_test(vm):
    assert vm.build.overrides == ()


def test_disk_memory_and_processors(vm):
    assert int(vm.succeed("blockdev --getsize64 $(findmnt -no SOURCE /)")) == 700 * MIB
    total = int(vm.succeed("awk '/^MemTotal/ { print $2 }' /proc/meminfo")) * 1024
    assert 780 * MIB < total < 900 * MIB
    assert vm.succeed("nproc").strip() == "3"


def test_without_a_screen_its_console_is_the_serial_port(vm):
    assert vm.succeed("cat /sys/class/tty/console/active").split()[-1] == "ttyS0"
    assert "-nographic" in vm.qemu.argv


def test_the_guest_agent_runs(vm):
    assert vm.succeed("systemctl is-active qemu-guest-agent.service").strip() == "active"


def test_the_network_is_isolated(vm):
    (network,) = [word for word in vm.qemu.argv if word.startswith("user,id=user.0")]
    assert "restrict=on" in network


def test_a_shared_folder_is_read_and_written(booted):
    vm = booted.vm
    assert vm.succeed("cat /mnt/work/from-host") == "hello guest\n"
    vm.succeed("echo hello host > /mnt/work/from-guest")
    assert (booted.work / "from-guest").read_text() == "hello host\n"


def test_one_that_is_read_only_is_not_written(booted):
    vm = booted.vm
    assert vm.succeed("cat /srv/music/song") == "la la\n"
    assert "Read-only" in vm.fail("touch /srv/music/mine 2>&1")
    # Whoever is root in the guest can mount it otherwise: QEMU refuses all the same.
    vm.succeed("mount -o remount,rw /srv/music")
    vm.fail("touch /srv/music/mine")
    assert [path.name for path in booted.music.iterdir()] == ["song"]


@pytest.mark.parametrize("user", ["vm", "alice"])
def test_people_log_in_with_their_key(booted, user):
    done = ssh(booted, user)
    assert (done.returncode, done.stdout) == (0, f"{user}\n"), done.stderr


def test_somebody_else_is_refused(booted):
    assert "Permission denied" in ssh(booted, "nobody").stderr


def test_people_log_in_on_the_console_with_their_password(vm):
    for user in ("vm", "alice"):
        vm.serial.login(user, PASSWORD)
        assert vm.serial.run("id -un").stdout == f"{user}\n"
        vm.serial.logout()


def test_who_uses_it_is_an_argument_of_its_modules(vm):
    assert vm.succeed("cat /etc/vm-user") == "vm"
    assert "wheel" in vm.succeed("id -Gn vm").split()
    assert "wheel" not in vm.succeed("id -Gn alice").split()


def test_with_its_folders_it_can_t_be_frozen(vm):
    with pytest.raises(QemuError) as caught:
        vm.snapshot("never")
    for folder in ("work", "music"):
        assert f"the 9p share '{folder}'" in str(caught.value)


def test_guest_additions_of_virtualbox_and_vmware(host, arguments_of):
    given = arguments_of(host.flake)
    if any("/pytest-nixvm/standin/" in word for word in given):
        pytest.skip("the stand-in for nixpkgs has no guest additions: they are NixOS' own")
    command = [sys.executable, "-m", "pytest_nixvm.cli", "build", "additions-vm", "--toplevel"]
    command += ["--flake", str(host.flake), *(word.replace("--nixvm-", "--") for word in given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
    system = Path(done.stdout.strip())
    for unit in ("virtualbox", "vmware"):
        assert (system / "etc" / "systemd" / "system" / f"{unit}.service").exists()
    for program in ("VBoxControl", "vmtoolsd"):
        assert (system / "sw" / "bin" / program).exists()
