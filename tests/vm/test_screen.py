"""The screen, the keyboard and the consoles of a VM."""

from __future__ import annotations

import shutil
import time

import pytest

from pytest_nixvm.errors import GuestPanicError, MachineError, WaitTimeoutError

PRINTABLE = "".join(map(chr, range(32, 127)))

needs_ocr = pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs tesseract")


@pytest.fixture(scope="module")
def vm(fleet_of):
    vm = fleet_of("machines").start("screen")
    vm.succeed("systemctl start getty@tty1")
    vm.send_key("alt-f1")
    yield vm
    vm.kill()


@pytest.fixture
def at_keyboard(vm):
    """A process that reads tty1 line by line, into the file that is returned."""
    vm.succeed("systemctl stop getty@tty1")
    vm.succeed(
        "systemd-run --quiet --unit=reader --property=StandardInput=tty "
        "--property=StandardOutput=tty --property=TTYPath=/dev/tty1 --property=TTYReset=yes "
        "bash -c 'echo ready; while IFS= read -r line; do echo \"$line\" >> /tmp/typed; done'"
    )
    vm.wait_until_tty_matches("1", "ready", timeout=60)
    yield "/tmp/typed"
    vm.succeed("systemctl stop reader", "rm -f /tmp/typed", "systemctl start getty@tty1")


def typed(vm, path, lines):
    vm.wait_until_succeeds(f"test $(wc -l < {path}) -ge {lines}", timeout=60)
    return vm.succeed(f"cat {path}")


def test_a_log_in_prompt_is_on_the_console(vm):
    vm.wait_until_tty_matches("1", r"screen login: ", timeout=60)

    rows = vm.get_tty_text("1").splitlines()

    assert len({len(row) for row in rows}) == 1
    assert int(vm.succeed("stty -F /dev/tty1 size").split()[0]) == len(rows)


def test_text_that_is_not_ascii(vm):
    vm.run("cat > /dev/tty1", stdin="\r\nGrüße, 10 €\r\n", check=True)

    vm.wait_until_tty_matches(1, "Grüße, 10 €", timeout=60)


def test_a_console_that_is_none(vm):
    with pytest.raises(MachineError, match="no virtual console"):
        vm.get_tty_text("99")
    with pytest.raises(MachineError, match="no virtual console"):
        vm.get_tty_text("1; reboot")


def test_a_wait_that_fails_shows_the_console(vm):
    vm.run("cat > /dev/tty1", stdin="\r\nsome words\r\n", check=True)

    with pytest.raises(WaitTimeoutError, match=r"(?s)'nevermore' on tty1.*some words"):
        vm.wait_until_tty_matches("1", "nevermore", timeout=3)


def test_every_key_of_a_long_line_arrives_in_a_busy_guest(vm, at_keyboard):
    text = PRINTABLE * 5
    vm.succeed(
        "for i in 1 2 3 4; do systemd-run --quiet --unit=busy-$i "
        "bash -c 'while :; do /run/current-system/sw/bin/true; done'; done"
    )
    try:
        vm.send_chars(text + "\n")
    finally:
        vm.succeed("systemctl stop 'busy-*'")

    assert typed(vm, at_keyboard, 1) == text + "\n"


def test_keys_by_name(vm, at_keyboard):
    for key in ("shift-a", "b", "C", "spc", "0x02", "-", "shift-minus", "backspace", "ret"):
        vm.send_key(key)

    assert typed(vm, at_keyboard, 1) == "AbC 1-\n"
    with pytest.raises(MachineError, match="no key 'nope'"):
        vm.send_key("ctrl-nope")


def test_a_character_that_the_layout_lacks(vm, at_keyboard):
    with pytest.raises(MachineError, match=r"layout 'en-us'.* has no 'ß'.*\bde\b"):
        vm.send_chars("naß")
    vm.send_chars("\n")

    assert typed(vm, at_keyboard, 1) == "\n"  # not half of it


def test_the_serial_console(vm):
    assert "Stage 1" in vm.get_console_log()
    vm.wait_for_console_text("Stage 1", timeout=60)
    with pytest.raises(WaitTimeoutError, match="Stage 1"):
        vm.wait_for_console_text("Stage 1", timeout=0.2)  # it was seen
    vm.wait_for_console_text("screen login: ", timeout=60)  # what comes earlier, getty throws away
    vm.succeed("echo hear hear > /dev/ttyS0")
    vm.wait_for_console_text(r"hear \w+", timeout=60)
    vm.send_console("nobody-at-all\n")
    vm.wait_for_console_text("nobody-at-all", timeout=30)


@needs_ocr
def test_text_is_read_from_the_screen(vm):
    pytest.importorskip("pytesseract")
    vm.run("cat > /dev/tty1", stdin="\r\nThe quick brown fox\r\n", check=True)

    vm.wait_for_text("quick brown", timeout=60)

    assert "quick brown fox" in vm.get_screen_text()
    assert any("quick brown fox" in text for text in vm.get_screen_text_variants())
    with pytest.raises(WaitTimeoutError, match=r"(?s)'nevermore' on the screen.*quick brown"):
        vm.wait_for_text("nevermore", timeout=5)


def test_what_is_on_a_console_goes_into_the_journal(vm, capsys):
    vm.run("cat > /dev/tty1", stdin="\r\nfor the record\r\n", check=True)
    vm.wait_until_tty_matches(1, "for the record", timeout=60)

    vm.dump_tty_contents(1)

    assert "for the record" in capsys.readouterr().out
    vm.wait_until_succeeds("journalctl -b --no-pager | grep 'for the record'", timeout=30)


def test_the_signs_by_which_an_x_server_is_known(vm):
    """Not an X server: the guest has none. Its socket, its line in the journal, its xwininfo."""
    with pytest.raises(WaitTimeoutError, match="the X server of screen"):
        vm.wait_for_x(timeout=3)
    vm.succeed(
        "mkdir -p /tmp/.X11-unix && touch /tmp/.X11-unix/X0",
        "echo 'Reached target Current graphical user session.' | systemd-cat -t systemd",
    )
    vm.wait_for_x(timeout=60)

    vm.run(
        "mkdir -p /run/wrappers/bin && cd /run/wrappers/bin && cat > xwininfo && chmod +x xwininfo",
        stdin='#!/bin/sh\necho \'     0x400001 "Terminal - alice": ("t" "T")  80x24+0+0\'\n',
        check=True,
    )
    assert vm.get_window_names() == ["Terminal - alice"]
    vm.wait_for_window("^Terminal", timeout=30)
    with pytest.raises(WaitTimeoutError, match="Terminal - alice"):
        vm.wait_for_window("Firefox", timeout=3)


def test_the_screen_after_a_panic(vm):  # the last: it leaves a VM of no use to others
    with pytest.raises(GuestPanicError):
        vm.run("sleep 1; echo c > /proc/sysrq-trigger; sleep 60", timeout=90)

    assert vm.screenshot("panic").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MachineError, match=r"no key reaches it|panicked"):
        vm.send_chars("anybody there?")
    began = time.monotonic()
    with pytest.raises(MachineError):
        vm.get_tty_text("1")
    assert time.monotonic() - began < 10
