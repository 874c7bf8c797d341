# What the stand-in's images are made of; tests/vm/test_standin_images.py says how.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    {
      nixosConfigurations.small = nixpkgs.lib.nixosSystem {
        modules = [
          (
            { pkgs, ... }:
            {
              nixpkgs.hostPlatform = "x86_64-linux";
              system.stateVersion = "25.11";
              networking.hostName = "small";
              fileSystems."/".device = "/dev/disk/by-label/nixos";
              boot.loader.grub.device = "/dev/vda";
              boot.kernelParams = [ "console=ttyS0,115200n8" ];
              environment.systemPackages = [ pkgs.hello ];
              systemd.services.report = {
                wantedBy = [ "multi-user.target" ];
                after = [ "dhcpcd.service" ];
                path = [
                  pkgs.hello
                  pkgs.iproute2
                  pkgs.util-linux
                ];
                script = ''
                  { hello; findmnt -no SOURCE /; ip -4 -o addr; echo reported; } > /dev/ttyS0
                '';
              };
              image.modules.qemu.virtualisation.diskSize = 2048;
            }
          )
        ];
      };
    };
}
