"""The VM as a Testinfra host."""

from __future__ import annotations

from abc import abstractmethod
from importlib.util import find_spec
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from pytest_nixvm.errors import MachineError
from pytest_nixvm.verbs.guest import Guest

if TYPE_CHECKING:
    from testinfra.host import Host

    from pytest_nixvm.flake.build import VmBuild

MACHINES: WeakValueDictionary[str, Infra] = WeakValueDictionary()
"""The machines of this process by name, the newest of each: `nixvm://` finds them here."""


class Infra(Guest):
    """Testinfra."""

    build: VmBuild

    @abstractmethod
    def is_up(self) -> bool:
        """Whether the machine runs."""

    @property
    def host(self) -> Host:
        """The VM as a Testinfra host: `vm.host.service("sshd").is_running`.

        Raises `MachineError` without the extra `testinfra`.
        """
        if find_spec("testinfra") is None:
            raise MachineError(
                "vm.host needs Testinfra: pip install pytest-nixvm[testinfra] installs it."
            )
        import testinfra

        from pytest_nixvm.infra import register

        register()
        return testinfra.get_host(f"nixvm://{self.build.name}")
