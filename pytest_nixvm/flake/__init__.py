"""From a flake reference to a built VM. Knows no QEMU and no pytest.

nix = Nix.find()
flake = Flake(FlakeReference.parse(".", Path.cwd()), nix=nix, cache=cache)
for machine in flake.machines():
    if machine.skip is None:
        vm = flake.build(machine.name)      # vm.start_script, vm.toplevel, vm.overrides
"""

from pytest_nixvm.flake.build import ALWAYS_REPLACED, MachineInfo, Override, VmBuild
from pytest_nixvm.flake.flake import Flake
from pytest_nixvm.flake.nix import Nix
from pytest_nixvm.flake.reference import FlakeReference

__all__ = [
    "ALWAYS_REPLACED",
    "Flake",
    "FlakeReference",
    "MachineInfo",
    "Nix",
    "Override",
    "VmBuild",
]
