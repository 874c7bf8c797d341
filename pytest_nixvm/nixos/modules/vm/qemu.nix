# What QEMU is given: where nixpkgs' qemu-vm.nix is a part of the evaluation.
{
  lib,
  config,
  options,
  ...
}:
let
  inherit (lib) mkDefault mkIf;
  inherit (import ../../lib/sizes.nix) mebibytes;
  cfg = config.vm;
in
{
  config = mkIf cfg.enable (
    lib.optionalAttrs (options.virtualisation ? memorySize) {
      virtualisation = {
        memorySize = mkDefault (mebibytes cfg.memorySize);
        cores = mkDefault cfg.cores;
        graphics = mkDefault (!cfg.headless);
        restrictNetwork = mkDefault (cfg.networking.mode == "isolated");
        qemu.guestAgent.enable = mkDefault cfg.guest.qemu;
        forwardPorts = map (port: {
          from = "host";
          proto = port.protocol;
          host = {
            address = "127.0.0.1";
            port = port.host;
          };
          guest.port = port.guest;
        }) cfg.networking.forwardPorts;
      };
    }
  );
}
