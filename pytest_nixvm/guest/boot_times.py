"""How long the guest's boot took, by systemd's own clock."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_nixvm.guest.systemd import Systemd, parse_properties

# An emulated guest that is busy takes half a minute for the critical chain.
_TIMEOUT = 300.0

_STAMPS = ("Firmware", "Loader", "InitRD", "Userspace", "Finish")

# systemd.time(7): what systemd-analyze prints, "1min 2.345s" for one.
_UNITS = {
    "y": 31557600.0,
    "month": 2629800.0,
    "w": 604800.0,
    "d": 86400.0,
    "h": 3600.0,
    "min": 60.0,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "μs": 1e-6,
}
_SPAN = re.compile(r"([\d.]+)(y|month|w|d|h|min|ms|us|μs|s)\b")


@dataclass(frozen=True)
class BootTimes:
    """The boot in seconds, stage by stage. A stage that the guest does not tell of is None.

    `firmware` and `loader` are known to UEFI guests only. `kernel` is the time until the initrd's
    systemd runs (or the system's, where there is no initrd with systemd: `initrd` is None then, and
    the scripts of another initrd count as the kernel's). `userspace` is None until the
    boot is `finished`.

    `blame` has units with the seconds that they took to start, longest first, `critical_chain` what
    `systemd-analyze critical-chain` prints; both are empty until the boot is finished,
    or if they were not asked for.
    """

    finished: bool
    firmware: float | None
    loader: float | None
    kernel: float | None
    initrd: float | None
    userspace: float | None
    blame: tuple[tuple[str, float], ...] = ()
    critical_chain: str = ""

    @property
    def total(self) -> float | None:
        """The seconds from power-on to the end of the boot; None until it is finished."""
        if self.userspace is None:
            return None
        before = (self.firmware, self.loader, self.kernel, self.initrd)
        return self.userspace + sum(stage or 0.0 for stage in before)


def boot_times(systemd: Systemd, *, details: bool = True) -> BootTimes:
    """Ask the guest, for `blame` and `critical_chain` only with `details`.

    Raises `MachineError` when systemd does not answer.
    """
    names = ",".join(f"{name}TimestampMonotonic" for name in _STAMPS)
    shown = systemd.call("show", "--no-pager", f"--property={names}")
    if not shown.ok:
        raise systemd.no_answer(shown.stderr)
    stamps = {
        name.removesuffix("TimestampMonotonic"): int(value) / 1e6
        for name, value in parse_properties(shown.stdout).items()
        if value.isdigit()
    }
    if not stamps.get("Finish") or not details:
        return _stages(stamps)
    blame = systemd.run(["systemd-analyze", "blame", "--no-pager"], _TIMEOUT)
    chain = systemd.run(["systemd-analyze", "critical-chain", "--no-pager"], _TIMEOUT)
    return _stages(stamps, parse_blame(blame.stdout), chain.stdout if chain.ok else "")


def _stages(
    stamps: Mapping[str, float], blame: tuple[tuple[str, float], ...] = (), chain: str = ""
) -> BootTimes:
    # The kernel's start is 0; the firmware's and the loader's are counted back from there.
    firmware, loader, initrd, userspace, finish = (stamps.get(name, 0.0) for name in _STAMPS)
    return BootTimes(
        finished=bool(finish),
        firmware=firmware - loader if firmware else None,
        loader=loader or None,
        kernel=initrd or userspace or None,
        initrd=userspace - initrd if initrd and userspace else None,
        userspace=finish - userspace if finish else None,
        blame=blame,
        critical_chain=chain,
    )


def parse_blame(text: str) -> tuple[tuple[str, float], ...]:
    """Return the units of `systemd-analyze blame` with their seconds."""
    found = []
    for line in text.splitlines():
        *span, unit = line.split() or [""]
        if span and (seconds := parse_span(" ".join(span))) is not None:
            found.append((unit, seconds))
    return tuple(found)


def parse_span(text: str) -> float | None:
    """Return a time span like "1min 2.3s" in seconds; None for any other text."""
    parts = _SPAN.findall(text)
    if not parts or _SPAN.sub("", text).strip():
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)
