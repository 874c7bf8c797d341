"""A change on a real VM that boots through its own boot loader, there and back."""

from __future__ import annotations

import pytest

from pytest_nixvm.errors import MachineError, SwitchError
from pytest_nixvm.guest.switching import Outcome

FLAKE = """
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    {
      nixosConfigurations.till = nixpkgs.lib.nixosSystem {
        modules = [
          { CHANGE }
          {
            nixpkgs.hostPlatform = "x86_64-linux";
            networking.hostName = "till";
            services.openssh.enable = true;
            virtualisation.vmVariant.virtualisation = {
              graphics = false;
              cores = 2;
            };
            systemd.services.till = {
              wantedBy = [ "multi-user.target" ];
              script = "exec sleep infinity";
            };
            # What has been broken for long is no fault of a change.
            systemd.services.broken = {
              wantedBy = [ "multi-user.target" ];
              serviceConfig.Type = "oneshot";
              script = "exit 3";
            };
            system.stateVersion = "25.11";
          }
        ];
      };
    };
}
"""

CHANGE = """
  systemd.services.till.environment.SHOP = "new";
  systemd.services.qemu-guest-agent.environment.NEW = "1";
  specialisation.full.configuration.system.preSwitchChecks.disk = "echo full >&2; exit 1";
"""


@pytest.fixture
def change(fleet_of, tmp_path):
    for name, text in (("old", ""), ("new", CHANGE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "flake.nix").write_text(FLAKE.replace("CHANGE", text))
    fleet = fleet_of("machines")
    old, new = (f"path:{tmp_path}/{name}" for name in ("old", "new"))
    change = fleet.change("till", base=old, candidate=new, boot_loader=True)
    yield change
    fleet.end(change.vm)


def test_there_and_back_through_the_boot_loader(change):
    change.before.succeed("echo apples > /var/lib/sold; sync")

    # The agent is restarted by it, through which all commands go.
    result = change.switch()
    assert result.ok
    assert result.outcome is Outcome.UNITS_FAILED
    assert result.failed_units == result.failed_before == ("broken.service",)
    assert {"qemu-guest-agent.service", "till.service"} <= set(result.happened.restarted)
    assert not result.surprises
    with pytest.raises(MachineError, match=r"change\.vm"):
        _ = change.before

    with pytest.raises(SwitchError, match="a pre-switch check refused it: disk"):
        change.specialisation("full")
    assert change.current == change.candidate.toplevel

    rebooted = change.reboot()
    assert (rebooted.how, rebooted.generation) == ("boot loader", "candidate")
    assert rebooted.ok

    back = change.rollback()
    assert back.ok
    assert back.generation == "base"
    assert change.current == change.default == change.base.toplevel
    assert change.vm.succeed("cat /var/lib/sold") == "apples\n"
