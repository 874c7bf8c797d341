# The system as it is on a disk: its consoles, and what a machine that has no
# hardware-configuration.nix would be missing.
{
  lib,
  config,
  options,
  pkgs,
  ...
}:
let
  inherit (lib) mkIf optionalAttrs;
  cfg = config.vm;
  underQemu = options.virtualisation ? memorySize;
  # The VM and the images say themselves where their disk is. What is left is the system that is
  # deployed: it comes onto a disk that one of these images was. (An option that only images have is
  # `image.fileName`; `virtualisation.diskSize` is one of every machine.)
  installed = !underQemu && !((options.image or { }) ? fileName);

  # Weaker than any other module's mkDefault, for whoever says something of disks knows better.
  suggest = lib.mkOverride 1200;

  # nixpkgs' VMware image boots with EFI only, and systemd-boot is for EFI.
  efi = cfg.backend == "vmware" || config.boot.loader.systemd-boot.enable;

  # What nixpkgs calls the root of its images.
  root = "/dev/disk/by-label/nixos";

  serial = "console=${if pkgs.stdenv.hostPlatform.isAarch64 then "ttyAMA0" else "ttyS0"},115200n8";
  screen = "console=tty0";

  grub = {
    qemu.devices = suggest [ "/dev/vda" ];
    virtualbox.devices = suggest [ "/dev/sda" ];
    vmware = {
      devices = suggest [ "nodev" ];
      efiSupport = suggest true;
      efiInstallAsRemovable = suggest true;
    };
  };
in
{
  config = mkIf cfg.enable (
    lib.mkMerge [
      {
        # The last one is the first console: where one logs in and sees the boot.
        boot.kernelParams =
          if cfg.headless then
            [
              screen
              serial
            ]
          else
            [
              serial
              screen
            ];
      }
      # As profiles/qemu-guest.nix, which the VM itself has.
      (optionalAttrs (!underQemu) {
        boot.initrd = mkIf (cfg.backend == "qemu") {
          availableKernelModules = [
            "virtio_net"
            "virtio_pci"
            "virtio_mmio"
            "virtio_blk"
            "virtio_scsi"
            "9p"
            "9pnet_virtio"
          ];
          kernelModules = [
            "virtio_balloon"
            "virtio_console"
            "virtio_rng"
            "virtio_gpu"
          ];
        };
      })
      (optionalAttrs installed {
        # Of a disk that somebody else has laid out, no partition is made larger.
        boot.growPartition = suggest (config.fileSystems."/".device or null == root);
        boot.loader.grub = grub.${cfg.backend};
        fileSystems."/" = suggest {
          device = root;
          fsType = "ext4";
          autoResize = true;
        };
        fileSystems."/boot" = mkIf efi (suggest {
          device = "/dev/disk/by-label/ESP";
          fsType = "vfat";
        });
      })
    ]
  );
}
