# A machine and what may become of it: each specialisation is a candidate to switch to.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    let
      inherit (nixpkgs) lib;
      machine = name: module: {
        ${name} = lib.nixosSystem {
          modules = [
            module
            {
              nixpkgs.hostPlatform = "x86_64-linux";
              networking.hostName = lib.mkDefault name;
              virtualisation.vmVariant.virtualisation = {
                graphics = false;
                cores = 2;
              };
              system.stateVersion = "25.11";
            }
          ];
        };
      };
      service =
        extra:
        lib.recursiveUpdate {
          wantedBy = [ "multi-user.target" ];
          script = "exec sleep infinity";
        } extra;
    in
    {
      nixosConfigurations =
        machine "fixed" { system.switch.enable = false; }
        // machine "switched" (
          { pkgs, ... }:
          {
            services.openssh.enable = true;
            users.users.bob.isNormalUser = true;
            environment.etc.gone.text = "gone\n";
            environment.etc.copied = {
              mode = "0440";
              text = "copied\n";
            };
            system.switch.inhibitors.weather = "dry";
            systemd.services = {
              same = service { };
              changed = service { };
              described = service { description = "before"; };
              removed = service { };
              kept = service { unitConfig.X-StopOnRemoval = false; };
              reloaded = service {
                reload = "touch /run/reloaded";
                reloadTriggers = [ "1" ];
              };
              not-restarted = service { restartIfChanged = false; };
              at-once = service { stopIfChanged = false; };
              with-socket = service { };
            };
            systemd.sockets.with-socket = {
              wantedBy = [ "sockets.target" ];
              socketConfig.ListenStream = "/run/with-socket";
            };

            specialisation = lib.mapAttrs (_: configuration: { inherit configuration; }) {
              other = {
                networking.hostName = "other";
                services.openssh.settings.PasswordAuthentication = false;
                users.users.alice.isNormalUser = true;
                environment.systemPackages = [ pkgs.hello ];
                environment.etc = {
                  gone.enable = false;
                  copied.enable = false;
                  fresh.text = "fresh\n";
                };
                systemd.tmpfiles.rules = [ "d /var/lib/made 0750 root root -" ];
                systemd.services = {
                  changed.serviceConfig.Nice = 5;
                  described.description = lib.mkForce "after";
                  removed.enable = false;
                  kept.enable = false;
                  reloaded.reloadTriggers = lib.mkForce [ "2" ];
                  not-restarted.serviceConfig.Nice = 5;
                  at-once.serviceConfig.Nice = 5;
                  with-socket.serviceConfig.Nice = 5;
                  fresh = service { };
                };
              };
              failing.systemd.services = {
                fails = service {
                  serviceConfig.Type = "oneshot";
                  script = lib.mkForce "exit 3";
                };
                changed = {
                  serviceConfig.Type = "oneshot";
                  script = lib.mkForce "exit 3";
                };
                loops = service {
                  serviceConfig.Restart = "always";
                  serviceConfig.RestartSec = 60;
                  script = lib.mkForce "exit 3";
                };
              };
              refused.system.preSwitchChecks.too-late = "echo it is too late; false";
              inhibited.system.switch.inhibitors.weather = lib.mkForce "wet";
              unbootable.system.build.installBootLoader = "${pkgs.writeShellScript "no-boot-loader" "exit 1"}";
              another-init.system.extraSystemBuilderCmds = "echo 2 > $out/init-interface-version";
              half-active.system.activationScripts.broken = "false";
              manager.systemd.settings.Manager.DefaultLimitNOFILE = 2048;
            };
          }
        );
    };
}
