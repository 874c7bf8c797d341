"""systemd in the VM: units, the journal, how long the boot took."""

from __future__ import annotations

from pytest_nixvm.guest.systemd import Systemd
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, Guest


class Units(Guest):
    """systemd."""

    def wait_for_unit(
        self, unit: str, user: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Wait until a systemd unit is active (of `user`'s own manager, if given).

        Raises `MachineError` at once when the unit can't become active by itself: it has failed,
        does not exist, or nothing is under way that would start it; `WaitTimeoutError` after
        `timeout` seconds. Both show the unit's status and the end of its journal.
        """
        self.systemd(user).wait_for_unit(unit, timeout)

    def systemd(self, user: str | None = None) -> Systemd:
        """Return the machine's systemd, or `user`'s own manager."""
        return Systemd(
            lambda argv, timeout: self.run(argv, timeout=timeout), where=self.name, user=user
        )

    def failed_units(self) -> tuple[str, ...]:
        """Return the names of the units that have failed."""
        return self.systemd().failed_units()
