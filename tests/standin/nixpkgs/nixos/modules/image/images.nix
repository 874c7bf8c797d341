# system.build.images: the configuration once more for each image format, with what image.modules.<format> adds
# (contract: nixpkgs' module of this name).
{ lib, config, extendModules, ... }:
let
  inherit (lib) mkOption types;
  disk = format: efiSupport: {
    imports = [ ../virtualisation/disk-image.nix ];
    image = { inherit format efiSupport; };
  };
  formats = {
    qemu = disk "qcow2" false;
    qemu-efi = disk "qcow2" true;
    raw = disk "raw" false;
    raw-efi = disk "raw" true;
    virtualbox = ../virtualisation/virtualbox-image.nix;
    vmware = ../virtualisation/vmware-image.nix;
    iso = ../installer/cd-dvd/iso-image.nix;
  };
  noImageItself = lib.mkIf (!config.system.build ? image);
  finish = name: variant:
    let
      inherit (variant) config;
      inherit (config.image) filePath;
      image = config.system.build.image
        or (throw "Module for `system.build.images.${name}` misses required `system.build.image` option.");
    in image // { passthru = image.passthru or { } // { inherit config filePath; }; };
in {
  options.image.modules = mkOption {
    type = types.attrsOf types.deferredModule;
    description = "What makes an image of the configuration, by format: `system.build.images.<format>`.";
  };
  config = {
    image.modules = noImageItself formats;
    system.build.images = noImageItself
      (lib.mapAttrs (name: module: finish name (extendModules { modules = [ module ]; })) config.image.modules);
  };
}
