"""Waits: for files, ports and sockets in the guest, and for time to pass there."""

from __future__ import annotations

from pytest_nixvm.guest.result import CommandResult
from pytest_nixvm.guest.socket_waits import port_wait, unix_socket_wait
from pytest_nixvm.guest.waits import GuestWait, file_wait, wait_in_guest
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, Guest


class Waits(Guest):
    """The waits of the NixOS test driver.

    Each runs in the guest and ends within a tenth of a second of what it waits for. They raise
    `WaitTimeoutError` after `timeout` seconds, with what is there instead, and `MachineError` at
    once for what can't be waited for.
    """

    def wait_for_file(self, filename: str, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait until a file exists.

        `filename` is shell text, as in the NixOS test driver: `~`, variables and globs work, and a
        name with blanks needs quotes of its own. One match of a glob is enough.
        """
        self._wait_in_guest(file_wait(filename), timeout)

    def wait_for_open_port(
        self, port: int, addr: str = "localhost", timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Wait until something in the guest takes TCP connections on a port of `addr`."""
        self._wait_in_guest(port_wait(port, addr), timeout)

    def wait_for_closed_port(
        self, port: int, addr: str = "localhost", timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Wait until a TCP port of `addr` takes no connection, tried in the guest."""
        self._wait_in_guest(port_wait(port, addr, closed=True), timeout)

    def wait_for_open_unix_socket(
        self, addr: str, is_datagram: bool = False, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Wait until a process listens on a unix socket, or has bound a datagram socket.

        `addr` is a path, as shell text, or `@name` for a socket in the abstract namespace.
        """
        self._wait_in_guest(unix_socket_wait(addr, datagram=is_datagram), timeout)

    def sleep(self, secs: float) -> None:
        """Let `secs` seconds pass in the guest, which is also proof that it still runs.

        A wait for what one waits for is better. The guest's clock may be slower than the host's.
        """
        with self.transcript.note("wait", f"{secs:g} s of the guest's time"):
            # A guest that is emulated on a busy host may take several times as long.
            self.run(["sleep", f"{secs:g}"], timeout=max(DEFAULT_TIMEOUT, 4 * secs), check=True)

    def _wait_in_guest(self, wait: GuestWait, timeout: float) -> None:
        def run(script: str, seconds: float) -> CommandResult:
            return self.run(script, timeout=seconds)

        with self.transcript.note("wait", wait.goal):
            wait_in_guest(wait, run, where=self.name, timeout=timeout)
