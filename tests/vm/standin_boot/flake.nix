# What the stand-in's boot loader and network are tried with; tests/vm/test_standin_boot.py says how.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { self, nixpkgs }:
    let
      machine =
        more:
        nixpkgs.lib.nixosSystem {
          modules = [
            {
              nixpkgs.hostPlatform = "x86_64-linux";
              system.stateVersion = "25.11";
              fileSystems."/".device = "/dev/disk/by-label/nixos";
              boot.loader.grub.device = "/dev/vda";
              services.openssh.enable = true;
            }
            more
          ];
        };
      # No shares: the two generations have to agree on what is mounted.
      loader =
        { modulesPath, ... }:
        {
          imports = [ "${modulesPath}/virtualisation/qemu-vm.nix" ];
          networking.hostName = "loader";
          virtualisation.useBootLoader = true;
          virtualisation.sharedDirectories = nixpkgs.lib.mkForce { };
          boot.kernelParams = [ "console=ttyS0,115200n8" ];
        };
      toplevel = name: self.nixosConfigurations.${name}.config.system.build.toplevel;
    in
    {
      nixosConfigurations = {
        first = machine {
          imports = [ loader ];
          virtualisation.additionalPaths = [ (toplevel "second") ];
        };
        second = machine (
          { pkgs, ... }:
          {
            imports = [ loader ];
            boot.kernelParams = [ "second=yes" ];
            environment.systemPackages = [ pkgs.hello ];
          }
        );

        # As a host with a fixed address is: its card has a name, and the tests' machine has that card.
        fixed = machine {
          networking = {
            hostName = "fixed";
            useDHCP = false;
            interfaces.enp3s0.ipv4.addresses = [
              {
                address = "10.0.2.15";
                prefixLength = 24;
              }
            ];
            defaultGateway = "10.0.2.2";
            nameservers = [ "10.0.2.3" ];
            firewall.interfaces.enp3s0.allowedTCPPorts = [ 8080 ];
          };
          services.udev.extraRules = ''
            SUBSYSTEM=="net", ACTION=="add", KERNEL=="eth0", NAME="enp3s0"
          '';
        };
        asking = machine {
          networking.hostName = "asking";
          networking.useDHCP = false;
          networking.interfaces.enp3s0.useDHCP = true;
          services.udev.extraRules = ''
            SUBSYSTEM=="net", ACTION=="add", KERNEL=="eth0", NAME="enp3s0"
          '';
        };
        usual = machine {
          networking.hostName = "usual";
          virtualisation.vmVariantWithBootLoader.environment.etc.variant.text = "loader";
        };
      };
    };
}
