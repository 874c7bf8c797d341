# The image formats that are a plain disk: `qemu`, `raw`, and the same with an EFI system partition.
{ lib, config, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.image;
in {
  imports = [ ../image/file-options.nix ../image/standin-disk.nix ./disk-size-option.nix ];
  options.image = {
    format = mkOption { type = types.enum [ "raw" "qcow2" ]; default = "qcow2"; };
    efiSupport = mkOption { type = types.bool; default = true; };
  };
  config = {
    boot.loader.grub.enable = lib.mkIf (!cfg.efiSupport) (lib.mkOptionDefault true);
    boot.loader.grub.devices = lib.mkIf (!cfg.efiSupport) (lib.mkDefault [ "/dev/vda" ]);
    boot.loader.systemd-boot.enable = lib.mkDefault cfg.efiSupport;
    boot.growPartition = lib.mkDefault true;
    fileSystems = lib.mkImageMediaOverride {
      "/" = { device = "/dev/disk/by-label/nixos"; autoResize = true; fsType = "ext4"; };
      "/boot" = lib.mkIf cfg.efiSupport { device = "/dev/disk/by-label/ESP"; fsType = "vfat"; };
    };
    # As in qemu-vm.nix: interpreted ACPI code takes a third of a second for each PCI device. Not in images that may find
    # an IDE controller: there it fails without.
    boot.kernelParams = [ "pci=noacpi" ];
    system.nixos.tags = [ cfg.format ] ++ lib.optional cfg.efiSupport "efi";
    image.extension = cfg.format;
    standin.disk.efi = cfg.efiSupport;
    system.build.image = config.standin.disk.make {
      name = "nixos-disk-image";
      finish = ''
        mkdir $out; qemu-img convert -f raw -O ${cfg.format} disk $out/${lib.escapeShellArg cfg.fileName}
      '';
    };
  };
}
