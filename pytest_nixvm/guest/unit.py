"""One unit in the guest, as `vm.unit("sshd")` gives it."""

from __future__ import annotations

from pytest_nixvm.guest.journal import Journal, Since, read_journal
from pytest_nixvm.guest.systemd import Systemd, full_name

JOB_TIMEOUT = 300.0
"""Seconds that a job on a unit may take."""


class Unit:
    """A systemd unit. It need not exist: `load_state` is "not-found" then.

        sshd = vm.unit("sshd")                  # "sshd.service"; vm.unit("x", user="alice")
        assert sshd.is_active
        sshd.restart(timeout=60)
        assert "Server listening" in sshd.journal(lines=10).text

    Each property asks the guest anew. All times are in seconds. What asks systemd raises
    `MachineError` when that does not answer, or a user has no manager running.
    """

    def __init__(self, systemd: Systemd, name: str) -> None:
        self._systemd = systemd
        self.name = full_name(name)

    def __repr__(self) -> str:
        user = "" if self._systemd.user is None else f" of {self._systemd.user}"
        return f"<Unit {self.name}{user} on {self._systemd.where}>"

    def _get(self, name: str) -> str:
        return self._systemd.properties(self.name, name).get(name, "")

    # --- what it is ----------------------------------------------------------------------------

    @property
    def properties(self) -> dict[str, str]:
        """All that `systemctl show` says, by name; what it says several times has several lines."""
        return self._systemd.properties(self.name)

    @property
    def state(self) -> str:
        """ActiveState: active, reloading, inactive, failed, activating, deactivating and others."""
        return self._get("ActiveState")

    @property
    def sub_state(self) -> str:
        """SubState, which depends on the type: running, exited, dead, listening, mounted."""
        return self._get("SubState")

    @property
    def load_state(self) -> str:
        """LoadState: loaded, not-found, bad-setting, error, masked."""
        return self._get("LoadState")

    @property
    def result(self) -> str:
        """How it ended the last time: success, exit-code, signal, timeout, oom-kill."""
        return self._get("Result")

    @property
    def main_pid(self) -> int | None:
        """The pid of a service's main process; None if there is none."""
        return int(self._get("MainPID") or 0) or None

    @property
    def is_active(self) -> bool:
        """Whether it is active, or active and reloading."""
        return self.state in ("active", "reloading", "refreshing")

    @property
    def failed(self) -> bool:
        """Whether it has failed."""
        return self.state == "failed"

    @property
    def status(self) -> str:
        """What `systemctl status` shows, without the journal."""
        return self._systemd.status(self.name)

    # --- what it has said ----------------------------------------------------------------------

    def journal(
        self,
        *,
        since: Since | None = None,
        until: Since | None = None,
        lines: int | None = None,
        boot: int | str | None = 0,
    ) -> Journal:
        """Return what it has logged, and systemd about it; arguments as for `vm.journal`."""
        return read_journal(
            self._systemd.run,
            where=self._systemd.where,
            matches=self._systemd.matches(self.name),
            since=since,
            until=until,
            lines=lines,
            boot=boot,
        )

    # --- what is done to it --------------------------------------------------------------------

    def start(self, timeout: float = JOB_TIMEOUT) -> None:
        """Start it, and wait until systemd takes it for started.

        Raises `MachineError` with its status and journal when that fails, `WaitTimeoutError` after
        `timeout` seconds; the same holds for `stop`, `restart` and `reload`.
        """
        self._systemd.job("start", self.name, timeout)

    def stop(self, timeout: float = JOB_TIMEOUT) -> None:
        """Stop it, and wait until it has ended."""
        self._systemd.job("stop", self.name, timeout)

    def restart(self, timeout: float = JOB_TIMEOUT) -> None:
        """Stop it if it runs, and start it."""
        self._systemd.job("restart", self.name, timeout)

    def reload(self, timeout: float = JOB_TIMEOUT) -> None:
        """Have it read its configuration anew. A unit that can't do that raises `MachineError`."""
        self._systemd.job("reload", self.name, timeout)

    def wait_active(self, timeout: float = JOB_TIMEOUT) -> None:
        """Wait until it is active; as `vm.wait_for_unit`."""
        self._systemd.wait_for_unit(self.name, timeout)
