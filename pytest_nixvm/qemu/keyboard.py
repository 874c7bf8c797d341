r"""The VM's keyboard: keys by QEMU's names, text by a layout.

keyboard = Keyboard(qemu.monitor, directories(executable))
keyboard.press("ctrl-alt-f2")               # as HMP's sendkey takes it
keyboard.type("Grüße\n", layout="de")       # the guest must have that layout, too

A key goes down and up within one QMP command. QEMU puts the whole in front of the guest at once, so
a slow guest sees a key that was tapped, never one that was held: no character is repeated.

QEMU drops the keys that a busy guest has no room for, and does not say so. A virtio keyboard (NixOS
VMs have one) shows its room in its queue, and is waited for. A PS/2 keyboard holds 16 bytes, of
which a key with Shift and AltGr takes 8, and shows nothing: there the delay between two keys must
do, and 10 ms are enough for a guest that gets its share of the processor.

Protocol: `input-send-event`, `x-query-virtio-queue-element`,
https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pytest_nixvm.errors import MachineError, QmpError
from pytest_nixvm.qemu.keymaps import Layout, find_layout, layouts_with
from pytest_nixvm.qemu.monitor import Monitor
from pytest_nixvm.wait import poll

DELAY = 0.01
"""Seconds between two keys, as in the NixOS test driver."""

PATIENCE = 30.0
"""Seconds that a guest may take to read its keyboard."""

_ROOM = 16  # events; the keys of one character are 9 at most, and the queue has 64

_RUNNING = ("running", "suspended")  # in other states QEMU drops what is typed


class Keyboard:
    """The keyboard of one VM."""

    def __init__(self, monitor: Monitor, keymaps: Iterable[Path]) -> None:
        self._monitor = monitor
        self._keymaps = tuple(keymaps)

    def press(self, key: str, layout: str = "us") -> None:
        r"""Press keys together and release them: "ret", "ctrl-alt-f2", "shift-a", "0x1c".

        The names are QEMU's (those of HMP's sendkey). A single character is what the layout types:
        "A", "!", "\n". Raises `MachineError` for what is no key, and if the VM is paused.
        """
        queue = self._ready()
        if len(key) == 1:
            for keys in self._strokes(key, find_layout(layout, self._keymaps)):
                self._tap([_number(number) for number in keys], queue)
            return
        names = f"{key[:-1]}minus" if key.endswith("--") else key
        try:
            self._tap([_key(name) for name in names.split("-")], queue)
        except QmpError as error:
            if error.error_class != "GenericError" or "does not accept" not in error.description:
                raise
            wrong = re.search(r"value '([^']*)'", error.description)
            raise MachineError(
                f"{self._monitor.name}: QEMU has no key {wrong[1] if wrong else key!r} "
                f"(to press {key!r}). Keys are named as for QEMU's sendkey: a, 1, ret, spc, tab, "
                "esc, backspace, delete, up, f1, shift, ctrl, alt, alt_r, meta_l, minus, "
                "or 0x and the scancode; joined by '-'."
            ) from None

    def type(
        self,
        text: str,
        *,
        layout: str = "us",
        delay: float | None = DELAY,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        r"""Type text as a keyboard of `layout` does; "\n" is Return, "\t" Tab, "\b" Backspace.

        Nothing is typed unless all of it can be: `MachineError` names the first character that the
        layout lacks, and the layouts that have it. `delay` is in seconds, between two characters.
        Raises `WaitTimeoutError` if the guest does not read its keyboard.
        """
        found = find_layout(layout, self._keymaps)
        strokes = [keys for char in text for keys in self._strokes(char, found)]
        queue = self._ready()
        for keys in strokes:
            self._tap([_number(number) for number in keys], queue)
            sleep(delay or 0.0)
        self._check_running()  # what came after a panic was lost

    def _strokes(self, char: str, layout: Layout) -> Iterable[tuple[int, ...]]:
        strokes = layout.strokes(char)
        if strokes is not None:
            return strokes
        others = layouts_with(char, self._keymaps)
        raise MachineError(
            f"{self._monitor.name}: the keyboard layout {layout.name!r} ({layout.where}) has no "
            f"{char!r} (U+{ord(char):04X}). "
            + (
                f"Layouts that have it: {', '.join(others)}; the guest must use the same one."
                if others
                else "No layout that QEMU has does."
            )
        )

    def _check_running(self) -> None:
        status = self._monitor.execute("query-status")["status"]
        if status not in _RUNNING:
            raise MachineError(
                f"{self._monitor.name} is not running but {status}: no key reaches it."
            )

    def _ready(self) -> str | None:
        """Return the virtio keyboard whose queue tells the room, if the guest uses one."""
        self._check_running()
        try:
            for device in self._monitor.execute("x-query-virtio"):
                path = device["path"]
                if device["name"] != "virtio-input" or "keyboard" not in str(
                    self._monitor.execute("qom-get", {"path": path, "property": "type"})
                ):
                    continue
                queue = self._monitor.execute(
                    "x-query-virtio-queue-status", {"path": path, "queue": 0}
                )
                if queue["vring-avail"] and queue["vring-num"] and self._room(path) is not None:
                    return str(path)
        except (QmpError, KeyError, TypeError):
            pass  # these commands may change with any QEMU, and are not in each
        return None

    def _room(self, queue: str) -> int | None:
        """Return how many events the guest has room for, None if that can't be had."""
        try:
            element = self._monitor.execute(
                "x-query-virtio-queue-element", {"path": queue, "queue": 0}
            )
            room: int = (element["avail"]["idx"] - element["used"]["idx"]) % 0x10000
        except (QmpError, KeyError, TypeError):
            return None
        return room

    def _tap(self, keys: list[dict[str, object]], queue: str | None) -> None:
        if queue is not None:
            poll(
                lambda: (room := self._room(queue)) is None or room >= _ROOM,
                f"{self._monitor.name} to read what was typed before",
                timeout=PATIENCE,
                interval=0.005,
                longest=0.05,
            )
        events = [(key, True) for key in keys] + [(key, False) for key in reversed(keys)]
        self._monitor.execute(
            "input-send-event",
            {
                "events": [
                    {"type": "key", "data": {"key": key, "down": down}} for key, down in events
                ]
            },
        )


def _number(number: int) -> dict[str, object]:
    return {"type": "number", "data": number}


def _key(name: str) -> dict[str, object]:
    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,4}", name):
        return _number(int(name, 16))
    # HMP's one abbreviation (index_from_key in QEMU's ui/input-keymap.c and hmp-cmds.c).
    return {"type": "qcode", "data": "less" if name == "<" else name}
