# The image format `iso`: a medium that starts the configuration. The root is in memory, the store an image on the medium
# under an overlay in memory, /iso the medium. A BIOS starts it (El Torito); nixpkgs' starts with EFI, too.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.isoImage;
  inherit (config.system.build) toplevel;
  media = lib.mkImageMediaOverride;
in {
  imports = [ ../../image/file-options.nix ../../image/standin-disk.nix ../../virtualisation/disk-size-option.nix ];
  options.isoImage = mkOption {
    default = { };
    description = "The medium. Of nixpkgs' other options none has an effect.";
    type = types.submodule {
      freeformType = types.attrsOf types.anything;
      options = {
        volumeID = mkOption { type = types.strMatching ".{1,32}"; default = "nixos-25.11-x86_64"; };
        edition = mkOption { type = types.str; default = ""; };
      };
    };
  };
  config = {
    boot.loader.grub.enable = media false;
    boot.loader.timeout = lib.mkDefault 10;
    fileSystems = media {
      "/" = { fsType = "tmpfs"; options = [ "mode=0755" ]; };
      "/iso" = {
        device = "/dev/disk/by-label/${cfg.volumeID}";
        fsType = "iso9660";
        neededForBoot = true;
        options = [ "ro" ];
      };
      "/nix/.ro-store" = {
        device = "/iso/nix-store.erofs";
        fsType = "erofs";
        neededForBoot = true;
        options = [ "ro" "loop" ];
      };
      "/nix/.rw-store" = { device = "tmpfs"; fsType = "tmpfs"; options = [ "mode=0755" ]; neededForBoot = true; };
      "/nix/store" = {
        device = "overlay";
        fsType = "overlay";
        neededForBoot = true;
        options = [ "lowerdir=/nix/.ro-store" "upperdir=/nix/.rw-store/upper" "workdir=/nix/.rw-store/work" ];
      };
    };
    swapDevices = media [ ];
    system.build.installBootLoader = lib.mkOverride 80 "/usr/bin/true"; # nothing to write to
    image = {
      baseName = lib.mkDefault
        "nixos${lib.optionalString (cfg.edition != "") "-${cfg.edition}"}-${config.system.nixos.label}-${
          pkgs.stdenv.hostPlatform.system}";
      extension = "iso";
      filePath = lib.mkDefault "iso/${config.image.fileName}";
    };
    system.build.image = config.system.build.isoImage;
    system.build.isoImage = pkgs.standin.runAsRoot "${config.image.fileName}" {
      inherit (config.system.build) closure;
      inherit toplevel;
      inherit (cfg) volumeID;
      base = pkgs.standin.base.out;
      grub = "/usr/lib/grub/i386-pc";
      file = config.image.fileName;
    } ''
      umask 022
      mkdir -p store cd/boot/grub $out/iso
      xargs cp -al -t store < $closure/store-paths 2> /dev/null || {
        find store -type d -exec chmod u+w {} +; rm -rf store; mkdir store
        xargs cp -a -t store < $closure/store-paths
      }
      mkfs.erofs --quiet --force-uid=0 --force-gid=0 -T 0 -x-1 cd/nix-store.erofs store
      find store -type d -exec chmod u+w {} + # else the build's directory can't be removed
      ln "$base" cd/standin-base.img 2> /dev/null || cp "$base" cd/standin-base.img
      cp -L $toplevel/kernel cd/boot/bzImage; cp -L $toplevel/initrd cd/boot/initrd
      read -r params < $toplevel/kernel-params || true # no line feed at its end
      if [ -s $closure/registration ]; then # see nix.nix
        cp $closure/registration cd/nix-path-registration; params="$params regInfo=/iso/nix-path-registration"
      fi
      printf 'set timeout=0\nset default=0\nmenuentry "NixOS" {\n  linux %s init=%s/init %s\n  initrd %s\n}\n' \
        /boot/bzImage $toplevel "$params" /boot/initrd > cd/boot/grub/grub.cfg
      grub-mkimage -O i386-pc-eltorito -d $grub -p /boot/grub -o cd/boot/grub/eltorito.img \
        biosdisk iso9660 normal configfile linux echo test
      xorriso -as mkisofs -quiet -R -V "$volumeID" -b boot/grub/eltorito.img -no-emul-boot -boot-load-size 4 \
        -boot-info-table --grub2-boot-info -o $out/iso/"$file" cd
      mkdir $out/nix-support; echo "file iso $out/iso/$file" > $out/nix-support/hydra-build-products
    '';
  };
}
