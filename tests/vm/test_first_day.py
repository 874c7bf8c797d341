"""From an empty directory to a host that runs what was tested, by what a user types."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

CAROL = """
import pytest

@pytest.mark.nixvm("shop-vm", user="carol")
def test_carol_administers(ssh):
    assert ssh.run("id -un; sudo -n id -un").stdout == "carol\\nroot\\n"

def test_no_password_opens_an_account(vm):
    accounts = vm.succeed("getent shadow root carol").splitlines()
    assert all(line.split(":")[1] in ("!", "*", "!*") for line in accounts), accounts
"""
PYTHON = (sys.executable, "-m")
NIXVM = (*PYTHON, "pytest_nixvm.cli")
BOOT = "cat /proc/sys/kernel/random/boot_id"
RUNNING = "/nix/var/nix/profiles/system /run/current-system /run/booted-system"


class Day:
    """A terminal in a directory that is empty in the morning."""

    def __init__(self, tmp: Path, runtime: str, prepare: str):
        self.config = tmp / "config"
        self.machine = self.config / "machines" / "vms" / "shop-vm" / "configuration.nix"
        self.env = {
            **os.environ,
            "HOME": str(tmp / "home"),
            "XDG_STATE_HOME": str(tmp / "state"),
            "XDG_RUNTIME_DIR": runtime,
            "NIXVM_CACHE": str(tmp / "cache"),
        }
        (tmp / "home").mkdir()
        self.done("init", str(self.config), "--vm", "web-vm", "--user", "carol", in_=tmp)
        self.done("init", "vm", "shop-vm", "--home")
        self.config.joinpath("tests", "test_carol.py").write_text(CAROL)
        # The stand-in has a nix in a guest where one is asked for; NixOS has it anyway.
        nix = "({ pkgs, ... }: { environment.systemPackages = [ pkgs.nix ]; })"
        self.edit("imports = [", f"imports = [\n    {nix}")
        words = shlex.split(
            subprocess.run(
                [prepare, self.config], stdout=subprocess.PIPE, text=True, check=True
            ).stdout.splitlines()[-1]
        )
        pairs = {"override-input": [], "nix-option": []}
        for flag, name, value in zip(words[::3], words[1::3], words[2::3], strict=True):
            pairs[flag.removeprefix("--nixvm-")] += [name, value]
        self.env["NIXVM_OVERRIDE_INPUT"] = " ".join(pairs["override-input"])
        self.env["NIXVM_NIX_OPTION"] = " ".join(pairs["nix-option"])
        self.env["PYTEST_ADDOPTS"] = shlex.join(
            [*words, "--nixvm-memory=1024", f"--nixvm-cache={tmp / 'cache'}"]
        )

    def edit(self, old: str, new: str) -> None:
        text = self.machine.read_text()
        assert old in text
        self.machine.write_text(text.replace(old, new, 1))

    def type(self, *argv: str, in_: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv,
            cwd=in_ or self.config,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    def done(self, *words: str, in_: Path | None = None) -> str:
        result = self.type(*NIXVM, *words, in_=in_)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def test(self) -> subprocess.CompletedProcess[str]:
        argv = ("--nixvm-flake=.", "--nixvm-machine=shop-vm", "-p", "no:cacheprovider")
        return self.type(*PYTHON, "pytest", *argv)

    def server_says(self, command: str) -> list[str]:
        return self.done("ssh", "shop-vm@qcow2", command).split()

    def until_server_says(self, command: str, words: str) -> None:
        end = time.monotonic() + 120
        while (saw := self.type(*NIXVM, "ssh", "shop-vm@qcow2", command)).stdout.strip() != words:
            assert time.monotonic() < end, saw.stdout + saw.stderr

    def server_reboots(self, command: str = "systemctl reboot") -> None:
        begun = self.server_says(BOOT)
        # It may be down before the command has answered: what it did is seen below.
        self.type(*NIXVM, "ssh", "shop-vm@qcow2", command)
        end = time.monotonic() + 120
        # Until it is down, sshd still answers, or closes what comes in.
        while True:
            result = self.type(*NIXVM, "ssh", "shop-vm@qcow2", BOOT)
            if result.returncode == 0 and result.stdout.split() != begun:
                return
            assert time.monotonic() < end, result.stdout + result.stderr


@pytest.fixture
def day(tmp_path):
    prepare = Path(__file__).parent.parent / "standin" / "prepare"
    with tempfile.TemporaryDirectory(prefix="nixvm-day-") as runtime:
        day = Day(tmp_path, runtime, str(prepare))
        # The server: a machine that was installed from the image of this morning.
        server = subprocess.Popen(
            [*NIXVM, "run", "shop-vm@qcow2", "--headless", "--memory", "1024"],
            cwd=day.config,
            env=day.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            day.server = server
            yield day
        finally:
            server.kill()
            server.communicate()


def test_from_an_empty_directory_to_a_host_that_runs_what_was_tested(day: Day) -> None:
    passed = day.test()
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "5 passed" in passed.stdout

    day.edit(
        "openssh.enable",
        'openssh.extraConfig = "ClientAliveIntervall 30";\n  services.openssh.enable',
    )
    failed = day.test()
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "newly failed units: sshd.service" in failed.stdout
    assert "Bad configuration option: ClientAliveIntervall" in failed.stdout, failed.stdout

    said = iter(day.server.stdout.readline, "")
    assert any("Ctrl-C powers it down" in line for line in said)
    ssh = shlex.split(day.done("ssh", "--print", "shop-vm@qcow2"))
    options = [ssh[at + 1] for at, word in enumerate(ssh) if word == "-o"]
    options.append(f"IdentityFile={ssh[ssh.index('-i') + 1]}")
    deploy = [*NIXVM, "deploy", "shop-vm", f"--to=ssh://root@127.0.0.1:{ssh[ssh.index('-p') + 1]}"]
    deploy += [word for option in options for word in ("--ssh-option", option)]
    installed = day.server_says(f"readlink -f {RUNNING}")
    refused = day.type(*deploy)
    assert refused.returncode == 2, refused.stderr
    assert "test_somebody_can_log_in[shop-vm]" in refused.stderr
    assert day.server_says(f"readlink -f {RUNNING}") == installed

    day.edit("ClientAliveIntervall", "ClientAliveInterval")
    mended = day.test()
    assert mended.returncode == 0, mended.stdout + mended.stderr
    [row] = [line for line in day.done("list").splitlines() if line.startswith("shop-vm ")]
    assert "5 tests passed" in row

    # The power fails while the server waits to be told that all is well.
    with subprocess.Popen(
        [*deploy, "--check", "false", "--timeout", "300"],
        env=day.env,
        cwd=day.config,
        stderr=subprocess.PIPE,
        text=True,
    ) as cut:
        try:
            day.until_server_says("cat /run/nixvm-deploy/state", "waiting")
            day.server_reboots("systemd-run sh -c 'echo b >/proc/sysrq-trigger'")
            _, said_of_it = cut.communicate(timeout=120)
        finally:
            cut.kill()
    assert cut.returncode == 1, said_of_it
    assert "was not switched to shop-vm" in said_of_it
    assert day.server_says(f"readlink -f {RUNNING}") == installed

    deployed = day.type(*deploy)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    toplevel = day.done("build", "shop-vm", "--toplevel").strip()
    day.server_reboots()
    assert day.server_says(f"readlink -f {RUNNING}") == [toplevel] * 3
    assert day.server_says("sshd -T | grep clientaliveinterval") == ["clientaliveinterval", "30"]
