# What the virtual machines have in common. The options vm.* are pytest-nixvm's.
{
  config,
  inputs,
  lib,
  ...
}:
{
  imports = [ inputs.pytest-nixvm.nixosModules.vm ];

  config = lib.mkIf config.vm.enable {
    # Small: whoever reads the manual has it elsewhere.
    documentation.enable = lib.mkDefault false;
    # Whose account no password opens could not use sudo.
    security.sudo.wheelNeedsPassword = lib.mkDefault false;
  };
}
