# A machine with a mistake for each check that needs no test code, and one that does not boot.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    let
      machine =
        name: module:
        nixpkgs.lib.nixosSystem {
          modules = [
            {
              nixpkgs.hostPlatform = "x86_64-linux";
              networking.hostName = name;
              virtualisation.vmVariant.virtualisation = {
                graphics = false;
                cores = 2;
              };
              fileSystems."/".device = nixpkgs.lib.mkDefault "/dev/vda";
              boot.loader.grub.device = "/dev/vda";
              system.stateVersion = "25.11";
            }
            module
          ];
        };
    in
    {
      nixosConfigurations = builtins.mapAttrs machine {
        faulty =
          { pkgs, ... }:
          {
            services.openssh.enable = true;
            boot.kernelModules = [ "nosuchmodule" ];
            users.users = {
              bob = {
                isNormalUser = true;
                hashedPassword = "opensesame";
                openssh.authorizedKeys.keys = [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIcut bob" ];
              };
              carol.isNormalUser = true;
            };
            networking.firewall.allowedTCPPorts = [ 8443 ];
            systemd.sockets.listen = {
              wantedBy = [ "sockets.target" ];
              listenStreams = [ "5555" ];
              socketConfig.Accept = true;
            };
            systemd.services = {
              web = {
                wantedBy = [ "multi-user.target" ];
                serviceConfig = {
                  ExecStart = "${pkgs.coreutils}/bin/sleep infinity";
                  Restrat = "always";
                };
              };
              # It opens a port behind the firewall's back.
              open = {
                wantedBy = [ "multi-user.target" ];
                after = [ "firewall.service" ];
                serviceConfig = {
                  Type = "oneshot";
                  RemainAfterExit = true;
                };
                script = ''
                  ${pkgs.nftables}/bin/nft insert rule inet nixos-fw input tcp dport 5555 accept ||
                    /run/current-system/sw/bin/iptables -I nixos-fw -p tcp --dport 5555 -j ACCEPT
                '';
              };
              "listen@".serviceConfig.ExecStart = "${pkgs.coreutils}/bin/true";
              broken = {
                wantedBy = [ "multi-user.target" ];
                serviceConfig.Type = "oneshot";
                script = "echo no configuration; exit 6";
              };
              phone-home = {
                wantedBy = [ "multi-user.target" ];
                serviceConfig.Type = "oneshot";
                script = "echo could not resolve host: example.org; exit 6";
              };
              restless = {
                wantedBy = [ "multi-user.target" ];
                unitConfig.StartLimitIntervalSec = 0;
                serviceConfig = {
                  Restart = "always";
                  RestartSec = 2;
                };
                script = "echo no database; sleep 1; exit 3";
              };
              stubborn = {
                wantedBy = [ "multi-user.target" ];
                serviceConfig.TimeoutStopSec = 5;
                script = "trap '' TERM; while :; do sleep 1; done";
              };
            };
          };

        # No initrd to run, and no root of its own: the kernel panics.
        panics.boot.kernelParams = [ "rdinit=/bin/false" ];
      };
    };
}
