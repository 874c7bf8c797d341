# A flake of somebody who has never heard of this plugin: other names, qemu-vm.nix imported by the
# configuration itself, a unit that fails, no sshd, a firewall that closes everything.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    inputs@{ self, nixpkgs }:
    {
      nixosConfigurations."Büro-server".config = throw "this one is broken on purpose";

      nixosConfigurations.kiosk = nixpkgs.lib.nixosSystem {
        system = "x86_64-linux";
        modules = [
          (
            { modulesPath, ... }:
            {
              imports = [ "${modulesPath}/virtualisation/qemu-vm.nix" ];
              networking.hostName = "till-7";
              networking.firewall.enable = true;
              networking.firewall.allowedTCPPorts = [ ];
              services.openssh.enable = false;
              virtualisation.memorySize = 768;
              virtualisation.graphics = false;
              systemd.services.till = {
                description = "A till that has lost its drawer";
                wantedBy = [ "multi-user.target" ];
                serviceConfig.Type = "oneshot";
                script = ''
                  echo "no drawer on /dev/ttyUSB0" >&2
                  exit 7
                '';
              };
              system.stateVersion = "24.11";
            }
          )
        ];
      };

      packages.x86_64-linux.till = self.nixosConfigurations.kiosk.config.system.build.vm;
    };
}
