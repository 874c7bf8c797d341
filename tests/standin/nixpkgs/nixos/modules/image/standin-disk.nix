# The stand-in's own: what all images have in common. They boot with nothing but themselves: Debian's files, which a
# virtual machine has on a drive of their own, are in a file beside the store; and the initrd knows the buses of
# VirtualBox, VMware and of QEMU's defaults besides virtio.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types;
  inherit (config.system.build) toplevel;
in {
  options.standin.disk = {
    efi = mkOption { type = types.bool; default = false; };
    make = mkOption { type = types.raw; readOnly = true; };
  };
  config = {
    standin.disk.make = { name, finish }: import ../virtualisation/system-image.nix {
      inherit pkgs name finish toplevel;
      inherit (config.system.build) installBootLoader closure;
      inherit (config.standin.disk) efi;
      base = pkgs.standin.base.out;
      size = config.virtualisation.diskSize;
    };
    standin.initrd = pkgs.standin.imageInitrd;
    # GRUB boots a bzImage, and only that.
    standin.unpackedKernel = lib.mkDefault false;
    system.build = {
      installBootLoader =
        lib.mkOverride 90 (pkgs.writeScript "install-grub" (builtins.readFile ../install-grub.sh));
      # What is in the image's store.
      closure = if config.standin.hasNix then pkgs.closureInfo { rootPaths = [ toplevel ]; }
        else pkgs.standin.run "closure-info" {
        exportReferencesGraph = [ "graph" toplevel ];
      } ''
        mkdir -p $out; sort -u graph | grep "^$NIX_STORE/" > $out/store-paths
      '';
    };
  };
}
