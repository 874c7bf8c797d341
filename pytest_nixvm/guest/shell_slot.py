"""One shell in the guest: started on its ports, given commands, ended and started again."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, BinaryIO, Protocol

from pytest_nixvm.errors import QmpError, ShellError
from pytest_nixvm.guest.shell_script import Places, starter
from pytest_nixvm.guest.shell_stream import Input, Output, ShellGoneError, Sink, Stream
from pytest_nixvm.qemu.ports import Pair
from pytest_nixvm.wait import Deadline

START_TIMEOUT = 30.0
"""Seconds for a shell to start; a tenth of one is usual, but the guest may be busy."""

_LOOK_EVERY = 2.0
_LOOK_WHILE_STARTING = 0.25


class Starting(Protocol):
    """A starter that runs in the guest."""

    def poll(self) -> str | None:
        """Return None while it runs or when it did well, else what it said."""


Launch = Callable[[str], Starting]
"""Runs a text with the guest's bash, somehow. Raises `ChannelError`."""


class State(Enum):
    """What is known of the shell on the ports."""

    NEW = "nothing was ever started"
    READY = "it waits for a command"
    STALE = "it was given up, or the guest was started anew"


class Slot:
    """One shell, its ports and sockets. Used by one thread at a time, except for `wake`, `fail`."""

    def __init__(
        self, pair: Pair, launch: Launch, is_open: Callable[[Pair], bool], places: Places
    ) -> None:
        self.pair = pair
        self.stream = Stream(pair)
        self.state = State.NEW
        self._launch = launch
        self._is_open = is_open
        self._places = places
        self._pid = ""
        self._has_cgroup = False
        self._marks: list[str] = []  # of the shell, then of what it was given; see `reap`
        self._rotating: str | None = None
        self._doubted = False

    @property
    def number(self) -> int:
        """Its place: 0 is on QEMU's command line."""
        return self.pair.number

    def doubt(self) -> None:
        """Look whether the shell is still there, now or before the next command. Any thread."""
        self._doubted = True
        self.stream.wake()

    def is_there(self) -> bool:
        """Whether the shell waits for a command; looks only if there was a doubt."""
        if self._doubted:
            self._doubted = False
            try:
                self._watch()
            except ShellGoneError:
                self.state = State.STALE
        return self.state is State.READY

    # --- the shell ---------------------------------------------------------------------------

    def start(self, timeout: float, out: Sink | None = None, err: Sink | None = None) -> None:
        """End what is on the ports and start a shell there.

        `out` and `err` get what the old one's command had still to say. Raises `ShellError` if
        there is no shell after `timeout` seconds, `AgentError` if the agent can't start one.
        """
        deadline = Deadline(timeout)
        dirty = self.state is not State.NEW
        self.state = State.STALE
        self._rotating = None
        self.stream.connect()
        nonce = secrets.token_hex(8)
        text = starter(
            slot=self.number,
            main=self.pair.main.name,
            error=self.pair.error.name,
            nonce=nonce,
            dirty=dirty,
            marks=tuple(self._marks),
            pid=self._pid,
            places=self._places,
        )
        starting = self._launch(text)
        source = Input(b"")
        said = "nothing"

        def on_main(words: list[str]) -> bool:
            nonlocal said
            said = words[0]
            if words[0] == "hello":
                self._pid = words[1]
                self._has_cgroup = words[2] == "cgroup"
                source.push(b"\n" + nonce.encode() + b"\n")
            return words[0] == "ready"

        def watch() -> None:
            trouble = starting.poll()
            if trouble is not None:
                raise ShellError(f"No shell can be started in the guest: {trouble.strip()}")

        outputs = (
            Output(nonce, out or _drop, on_main),
            Output(nonce, err or _drop, lambda _: True),
        )
        try:
            self.stream.exchange(source, outputs, deadline, watch, _LOOK_WHILE_STARTING)
        except TimeoutError:
            raise ShellError(
                f"The guest has started no shell within {timeout:g} s; it said {said}."
            ) from None
        finally:
            for output in outputs:
                output.flush()
        self._marks = [nonce]
        self._doubted = False
        self.state = State.READY

    def remembered(self) -> dict[str, Any]:
        """Return what `adopt` needs to go on with this shell in a clone of the machine."""
        return {"pid": self._pid, "cgroup": self._has_cgroup, "marks": self._marks[:1]}

    def adopt(self, remembered: Mapping[str, Any]) -> None:
        """Connect to a shell that waits on the ports already: the machine is a clone."""
        self.stream.connect()
        self._pid = str(remembered["pid"])
        self._has_cgroup = bool(remembered["cgroup"])
        self._marks = [str(mark) for mark in remembered["marks"]]
        self.state = State.READY

    def run(
        self,
        compose: Callable[[str | None], bytes],
        stdin: bytes | BinaryIO | None,
        out: Sink,
        err: Sink,
        deadline: Deadline,
    ) -> int:
        """Run a command and return its exit status. The shell has to be `READY`.

        `compose` makes the text, given the mark of the command where there are no cgroups.
        Raises `TimeoutError` at the deadline, `ShellGoneError` if the shell ends; then, and
        whatever else is raised, it is not ready any more.
        """
        nonce = secrets.token_hex(8)
        text = compose(None if self._has_cgroup else nonce)
        kind = "run" if stdin is None else "feed"
        source = Input(f"{kind} {len(text)} {nonce}\n".encode() + text, stdin)
        status = left = 0

        def on_mark(words: list[str]) -> bool:
            nonlocal status, left
            if words[0] == "input":
                source.stop()
                return False
            status, left = int(words[1]), int(words[2])
            source.stop()
            return True

        outputs = (
            self._after_rotation(Output(nonce, out, on_mark)),
            self._after_rotation(Output(nonce, err, on_mark)),
        )
        self.state = State.STALE
        self._marks.append(nonce)
        try:
            self.stream.exchange(source, outputs, deadline, self._watch, _LOOK_EVERY)
        finally:
            for output in outputs:
                output.flush()
        self._marks[1:] = []
        self._rotating = secrets.token_hex(8) if left else None
        if self._rotating is not None:
            # Now, not with the next command: what was left must not wait for somebody to read.
            self.stream.send(f"rotate 0 {self._rotating}\n".encode())
        self.state = State.READY
        return status

    def _after_rotation(self, output: Output) -> Output:
        """Drop what comes from the pipes that were given to what a command has left behind."""
        if self._rotating is None:
            return output
        return Output(self._rotating, _drop, lambda _: True, then=output)

    def _watch(self) -> None:
        try:
            is_open = self._is_open(self.pair)
        except QmpError:
            return  # QEMU is busy; there is a next time
        if not is_open:
            raise ShellGoneError


def _drop(_: bytes) -> None:
    pass
