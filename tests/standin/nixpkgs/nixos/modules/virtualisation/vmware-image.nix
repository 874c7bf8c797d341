# The image format `vmware`: a VMDK. nixpkgs' boots with EFI only, this one with either firmware.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.vmware;
in {
  imports = [ ../image/file-options.nix ../image/standin-disk.nix ./disk-size-option.nix ];
  options.vmware = {
    vmDerivationName = mkOption {
      type = types.str;
      default = "nixos-vmware-${config.system.nixos.label}-${pkgs.stdenv.hostPlatform.system}";
    };
    vmSubformat = mkOption {
      type = types.enum [
        "monolithicSparse" "monolithicFlat" "twoGbMaxExtentSparse" "twoGbMaxExtentFlat" "streamOptimized"
      ];
      default = "monolithicSparse";
    };
    vmCompat6 = mkOption { type = types.bool; default = false; };
  };
  config = {
    boot.growPartition = true;
    boot.loader.grub = { device = "nodev"; efiSupport = true; efiInstallAsRemovable = true; };
    fileSystems = {
      "/" = { device = "/dev/disk/by-label/nixos"; autoResize = true; fsType = "ext4"; };
      "/boot" = { device = "/dev/disk/by-label/ESP"; fsType = "vfat"; };
    };
    virtualisation.vmware.guest.enable = true;
    system.nixos.tags = [ "vmware" ];
    image.extension = "vmdk";
    standin.disk.efi = true;
    system.build.image = config.system.build.vmwareImage;
    system.build.vmwareImage = config.standin.disk.make {
      name = cfg.vmDerivationName;
      finish = ''
        mkdir $out
        qemu-img convert -f raw -O vmdk -o compat6=${if cfg.vmCompat6 then "on" else "off"},subformat=${cfg.vmSubformat} \
          disk $out/${lib.escapeShellArg config.image.fileName}
      '';
    };
  };
}
