# The stand-in's own: a system that is deployed onto a disk which one of the images was. It finds its root there, and a
# switch puts it into GRUB's menu.
{ lib, config, options, pkgs, ... }:
let
  inherit (config.boot.loader.grub) devices;
  # A virtual machine and an image say themselves what they start from.
  isInstalled = !(options.virtualisation ? memorySize) && !(options.image ? fileName)
    && config.fileSystems."/".device or null == "/dev/disk/by-label/nixos"
    && devices != [ ] && devices != [ "nodev" ];
in {
  config = lib.mkIf isInstalled {
    standin.initrd = pkgs.standin.imageInitrd;
    standin.unpackedKernel = lib.mkDefault false;
    system.build.installBootLoader =
      lib.mkOverride 900 (pkgs.writeScript "install-grub" (builtins.readFile ../install-grub.sh));
  };
}
