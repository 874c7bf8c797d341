# The `vm` options: what a virtual machine is made of.
{ config, lib, ... }:
let
  cfg = config.vm;

  # "512M", "20G" or "1T"; anything else is an error that names the option and the value.
  size = lib.types.strMatching "[1-9][0-9]*[MGT]";

  mebibytes =
    text:
    let
      parts = builtins.match "([0-9]+)([MGT])" text;
      unit = {
        M = 1;
        G = 1024;
        T = 1024 * 1024;
      };
    in
    lib.toInt (builtins.elemAt parts 0) * unit.${builtins.elemAt parts 1};
in
{
  options.vm = {
    enable = lib.mkEnableOption "running this configuration in a virtual machine";
    diskSize = lib.mkOption {
      type = size;
      default = "8G";
      example = "20G";
      description = "Size of the root disk.";
    };
    memorySize = lib.mkOption {
      type = size;
      default = "1G";
      example = "512M";
      description = "Size of the memory.";
    };
    cores = lib.mkOption {
      type = lib.types.ints.positive;
      default = 2;
      description = "Number of virtual CPUs.";
    };
    headless = lib.mkOption {
      type = lib.types.bool;
      default = true;
      description = "Whether the machine has no display, only its serial console.";
    };
  };

  config = lib.mkIf cfg.enable {
    # These options exist only in the variant that `system.build.vm` is made of.
    virtualisation.vmVariant.virtualisation = {
      diskSize = mebibytes cfg.diskSize;
      memorySize = mebibytes cfg.memorySize;
      inherit (cfg) cores;
      graphics = !cfg.headless;
    };

    services.qemuGuest.enable = true;

    # `system.build.vm` brings its own disk; these two are for `nix flake check` and for images.
    fileSystems."/" = lib.mkDefault {
      device = "/dev/disk/by-label/nixos";
      fsType = "ext4";
    };
    boot.loader.grub.device = lib.mkDefault "/dev/vda";
  };
}
