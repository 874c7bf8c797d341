# A virtual machine, described once: `vm.*` says what it is, and the VM that nixpkgs builds
# (`system.build.vm`), its disk images and the installed system follow.
#
# The same modules are evaluated several times: as the machine's own system, in
# `virtualisation.vmVariant`, and once for each image. Which of them an evaluation is, its options
# say: that can be asked without asking for a value, so it can decide what is defined.
{
  imports = [
    ./options.nix
    ./qemu.nix
    ./folders.nix
    ./guest.nix
    ./installed.nix
    ./images.nix
  ];
}
