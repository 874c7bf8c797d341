"""Keyboard layouts, and what is sent for a key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_nixvm.errors import MachineError
from pytest_nixvm.qemu.keyboard import Keyboard
from pytest_nixvm.qemu.keymaps import (
    ALTGR,
    SHIFT,
    character,
    directories,
    find_layout,
    layouts_with,
)

QEMUS = directories(None)
needs_keymaps = pytest.mark.skipif(not QEMUS, reason="QEMU's keymaps are not installed")
PRINTABLE = "".join(map(chr, range(32, 127)))


class Monitor:
    """Takes what QEMU would be sent."""

    name = "tiny"

    def __init__(self, status: str = "running") -> None:
        self.status = status
        self.keys: list[list[tuple[object, bool]]] = []

    def execute(self, command, arguments=None, **_):
        if command == "query-status":
            return {"status": self.status}
        if command == "x-query-virtio":
            return []
        assert command == "input-send-event"
        self.keys.append(
            [(event["data"]["key"]["data"], event["data"]["down"]) for event in arguments["events"]]
        )
        return {}


@pytest.mark.parametrize(
    ("keysym", "char"),
    [
        ("a", "a"),
        ("7", "7"),
        ("exclam", "!"),
        ("adiaeresis", "ä"),
        ("Zcaron", "Ž"),
        ("ssharp", "ß"),
        ("EuroSign", "€"),
        ("U2030", "‰"),
        ("0x010000d7", "×"),
        ("Cyrillic_ya", "я"),
        ("Cyrillic_SHCHA", "Щ"),
        ("Return", "\n"),
        ("F1", None),
        ("dead_acute", None),
    ],
)
def test_keysyms(keysym, char):
    assert character(keysym) == char


@needs_keymaps
def test_german():
    de = find_layout("de", QEMUS)

    assert de.strokes("z") == ((0x15,),)
    assert de.strokes("Y") == ((SHIFT, 0x2C),)
    assert de.strokes("ß") == ((0x0C,),)
    assert de.strokes("@") == ((ALTGR, 0x10),)
    assert de.strokes("<") == ((0x56,),)


@needs_keymaps
@pytest.mark.parametrize("name", ["us", "en-us", "uk", "de", "fr", "es", "pt-br", "ch", "sv"])
def test_layouts_have_all_of_ascii(name):
    layout = find_layout(name, QEMUS)

    assert [char for char in PRINTABLE + "\n\t" if not layout.strokes(char)] == []


@needs_keymaps
def test_a_letter_with_an_accent_takes_a_dead_key():
    swiss = find_layout("de-ch", QEMUS)

    dead, letter = swiss.strokes("ê")
    assert letter == (0x12,)
    assert swiss.strokes("^") == (dead, (0x39,))
    assert find_layout("fr-ch", QEMUS).strokes("é") == ((0x27,),)


def test_the_built_in_layout_is_the_one_of_the_file():
    built_in = find_layout("us", ())

    assert built_in.where == "built in"
    assert all(built_in.strokes(char) for char in PRINTABLE + "\n")
    if QEMUS:
        us = find_layout("us", QEMUS)
        assert {char: us.strokes(char) for char in PRINTABLE} == {
            char: built_in.strokes(char) for char in PRINTABLE
        }


def test_old_keymaps_include_others_and_add_capitals(tmp_path: Path):
    (tmp_path / "common").write_text("q 0x10 addupper\nKP_1 0x4f numlock\nReturn 0x1c localstate\n")
    (tmp_path / "xx").write_text("# a comment\ninclude common\nat 0x10 altgr\nb 0x30 inhibit\n")

    layout = find_layout("xx", (tmp_path,))

    assert layout.keys == {"q": (0x10,), "Q": (SHIFT, 0x10), "\n": (0x1C,), "@": (ALTGR, 0x10)}
    assert layouts_with("@", (tmp_path,)) == ["en-us", "xx"]


def test_a_layout_that_nobody_has(tmp_path: Path):
    (tmp_path / "yy").write_text("a 0x1e\n")

    with pytest.raises(MachineError, match="no keyboard layout 'zz'; it has en-us, yy"):
        find_layout("zz", (tmp_path,))
    with pytest.raises(MachineError, match="comes without its keymap files"):
        find_layout("de", ())
    with pytest.raises(MachineError):
        find_layout("../yy", (tmp_path,))


def test_text_goes_down_and_up_key_by_key():
    monitor = Monitor()
    pauses: list[float] = []

    Keyboard(monitor, ()).type("aB", delay=0.25, sleep=pauses.append)

    assert monitor.keys == [
        [(0x1E, True), (0x1E, False)],
        [(SHIFT, True), (0x30, True), (0x30, False), (SHIFT, False)],
    ]
    assert pauses == [0.25, 0.25]


def test_nothing_is_typed_unless_all_can_be():
    monitor = Monitor()

    with pytest.raises(MachineError, match=r"'en-us' \(built in\) has no 'ß' \(U\+00DF\)"):
        Keyboard(monitor, ()).type("naß")

    assert monitor.keys == []


@pytest.mark.parametrize(
    ("key", "sent"),
    [
        ("ctrl-alt-f2", ["ctrl", "alt", "f2"]),
        ("ret", ["ret"]),
        ("shift-0x0C", ["shift", 0x0C]),
        ("A", [SHIFT, 0x1E]),
        ("-", [0x0C]),
        ("ctrl--", ["ctrl", "minus"]),
        ("\n", [0x1C]),
    ],
)
def test_keys_by_name(key, sent):
    monitor = Monitor()

    Keyboard(monitor, ()).press(key)

    down = [name for name, pressed in monitor.keys[0] if pressed]
    up = [name for name, pressed in monitor.keys[0] if not pressed]
    assert (down, up) == (sent, sent[::-1])


def test_a_paused_vm_gets_no_keys():
    with pytest.raises(MachineError, match="not running but guest-panicked"):
        Keyboard(Monitor("guest-panicked"), ()).type("a")
