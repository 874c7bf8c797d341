"""What became of a deploy, and how that is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

NOBODY = "nobody is at work there any more"
"""A reason: the unit on the host is gone, and has not said how it ended."""


@dataclass(frozen=True)
class Result:
    """What became of it.

    `outcome` is overtaken where somebody else has switched the host meanwhile, unknown where the
    host can't be reached any more. `bad_loader`: what it boots could not be put back. `booted`:
    what a host runs that was restarted meanwhile, if it is neither `old` nor `new`.
    """

    name: str
    host: str
    outcome: Literal[
        "committed", "unchanged", "rolled-back", "rollback-failed", "overtaken", "unknown"
    ]
    old: str
    new: str
    generation: str
    reason: str = ""
    output: str = ""  # of the activation, where it did not go well
    interrupted: bool = False
    boot: bool = False
    bad_loader: bool = False
    booted: str = ""

    @property
    def ok(self) -> bool:
        """Whether the host has what it was to have."""
        return self.outcome in ("committed", "unchanged")

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        data = {**asdict(self), "ok": self.ok}
        del data["booted"]  # for the text only
        return data


def told(result: Result) -> str:
    """Say what became of a deploy, and what can be done now."""
    host, name = result.host, result.name
    login = f"ssh {host}"  # OpenSSH takes such a URL, with its port
    if result.outcome == "unchanged":
        return f"{host} has this {name} already, as generation {result.generation}."
    if result.outcome == "committed":
        done = "boots" if result.boot else "runs"
        return (
            f"{host} {done} {name}, generation {result.generation}"
            + (" from its next boot on.\n" if result.boot else ", also after a reboot.\n")
            + f"To go back by hand: {login} nixos-rebuild switch --rollback"
        )
    why = f" {result.reason.rstrip('.')}." if result.reason else ""
    if result.outcome == "unknown":
        text = f"It is not known whether {host} was switched to {name}:{why}\n"
        if not result.boot and NOBODY not in result.reason:
            text += f"It goes back to {result.old} by itself unless it has heard that all is well. "
        return text + f"Look: {login} journalctl -u nixvm-deploy"
    text = f"{host} was not switched to {name}:{why}"
    if result.outcome == "overtaken":
        return text + "\nIt is left as it is now."
    if result.outcome == "rollback-failed":
        text += "\nGoing back has failed as well."
        if not result.bad_loader:
            text += " Its boot default is the old generation: reboot it."
    else:
        runs = f"{result.booted}, its boot default" if result.booted else f"{result.old}, as before"
        text += f"\nIt runs {runs}."
    if result.bad_loader:
        text += (
            "\nWhat it boots could not be put back: mend that before a reboot. "
            f"{login} /nix/var/nix/profiles/system/bin/switch-to-configuration boot"
        )
    if "only booted" in result.reason:
        text += "\nHave it booted the next time: nixvm deploy --boot."
    if result.output.strip():
        text += "\nThe activation said:\n" + _indent(result.output)
    return text


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines()[-40:])
