"""The VM without pytest and without nixvm: built by nix, started by its own script."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pexpect

from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.qemu.accelerator import choose, find_qemu


def test_nix_builds_it_and_its_script_runs_it(
    arguments: list[str], flake_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    machine = f"{flake_copy('example')}#nixosConfigurations.test-vm"
    flags = {"--nixvm-override-input": "--override-input", "--nixvm-nix-option": "--option"}
    subprocess.run(
        [
            *("nix", "--extra-experimental-features", "nix-command flakes", "build"),
            *(f"{machine}.config.system.build.vm", "--no-write-lock-file"),
            *(flags.get(word, word) for word in arguments),
        ],
        cwd=tmp_path,
        env=Nix.find().environment(),
        check=True,
        timeout=300,
    )
    script = tmp_path / "result" / "bin" / "run-test-vm-vm"
    accelerator = choose(find_qemu(script), "auto", tmp_path).name
    here = tmp_path / "here"
    here.mkdir()
    vm = pexpect.spawn(
        str(script),
        cwd=here,
        env={**os.environ, "TMPDIR": str(tmp_path), "QEMU_OPTS": f"-machine accel={accelerator}"},
        encoding="utf-8",
        timeout=120,
    )
    try:
        vm.expect("test-vm login: ")  # the VM is headless: its console is this terminal
        vm.sendline("alice")
        vm.expect("Password: ")
        vm.sendline("opensesame")
        vm.expect(r"\[?alice@test-vm")
        vm.sendline("sudo poweroff")
        vm.expect(pexpect.EOF)
    finally:
        vm.close(force=True)
    assert vm.exitstatus == 0
    assert (here / "test-vm.qcow2").exists()
