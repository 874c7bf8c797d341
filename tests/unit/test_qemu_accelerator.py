"""KVM or TCG: what a trial shows, what is remembered, and what a user is told."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import pytest
from _qemu import QEMU, executable, marked, needs_qemu, wait_gone

from pytest_nixvm.errors import MissingProgramError, SettingsError
from pytest_nixvm.qemu import accelerator
from pytest_nixvm.qemu.accelerator import Accelerator, architecture, choose, find_qemu, trial

GOOD = "exit 85"
ABORT = "echo 'qemu: error: failed to set MSR 0x10a' >&2; kill -ABRT $$"
HANG = "sleep 300 & echo $! > ${0%/*}/child; wait"

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the trial exists for x86 only"
)


class FakeQemu:
    """A "QEMU" that behaves as told and notes how often it ran, and with what."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "qemu-system-x86_64"
        self.log = directory / "calls"

    def behave(self, how: str) -> None:
        self.path.write_text(f'#!/bin/sh\necho "$@" >> {self.log}\n{how}\n')
        executable(self.path)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    """A fake QEMU on a machine whose /dev/kvm seems to work."""
    monkeypatch.setattr(accelerator, "_unusable", lambda _qemu: None)
    monkeypatch.setattr(accelerator, "KVM_DEVICE", Path("/dev/null"))
    monkeypatch.setattr(accelerator, "TRIAL_TIMEOUT", 0.5)
    fake = FakeQemu(tmp_path)
    fake.behave(GOOD)
    return fake


# --- the trial ---


@needs_qemu
def test_the_boot_sector_runs() -> None:
    assert trial(Path(str(QEMU)), "tcg", 30) is None


@needs_qemu
def test_a_guest_that_hangs_at_once_is_told_from_one_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sector = accelerator.BOOT_SECTOR
    monkeypatch.setattr(
        accelerator, "BOOT_SECTOR", b"\xf4\xeb\xfd".ljust(510, b"\0") + sector[510:]
    )
    assert trial(Path(str(QEMU)), "tcg", 1) == "a trial guest hung (stopped after 1 s)"
    assert marked("nixvm-trial-") == []


def test_kvm_that_works(qemu: FakeQemu, tmp_path: Path) -> None:
    assert choose(qemu.path, "auto", tmp_path) == Accelerator("kvm", "a trial guest ran")
    (call,) = qemu.calls
    assert "-machine accel=kvm -cpu max" in call  # as NixOS starts it
    assert choose(qemu.path, "kvm", tmp_path).name == "kvm"
    assert choose(qemu.path, "auto", tmp_path).reason == "a trial guest ran (remembered)"
    assert len(qemu.calls) == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (ABORT, "ended with signal SIGABRT (qemu: error: failed to set MSR 0x10a)"),
        (HANG, "hung (stopped after 0.5 s)"),
        ("exit 1", "ended with exit status 1"),
        ("exit 0", "ended with exit status 0"),
    ],
)
def test_kvm_that_does_not_work(qemu: FakeQemu, tmp_path: Path, how: str, reason: str) -> None:
    qemu.behave(how)
    began = time.monotonic()
    found = choose(qemu.path, "auto", tmp_path)
    assert time.monotonic() - began < 10
    assert found == Accelerator("tcg", f"a trial guest {reason}")
    for file in tmp_path.glob("child"):  # of the one that hangs
        assert wait_gone(int(file.read_text()))
    with pytest.raises(SettingsError, match="KVM was asked for") as caught:
        choose(qemu.path, "kvm", tmp_path)
    assert reason in str(caught.value)


# --- what is remembered ---


def test_a_failure_is_remembered_for_auto_but_tried_again_for_kvm(
    qemu: FakeQemu, tmp_path: Path
) -> None:
    cache = tmp_path / "not" / "there" / "yet"
    qemu.behave(ABORT)
    assert choose(qemu.path, "auto", cache).name == "tcg"
    assert "(remembered)" in choose(qemu.path, "auto", cache).reason
    assert len(qemu.calls) == 1
    with pytest.raises(SettingsError):
        choose(qemu.path, "kvm", cache)
    assert len(qemu.calls) == 2


def test_a_failure_is_not_believed_for_ever(qemu: FakeQemu, tmp_path: Path) -> None:
    qemu.behave(ABORT)
    choose(qemu.path, "auto", tmp_path)
    file = tmp_path / "accelerator.json"
    entries = json.loads(file.read_text())
    for entry in entries.values():
        entry["time"] -= 25 * 3600
    file.write_text(json.dumps(entries))
    choose(qemu.path, "auto", tmp_path)
    assert len(qemu.calls) == 2


def test_another_binary_another_trial(qemu: FakeQemu, tmp_path: Path) -> None:
    choose(qemu.path, "auto", tmp_path)
    qemu.behave(ABORT)
    assert choose(qemu.path, "auto", tmp_path).name == "tcg"


@pytest.mark.parametrize("what", ["kernel", "device", "user", "boot"])
def test_another_machine_another_trial(
    qemu: FakeQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    choose(qemu.path, "auto", tmp_path)
    if what == "kernel":
        monkeypatch.setattr(platform, "release", lambda: "another")
    elif what == "device":
        monkeypatch.setattr(accelerator, "KVM_DEVICE", Path("/dev/zero"))
    elif what == "user":
        monkeypatch.setattr(os, "getgroups", lambda: [12345])
    else:
        file = tmp_path / "accelerator.json"
        entries = json.loads(file.read_text())
        next(iter(entries.values()))["key"]["boot"] = "the one before"
        file.write_text(json.dumps(entries))
    assert "(remembered)" not in choose(qemu.path, "auto", tmp_path).reason
    assert len(qemu.calls) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "null"])
def test_a_damaged_memory_costs_a_trial(qemu: FakeQemu, tmp_path: Path, content: str) -> None:
    (tmp_path / "accelerator.json").write_text(content)
    assert choose(qemu.path, "auto", tmp_path).name == "kvm"
    assert "(remembered)" in choose(qemu.path, "auto", tmp_path).reason


def test_a_cache_that_cannot_be_written_costs_a_trial(qemu: FakeQemu, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert choose(qemu.path, "auto", tmp_path / "file" / "cache").name == "kvm"
    assert len(qemu.calls) == 2


# --- what needs no trial ---


def test_tcg_is_taken_as_it_is(qemu: FakeQemu, tmp_path: Path) -> None:
    assert choose(qemu.path, "tcg", tmp_path).name == "tcg"
    assert qemu.calls == []


def test_an_unknown_accelerator(qemu: FakeQemu, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Unknown accelerator 'xen': use auto, kvm or tcg"):
        choose(qemu.path, "xen", tmp_path)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("/dev/no-kvm", "there is no /dev/no-kvm"),
        ("/dev/null", "/dev/null is not KVM: Inappropriate ioctl"),
        ("/dev", "/dev can't be opened: Is a directory"),
    ],
)
def test_no_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, reason: str) -> None:
    monkeypatch.setattr(accelerator, "KVM_DEVICE", Path(device))
    fake = FakeQemu(tmp_path)
    fake.behave(GOOD)
    found = choose(fake.path, "auto", tmp_path)
    assert found.name == "tcg"
    assert found.reason.startswith(reason)
    assert fake.calls == []
    with pytest.raises(SettingsError, match=reason):
        choose(fake.path, "kvm", tmp_path)


def test_kvm_cannot_run_another_architecture(tmp_path: Path) -> None:
    found = choose(tmp_path / "qemu-system-aarch64", "auto", tmp_path)
    assert found == Accelerator("tcg", "KVM can't run aarch64 on x86_64")


# --- which QEMU ---


def test_the_qemu_of_a_start_script(tmp_path: Path) -> None:
    binary = tmp_path / "store" / "abc-qemu-host-cpu-only-10.1" / "bin" / "qemu-system-aarch64"
    binary.parent.mkdir(parents=True)
    binary.write_text("")
    (binary.parent / "qemu-img").write_text("")
    script = tmp_path / "run-x-vm"
    script.write_text(
        f"#!/bin/sh\n{binary.parent}/qemu-img create x\nexec {binary} -machine virt,accel=kvm:tcg"
    )
    assert find_qemu(script) == binary
    assert architecture(binary) == "aarch64"
    binary.unlink()
    with pytest.raises(MissingProgramError, match="which does not exist"):
        find_qemu(script)


def test_a_start_script_that_takes_qemu_from_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "run-x-vm"
    script.write_text("#!/bin/sh\nexec qemu-system-riscv64 -m 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgramError, match=r"qemu-system-riscv64 is not on PATH.*Install"):
        find_qemu(script)
    (tmp_path / "qemu-system-riscv64").write_text("")
    executable(tmp_path / "qemu-system-riscv64")
    assert find_qemu(script) == tmp_path / "qemu-system-riscv64"


def test_a_start_script_that_names_no_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "run-x-vm"
    script.write_text("#!/bin/sh\nexec wrapper")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingProgramError, match="qemu-system-x86_64"):
        find_qemu(script)
    with pytest.raises(MissingProgramError, match="can't be read"):
        find_qemu(tmp_path / "absent")
