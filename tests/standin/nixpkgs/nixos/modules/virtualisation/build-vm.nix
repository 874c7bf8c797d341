# system.build.vm: the configuration once more, with qemu-vm.nix and what virtualisation.vmVariant adds; and
# vmWithBootLoader, which as in nixpkgs has its own variant and nothing of vmVariant.
{ lib, config, extendModules, ... }:
let
  variant = extendModules { modules = [ ./qemu-vm.nix ]; };
  # nixpkgs also sets useEFIBoot here, where the configuration has an EFI boot loader: the stand-in has GRUB for all.
  withBootLoader = variant.extendModules { modules = [ { virtualisation.useBootLoader = true; } ]; };
  option = made: lib.mkOption {
    inherit (made) type;
    default = { };
    description = "Configuration that holds only in the virtual machine.";
  };
in {
  options.virtualisation.vmVariant = option variant;
  options.virtualisation.vmVariantWithBootLoader = option withBootLoader;
  config.system.build = {
    vm = lib.mkDefault config.virtualisation.vmVariant.system.build.vm;
    vmWithBootLoader = lib.mkDefault config.virtualisation.vmVariantWithBootLoader.system.build.vm;
  };
}
