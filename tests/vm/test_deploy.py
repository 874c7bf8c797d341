"""`nixvm deploy` to a second machine, and what a deploy that goes wrong leaves there."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from pytest_nixvm.tested import Tested as Records  # or pytest takes it for a test

PROFILE = "/nix/var/nix/profiles/system"
STATE = "cat /run/nixvm-deploy/state 2>/dev/null || true"


class Deployed:
    """The host, with the command that deploys to it."""

    def __init__(self, fleet, arguments, state):
        self.fleet = fleet
        self.vm = fleet.start("server")
        # QEMU has loaded its kernel: unlike an installed machine it has no generation yet.
        self.first = self.vm.succeed("readlink -f /run/current-system").strip()
        self.vm.succeed(f"nix-env -p {PROFILE} --set {self.first}")
        words = shlex.split(self.vm.ssh.command_line)[1:]
        options = [words[at + 1] for at, word in enumerate(words) if word == "-o"]
        options.append(f"IdentityFile={words[words.index('-i') + 1]}")
        host, port = words[-1].rpartition("@")[2], words[words.index("-p") + 1]
        self.command = [
            *(sys.executable, "-m", "pytest_nixvm.cli", "deploy"),
            *("--flake", str(fleet.settings.flake), "--to", f"ssh://root@{host}:{port}"),
            *(word.replace("--nixvm-", "--") for word in arguments),
            *(word for option in options for word in ("--ssh-option", option)),
        ]
        self.state = state
        self.env = {**os.environ, "XDG_STATE_HOME": str(state)}

    def passes(self, name):
        """Write into the record what a session would."""
        toplevel = self.fleet.flake.real_toplevel(name)
        records = Records(self.state / "pytest-nixvm" / "tested")
        records.add(toplevel, machine=name, flake=".", outcomes={"t.py::test": "passed"})
        return toplevel

    def begin(self, *words):
        return subprocess.Popen(
            [*self.command, *words],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def deploy(self, *words):
        process = self.begin(*words)
        try:
            out, err = process.communicate(timeout=400)
        finally:
            process.kill()
        return process.returncode, out, err

    def is_unharmed(self):
        assert self.vm.succeed("readlink -f /run/current-system").strip() == self.first
        assert self.vm.succeed(f"readlink -f {PROFILE}").strip() == self.first
        self.vm.succeed("systemctl is-active sshd.service")

    def until(self, state, timeout=120):
        end = time.monotonic() + timeout
        while (saw := self.vm.succeed(STATE).strip()) != state:
            assert time.monotonic() < end, saw
            time.sleep(0.3)


@pytest.fixture(scope="module")
def server(fleet_of, arguments_of, tmp_path_factory):
    fleet = fleet_of("deploy")
    arguments = arguments_of(fleet.settings.flake)
    server = Deployed(fleet, arguments, tmp_path_factory.mktemp("state"))
    yield server
    server.vm.kill()


def test_what_was_not_tested_is_refused(server):
    status, _, err = server.deploy("good")
    assert status == 2
    assert "good as it is now was not tested" in err
    assert "--force 'REASON'" in err
    assert server.vm.succeed(STATE) == ""


def test_copy_would_fill_its_disk(server):
    """All but the 256 MiB that should be left is taken: what the host lacks has no room."""
    free = "$(df -Pk /nix/store | awk 'END { print $4 }')"
    server.vm.succeed(f"fallocate -l $(({free} - 256 * 1024))K /nix/.rw-store/filled")
    try:
        status, _, err = server.deploy("good", "--force", "to see whether it would fit")
    finally:
        server.vm.succeed("rm /nix/.rw-store/filled")
    assert status == 1
    told = r"has 256 MiB free in /nix/store, and what it lacks of the system \((\d+) store paths\)"
    (paths,) = re.findall(told, err)
    assert 1 < int(paths) < 40  # of some hundred
    server.is_unharmed()


def test_dry_run_says_what_would_change(server):
    status, out, err = server.deploy("good", "--dry-run")
    assert status == 0, err
    assert "etc" in out
    assert "would" in out
    server.is_unharmed()


def test_unit_that_fails_sends_it_back(server):
    server.passes("failing")
    status, _, err = server.deploy("failing", "--timeout", "60")
    assert status == 1, err
    assert "units failed: broken.service flapping.service" in err
    server.is_unharmed()


def test_host_that_nobody_can_log_in_to_any_more_goes_back(server):
    server.passes("deaf")
    status, _, err = server.deploy("deaf", "--timeout", "8")
    assert status == 1, err
    assert "has not answered" in err or "No connection" in err
    assert "Failed to run activate script" not in err
    server.is_unharmed()


def test_client_that_is_killed_leaves_the_old_generation(server):
    process = server.begin(
        "good", "--force", "the tests of it are under way", "--timeout", "8", "--check", "sleep 60"
    )
    try:
        server.until("waiting")
    finally:
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=30)
    server.until("rolled-back")
    server.is_unharmed()
    assert "is deployed by force: not tested" in err
    journal = server.vm.succeed("journalctl --no-pager -u nixvm-deploy")
    assert "forced, for this reason: the tests of it are under way" in journal


def test_host_that_is_well_keeps_what_was_tested(server):
    toplevel = server.passes("good")
    status, out, err = server.deploy("good", "--check", "grep yes /etc/deployed", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert (result["outcome"], result["ok"], result["old"]) == ("committed", True, server.first)
    assert server.vm.succeed(f"readlink -f {PROFILE}").strip() == toplevel
    assert server.vm.succeed("cat /etc/deployed") == "yes\n"
    assert server.vm.succeed("ls /nix/var/nix/gcroots | grep nixvm || true") == ""
    status, out, err = server.deploy("good")
    assert (status, "already" in out) == (0, True), err
