# virtualisation.diskSize: of the virtual machine, and of images.
{ lib, config, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.virtualisation;
in {
  options.virtualisation = {
    diskSizeAutoSupported = mkOption { type = types.bool; default = true; internal = true; };
    diskSize = mkOption {
      type = types.either (types.enum [ "auto" ]) types.ints.positive;
      default = if cfg.diskSizeAutoSupported then "auto" else 1024;
      description = "Root disk in MiB.";
    };
  };
  config.assertions = [ {
    assertion = cfg.diskSize != "auto" || cfg.diskSizeAutoSupported;
    message = "Setting virtualisation.diskSize to `auto` is not supported by the current image build or vm runner; "
      + "use an explicit size.";
  } ];
}
