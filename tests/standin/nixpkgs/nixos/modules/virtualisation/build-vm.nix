# system.build.vm: the configuration once more, with qemu-vm.nix and what virtualisation.vmVariant adds.
{ lib, config, extendModules, ... }:
let variant = extendModules { modules = [ ./qemu-vm.nix ]; };
in {
  options.virtualisation.vmVariant = lib.mkOption {
    inherit (variant) type;
    default = { };
    description = "Configuration that holds only in the virtual machine.";
  };
  config.system.build.vm = lib.mkDefault config.virtualisation.vmVariant.system.build.vm;
}
