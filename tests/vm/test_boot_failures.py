"""A boot that fails ends at once, with the stage it reached and the console's tail."""

from __future__ import annotations

import time

import pytest

from pytest_nixvm.errors import BootError, QemuError


def test_a_panic(fleet_of):
    began = time.monotonic()
    with pytest.raises(
        BootError, match=r"(?s)the kernel panicked: VFS.*Stage reached: kernel"
    ) as caught:
        fleet_of("machines").start("panics")

    assert time.monotonic() - began < 150  # not the 300 that a boot may take
    assert caught.value.stage == "kernel"
    assert "VFS" in caught.value.console_log.read_text(errors="replace")


def test_emergency_mode(fleet_of):
    with pytest.raises(BootError, match="emergency mode") as caught:
        fleet_of("machines").start("emergency")

    assert caught.value.stage == "systemd (stage 2)"


def test_a_missing_root(fleet_of):
    with pytest.raises(BootError, match="the initrd could not go on") as caught:
        fleet_of("machines").start("rootless")

    assert caught.value.stage == "initrd (stage 1)"
    assert "/dev/disk/by-label/lost" in caught.value.console_tail


def test_a_unit_that_never_ends_starting(fleet_of):
    with pytest.raises(BootError, match=r"(?s)not ready after 45 s.*endless.service") as caught:
        fleet_of("machines", boot_timeout="45").start("hangs")

    assert caught.value.stage == "guest agent answers"


def test_qemu_refuses(fleet_of):
    with pytest.raises(QemuError, match="no-such-device"):
        fleet_of("machines").start("refused")
