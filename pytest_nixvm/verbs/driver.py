"""What else scripts of the NixOS test driver say to a machine: logging, connecting, consoles."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pytest_nixvm.verbs.power import Power

# The switch stops everything that the initrd runs, this channel's own unit included, so it is
# asked for and not waited for.
_SWITCH_ROOT = "systemctl start --no-block initrd-switch-root.service"


class Driver(Power):
    """The NixOS test driver's verbs that have no subject of their own."""

    @contextmanager
    def nested(self, msg: str, attrs: Mapping[str, str] | None = None) -> Iterator[None]:  # noqa: ARG002 - the driver's signature
        """Print `msg`, and after the block how long it took; the transcript has it as well."""
        with self.transcript.note("note", msg):
            print(f"{self.name}: {msg}")
            began = time.monotonic()
            try:
                yield
            finally:
                print(f"{self.name}: (finished: {msg}, in {time.monotonic() - began:.2f} seconds)")

    def log(self, msg: str) -> None:
        """Print `msg` with the machine's name; the transcript has it as well."""
        with self.transcript.note("note", msg):
            print(f"{self.name}: {msg}")

    def connect(self) -> None:
        """Start the machine if it is down, wait for its reboot if there is one, and see it answer.

        There is no connection to make: every verb finds its channel by itself. Raises what `start`
        raises.
        """
        if not self.is_up() and self.fault is None:
            self.start()
        self.run(["true"], check=True)

    def switch_root(self) -> None:
        """Go on from the initrd into the real system, for a machine that was held in its initrd.

        Does nothing on one that has done so, as every machine here has that is ready.
        """
        if not self.run("test -e /etc/initrd-release").ok:
            return
        with self.transcript.note("power", "switch_root"):
            self.run(_SWITCH_ROOT, check=True)

    def release(self) -> None:
        """Cut the power and close every channel, as the driver does at the end of a test."""
        with self.transcript.note("power", "release"):
            self.kill()

    def shell_interact(self, address: str | None = None) -> None:
        """Hand a shell in the guest to whoever sits at the terminal; return when it ends.

        For debugging. `address` is for the driver's own scripts: a socat address has no use here,
        as the shell is on pytest's terminal.
        """
        from pytest_nixvm import interact

        if address is not None:
            self.log(f"shell_interact: the shell is on this terminal, not on {address}.")
        interact.shell(self)

    def console_interact(self) -> None:
        """Hand the serial console to whoever sits at the terminal; return when they leave it.

        For debugging.
        """
        from pytest_nixvm import interact

        interact.console(self)
