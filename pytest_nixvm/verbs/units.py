"""systemd in the VM: units, the journal, how long the boot took."""

from __future__ import annotations

from pytest_nixvm.errors import MachineError
from pytest_nixvm.guest.boot_times import BootTimes, boot_times
from pytest_nixvm.guest.journal import TIMEOUT, Journal, Since, cursor, read_journal, text_after
from pytest_nixvm.guest.result import Command, CommandResult
from pytest_nixvm.guest.systemd import Systemd, full_name
from pytest_nixvm.guest.unit import Unit
from pytest_nixvm.verbs.guest import DEFAULT_TIMEOUT, Guest


class Units(Guest):
    """systemd."""

    def unit(self, name: str, user: str | None = None) -> Unit:
        """Return a unit, of `user`'s own manager if that is given. It need not exist.

        "sshd" is "sshd.service".
        """
        return Unit(self.systemd(user), name)

    def failed_units(self) -> tuple[str, ...]:
        """Return the names of the units that have failed."""
        return self.systemd().failed_units()

    def boot_times(self, *, details: bool = True) -> BootTimes:
        """Return how long the boot took, by systemd's clock.

        The stages are had at once; which unit took how long, and the critical chain, may take an
        emulated guest half a minute: `details=False` leaves those out. Raises `MachineError`.
        """
        return boot_times(self.systemd(), details=details)

    def systemd(self, user: str | None = None) -> Systemd:
        """Return the machine's systemd, or `user`'s own manager."""
        return Systemd(self._run_for_systemd, where=self.name, user=user)

    def _run_for_systemd(self, command: Command, timeout: float) -> CommandResult:
        return self.run(command, timeout=timeout)

    # --- the journal ---------------------------------------------------------------------------

    def journal(
        self,
        *,
        since: Since | None = None,
        until: Since | None = None,
        unit: str | None = None,
        priority: int | str | None = None,
        boot: int | str | None = 0,
        grep: str | None = None,
        lines: int | None = None,
        user: str | None = None,
        timeout: float = TIMEOUT,
    ) -> Journal:
        """Return the journal's entries that fit all of it, oldest first.

        `since` and `until` are a time with its zone, seconds since the epoch, or a text as
        systemd.time(7) has it, like "-5min"; all in the guest's time. `unit` is what a unit has
        logged and systemd about it, of `user`'s own manager if that is given. `priority` is that
        and what is graver ("err" or 3), or a range ("info..err"). `boot` is 0 for this boot, -1 for
        the one before, or its id; None is all. `grep` is a Perl expression for messages, which
        ignores case when it is in lower case. `lines` keeps the newest.

        `journal().text` is all of it as a person reads it. Raises `MachineError` if the journal
        can't be read, or one of the arguments means nothing to journalctl.
        """
        return read_journal(
            self._run_for_systemd,
            where=self.name,
            matches=self.systemd(user).matches(unit) if unit is not None else (),
            since=since,
            until=until,
            priority=priority,
            boot=boot,
            grep=grep,
            lines=lines,
            timeout=timeout,
        )

    def journal_cursor(self) -> str:
        """Return where the journal ends now, for `journal_text`. Empty if there is no entry."""
        return cursor(self._run_for_systemd, where=self.name)

    def journal_text(self, after: str = "", timeout: float = TIMEOUT) -> str:
        """Return everything that was logged after a cursor, as `journalctl -o short-precise` does.

        All of this boot for an empty cursor. Raises `MachineError` for what is no cursor, and
        `CommandTimeoutError` after `timeout` seconds.
        """
        return text_after(self._run_for_systemd, after, where=self.name, timeout=timeout)

    # --- the NixOS test driver's verbs ---------------------------------------------------------

    def systemctl(self, q: str, user: str | None = None) -> tuple[int, str]:
        """Run `systemctl q`, where `q` is shell text; return its exit status and stdout.

        With `user` it is `systemctl --user` as that user.
        """
        if user is None:
            result = self.run(f"systemctl {q}")
        else:
            scope = "XDG_RUNTIME_DIR=/run/user/$(id -u) systemctl --user"
            result = self.run(f"{scope} {q}", user=user)
        return result.returncode, result.stdout

    def get_unit_info(self, unit: str, user: str | None = None) -> dict[str, str]:
        """Return what `systemctl show` says of a unit, by name."""
        return self.systemd(user).properties(unit)

    def get_unit_property(self, unit: str, property: str, user: str | None = None) -> str:
        """Return one property of a unit. Raises `MachineError` if it has no such property."""
        found = self.systemd(user).properties(unit, property)
        if property not in found:
            raise MachineError(
                f"{full_name(unit)} on {self.name} has no property {property!r}; "
                "get_unit_info has all that it has."
            )
        return found[property]

    def require_unit_state(self, unit: str, require_state: str = "active") -> None:
        """Raise `MachineError` with status and journal unless the unit's ActiveState is that."""
        systemd = self.systemd()
        state = systemd.properties(unit, "ActiveState").get("ActiveState", "")
        if state != require_state:
            raise MachineError(
                f"{full_name(unit)} on {self.name} is {state}, and should be {require_state}.\n"
                f"{systemd.report(unit)}"
            )

    def start_job(self, jobname: str, user: str | None = None) -> tuple[int, str]:
        """Start a unit; return systemctl's exit status and output. `unit(…).start()` raises."""
        return self.systemctl(f"start {jobname}", user)

    def stop_job(self, jobname: str, user: str | None = None) -> tuple[int, str]:
        """Stop a unit; return systemctl's exit status and output. `unit(…).stop()` raises."""
        return self.systemctl(f"stop {jobname}", user)

    def wait_for_unit(
        self, unit: str, user: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        """Wait until a systemd unit is active (of `user`'s own manager, if given).

        Raises `MachineError` at once when the unit can't become active by itself: it has failed,
        does not exist, or nothing is under way that would start it; `WaitTimeoutError` after
        `timeout` seconds. Both show the unit's status and the end of its journal.
        """
        with self.transcript.note("wait", full_name(unit)) as entry:
            self.systemd(user).wait_for_unit(unit, timeout)
            entry.outcome = "active"
