# A host that is deployed to, and what may become of it; tests/vm/test_deploy.py says how.
#
# Its VM is the machine itself (it imports qemu-vm.nix), so that the real system can run in it.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    let
      inherit (nixpkgs) lib;
      host =
        more:
        lib.nixosSystem {
          modules = [
            more
            (
              { modulesPath, pkgs, ... }:
              {
                imports = [ "${modulesPath}/virtualisation/qemu-vm.nix" ];
                nixpkgs.hostPlatform = "x86_64-linux";
                networking.hostName = "server";
                services.openssh.enable = lib.mkDefault true;
                services.qemuGuest.enable = true;
                environment.systemPackages = [ pkgs.nix ];
                virtualisation = {
                  graphics = false;
                  cores = 2;
                  useNixStoreImage = true;
                  writableStore = true;
                  sharedDirectories = lib.mkForce { };
                };
                # QEMU loads its kernel: there is no disk that could take a boot loader.
                system.build.installBootLoader = lib.mkForce "/run/current-system/sw/bin/true";
                # What had failed before is no fault of a deploy's.
                systemd.services.long-broken = {
                  wantedBy = [ "multi-user.target" ];
                  serviceConfig.Type = "oneshot";
                  script = "exit 3";
                };
                system.stateVersion = "25.11";
              }
            )
          ];
        };
    in
    {
      nixosConfigurations = lib.mapAttrs (_: host) {
        server = { };
        good.environment.etc.deployed.text = "yes\n";
        deaf.services.openssh.enable = false;
        failing.systemd.services = {
          broken = {
            wantedBy = [ "multi-user.target" ];
            after = [ "flapping.service" ];
            serviceConfig.Type = "oneshot";
            script = "sleep 2; exit 3"; # the other one has ended by then
          };
          # Never "failed": it waits for its next start.
          flapping = {
            wantedBy = [ "multi-user.target" ];
            serviceConfig = {
              Restart = "always";
              RestartSec = 300;
            };
            script = "exit 3";
          };
        };
      };
    };
}
