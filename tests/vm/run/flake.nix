# A machine to be used, not tested: what `nixvm run` starts.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    {
      nixosConfigurations.desk = nixpkgs.lib.nixosSystem {
        modules = [
          {
            nixpkgs.hostPlatform = "x86_64-linux";
            networking.hostName = "desk";
            networking.firewall.allowedTCPPorts = [ 8080 ];
            services.openssh.enable = true;
            users.users.alice = {
              isNormalUser = true;
              password = "opensesame";
            };
            # It greets whoever connects.
            systemd.sockets.greeting = {
              wantedBy = [ "sockets.target" ];
              listenStreams = [ "8080" ];
              socketConfig.Accept = true;
            };
            systemd.services."greeting@".serviceConfig = {
              ExecStart = "/run/current-system/sw/bin/echo good day";
              StandardOutput = "socket";
            };
            virtualisation.vmVariant.virtualisation = {
              graphics = false;
              cores = 2;
              memorySize = 768;
            };
            system.stateVersion = "25.11";
          }
        ];
      };
    };
}
