# image.*: how the image's file is called, and where it is in system.build.image.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.image;
in {
  options.image = {
    baseName = mkOption {
      type = types.str;
      default = "nixos-image-${config.system.nixos.label}-${pkgs.stdenv.hostPlatform.system}";
    };
    extension = mkOption { type = types.str; };
    fileName = mkOption { type = types.str; default = "${cfg.baseName}.${cfg.extension}"; };
    filePath = mkOption { type = types.str; default = cfg.fileName; };
  };
}
