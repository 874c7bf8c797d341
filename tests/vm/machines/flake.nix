# Machines that are not as one would like them, each in its own way.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    let
      machine =
        name: module:
        nixpkgs.lib.nixosSystem {
          modules = [
            module
            {
              nixpkgs.hostPlatform = "x86_64-linux";
              networking.hostName = name;
              services.openssh.enable = true;
              users.users.alice.isNormalUser = true;
              users.users.bob.isNormalUser = true;
              virtualisation.vmVariant.virtualisation = {
                graphics = false;
                cores = 2;
              };
              system.stateVersion = "25.11";
            }
          ];
        };

      # It can't be frozen, for three reasons: its shares, a disk of the host's, nvme. Somebody who
      # has put it together without extendModules has also left nothing for others to change.
      stubborn = builtins.removeAttrs (machine "stubborn" {
        virtualisation.vmVariant.virtualisation.qemu.options = [
          "-drive file=\"$STUBBORN_DISK\",format=raw,if=virtio"
          "$(truncate --size=16M nvme.img)-drive file=nvme.img,format=raw,if=none,id=fast"
          "-device nvme,serial=fast,drive=fast"
        ];
      }) [ "extendModules" ];
    in
    {
      nixosConfigurations = { inherit stubborn; } // builtins.mapAttrs machine {
        # A text console on the screen, whatever the kernel has for VGA.
        screen = {
          boot.kernelModules = [ "virtio_gpu" ];
          virtualisation.vmVariant.virtualisation = {
            graphics = nixpkgs.lib.mkForce true;
            qemu.options = [
              "-vga none"
              "-device virtio-gpu-pci"
            ];
          };
        };

        # Their sshd does not let everybody in.
        other-port.services.openssh.ports = [ 2222 ];
        no-root.services.openssh.settings.PermitRootLogin = "no";
        only-bob.services.openssh.settings.AllowUsers = [ "bob" ];
        keys-elsewhere.services.openssh.authorizedKeysFiles = nixpkgs.lib.mkForce [
          "/etc/ssh/authorized_keys.d/%u"
        ];
        walled-off.services.openssh.openFirewall = false;
        nobody.services.openssh.settings = {
          PermitRootLogin = "no";
          AllowUsers = [ "carol" ];
        };

        # They do not boot.
        # No initrd to run, and no root of its own: the kernel panics.
        panics.boot.kernelParams = [ "rdinit=/bin/false" ];
        # What local-fs.target needs fails: emergency mode.
        emergency.systemd.services.lost-disk = {
          description = "A disk that is not there";
          unitConfig = {
            DefaultDependencies = false;
            OnFailure = "emergency.target";
            OnFailureJobMode = "replace-irreversibly";
          };
          requiredBy = [ "local-fs.target" ];
          before = [ "local-fs.target" ];
          serviceConfig.Type = "oneshot";
          script = "exit 1";
        };
        # A root file system that is nowhere: the initrd gives up.
        rootless.virtualisation.vmVariant.virtualisation.rootDevice = "/dev/disk/by-label/lost";
        # A unit that never ends starting.
        hangs.systemd.services.endless = {
          wantedBy = [ "multi-user.target" ];
          serviceConfig = {
            Type = "oneshot";
            TimeoutStartSec = "infinity";
          };
          script = "sleep infinity";
        };
        # QEMU itself refuses.
        refused.virtualisation.vmVariant.virtualisation.qemu.options = [ "-device no-such-device" ];
      };
    };
}
