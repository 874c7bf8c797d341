# What the guest has of the hypervisor's side.
{
  lib,
  config,
  options,
  ...
}:
let
  inherit (lib) mkDefault mkIf;
  cfg = config.vm;
  underQemu = options.virtualisation ? memorySize;
in
{
  config = mkIf cfg.enable {
    services.qemuGuest.enable = mkDefault cfg.guest.qemu;
    virtualisation = lib.optionalAttrs (!underQemu) {
      # Not in the VM that QEMU runs: there the service would wait for VirtualBox' device.
      virtualbox.guest.enable = mkDefault cfg.guest.virtualbox;
      vmware.guest.enable = mkDefault cfg.guest.vmware;
    };
  };
}
