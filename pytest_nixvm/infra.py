"""Testinfra (https://testinfra.readthedocs.io) on a VM: a backend, and packages as NixOS has them.

Imported only where Testinfra is installed.
"""

from __future__ import annotations

import re
from typing import Any

import testinfra.backend
from testinfra.backend.base import BaseBackend, CommandResult
from testinfra.host import Host
from testinfra.modules.package import Package

from pytest_nixvm.errors import MachineError
from pytest_nixvm.verbs.infra import MACHINES, Infra

# The links of the system's and the users' profiles lead to the packages that are installed. What
# these depend on is only known to nix-store, which a VM for tests may be without.
_LIST = """
for root in /run/current-system/sw /etc/profiles/per-user/*; do
  [ -e "$root" ] || continue
  find "$root/" "$root/bin/" "$root/share/" -maxdepth 2 -type l -printf '%l\\n' 2>/dev/null
done
nix-store --query --requisites /run/current-system 2>/dev/null
exit 0
"""
_STORE_NAME = re.compile(r"^/nix/store/[0-9a-z]{32}-([^/\n]+)", re.MULTILINE)
_OUTPUT = re.compile(r"-(bin|dev|doc|info|lib|man|out)$")


def split_name(name: str) -> tuple[str, str]:
    """Split a store path's name into package and version, as builtins.parseDrvName does.

    The version begins after the first dash that no letter follows; an output's name ends it.
    https://nix.dev/manual/nix/stable/language/builtins#builtins-parseDrvName
    """
    found = re.search(r"-(?=[^A-Za-z])", name)
    if found is None:
        return _OUTPUT.sub("", name), ""
    return name[: found.start()], _OUTPUT.sub("", name[found.end() :])


class NixPackage(Package):  # type: ignore[misc]
    """A package of the running NixOS system, by its name in the store: `git`, `openssh`."""

    @classmethod
    def get_module_class(cls, host: Host) -> type[NixPackage]:  # noqa: ARG003 - Testinfra's signature
        """This class: the guests are NixOS."""
        return cls

    def _versions(self) -> set[str]:
        names = set(_STORE_NAME.findall(self.check_output(_LIST)))
        pairs = [split_name(name) for name in names if not name.endswith(".drv")]
        return {version for name, version in pairs if name == self.name}

    @property
    def is_installed(self) -> bool:
        """Whether the package is in a profile, or in the system's closure if nix-store is there."""
        return bool(self._versions())

    @property
    def version(self) -> str:
        """The version; the highest by its numbers if there are several."""
        found = self._versions()
        assert found, f"The package {self.name} is not installed."  # noqa: S101 - as Testinfra's own
        return max(found, key=lambda text: [int(part) for part in re.findall(r"\d+", text)])

    @property
    def release(self) -> str:
        """NixOS has no releases of a package. Raises `NotImplementedError`."""
        raise NotImplementedError("Packages of NixOS have a version and no release.")


class NixvmBackend(BaseBackend):  # type: ignore[misc]
    """Testinfra over `vm.run`. The host is `[user@]machine`; as root, sudo is runuser."""

    NAME = "nixvm"

    def __init__(self, hostspec: str, *args: Any, **kwargs: Any) -> None:
        spec = self.parse_hostspec(hostspec)
        name, self._user = spec.name, spec.user
        if f"{spec.user}@{spec.name}" in MACHINES:  # dev-vm@qcow2: no user before a machine
            name, self._user = f"{spec.user}@{spec.name}", None
        super().__init__(name, *args, **kwargs)

    def set_host(self, host: Host) -> None:
        """Give the host packages as NixOS has them."""
        super().set_host(host)
        host.package = NixPackage.get_module(host)

    def get_encoding(self) -> str:
        """UTF-8, as everywhere on NixOS."""
        return "utf-8"

    def get_sudo_command(self, command: str, sudo_user: str | None) -> str:
        """Become another user: by runuser, or by sudo where commands do not run as root."""
        if self._user not in (None, "root"):
            return str(super().get_sudo_command(command, sudo_user))
        line = self.quote("runuser -u %s -- /bin/sh -c %s", sudo_user or "root", command)
        return str(line)

    def run(self, command: str, *args: str, **_: Any) -> CommandResult:
        """Run a command in the VM. Raises `MachineError` if no such VM runs."""
        text = self.get_command(command, *args)
        result = self._machine().run(text, user=self._user)
        return self.result(
            result.returncode, text.encode(), result.stdout_bytes, result.stderr_bytes
        )

    def _machine(self) -> Infra:
        running = {name: vm for name, vm in MACHINES.items() if vm.is_up()}
        if self.hostname not in running:
            names = ", ".join(sorted(running)) or "none"
            raise MachineError(
                f"Testinfra asked for nixvm://{self.hostname}, and no machine of that name runs "
                f"in this pytest process (running: {names}). Start it in a fixture before."
            )
        return running[self.hostname]


def register() -> None:
    """Make `nixvm://` known to Testinfra. May be called again."""
    testinfra.backend.BACKENDS["nixvm"] = f"{__name__}.{NixvmBackend.__name__}"
