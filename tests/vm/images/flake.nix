# A machine of which the tests boot images. It says nothing of a VM, as a physical one would not; what QEMU needs to boot
# its image is what anybody would give it.
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
              environment.systemPackages = [ pkgs.hello ];
              services.openssh.enable = true;
              users.users.root.openssh.authorizedKeys.keys = [ ];
              image.modules.qemu.virtualisation.diskSize = 2048;
            }
          )
        ];
      };
    };
}
