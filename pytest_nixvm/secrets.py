"""A machine's secrets: throwaway values that its VM was given, and values that a test gives it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_nixvm.errors import MachineError
from pytest_nixvm.flake.build import Secret
from pytest_nixvm.flake.declared import value_file
from pytest_nixvm.flake.words import near

if TYPE_CHECKING:
    from pytest_nixvm.machine import Machine

TIMEOUT = 120.0
"""Seconds for the units of a secret to be restarted."""


class Secrets:
    """The secrets of one machine, by the names under which they are declared.

        nixvm_secrets["shop/database"] = "hunter2"
        assert nixvm_secrets["shop/database"] == "hunter2"      # as the machine has it

    A value is written where the machine expects it, with the declared owner, group and mode, and
    stays over switches and reboots of the VM. Units that the declaration wants restarted or
    reloaded for it are, if they run or have failed. What sops-nix makes of templates gets it at the
    next switch or reboot; /etc/shadow the hash of a password, too, if `users.mutableUsers` is off.
    """

    def __init__(self, vm: Machine) -> None:
        self._vm = vm

    def __iter__(self) -> Iterator[str]:
        return (secret.name for secret in self._vm.build.secrets)

    def __len__(self) -> int:
        return len(self._vm.build.secrets)

    def __getitem__(self, name: str) -> str:
        """Return the value that the machine has. Raises `MachineError` where there is none."""
        return self._vm.run(["cat", "--", self.declared(name).path], check=True).stdout

    def __setitem__(self, name: str, value: str) -> None:
        """Give the machine a value. Raises `MachineError` where that can't be done."""
        secret = self.declared(name)
        kept = value_file(name)
        self._write(value, kept, "0600", "root", "root")
        # sops-nix and agenix have a link at `path`; what it leads to is the file.
        path = self._vm.run(["readlink", "-m", "--", secret.path], check=True).stdout.strip()
        self._write(value, path, secret.mode, secret.owner, secret.group)
        # One that has failed for want of this value is not running, and yet it is to run now.
        wanted = secret.restart_units
        failed = [unit for unit in self._vm.failed_units() if unit in wanted] if wanted else []
        for verb, units in (
            ("reset-failed", failed),
            ("start", failed),
            ("try-restart", [unit for unit in wanted if unit not in failed]),
            ("try-reload-or-restart", secret.reload_units),
        ):
            if units:
                self._vm.run(["systemctl", verb, "--", *units], check=True, timeout=TIMEOUT)

    def declared(self, name: str) -> Secret:
        """Return what is declared of a secret. Raises `MachineError` if there is none so called."""
        for secret in self._vm.build.secrets:
            if secret.name == name:
                return secret
        names = list(self)
        raise MachineError(
            f"{self._vm.name} declares no secret {name!r}{near(name, names)} "
            f"It declares: {', '.join(names) or 'none'}. What sops-nix and agenix don't know of is "
            "named by the hook pytest_nixvm_secrets."
        )

    def _write(self, value: str, path: str, mode: str, owner: str, group: str) -> None:
        self._vm.run(
            ["install", "-D", "-T", "-m", mode, "-o", owner, "-g", group, "--", "/dev/stdin", path],
            stdin=value,
            check=True,
        )
