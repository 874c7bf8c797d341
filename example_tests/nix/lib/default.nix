# How this household makes its machines: pytest-nixvm's library, with our inputs and our people.
inputs:
let
  inherit (inputs) home-manager nixpkgs pytest-nixvm;
  users = import ./users.nix;

  # Whatever is made has these; `inputs` is an argument of every module.
  common = {
    inherit nixpkgs home-manager;
    specialArgs = { inherit inputs; };
  };
in
{
  inherit users;
  inherit (pytest-nixvm.lib)
    apps
    checks
    image
    images
    machines
    ;

  # A system from DIRECTORY/configuration.nix, and home.nix if it is there. `machine` is
  # { name, directory }, and whatever else is to differ: user, users, system, modules.
  mkSystem =
    machine:
    pytest-nixvm.lib.mkSystem (
      common
      // {
        user = users.owner;
        users = users.household;
      }
      // machine
    );

  # The same for a virtual machine, with the options vm.*.
  mkVmSystem = machine: pytest-nixvm.lib.mkVmSystem (common // { user = users.vmUser; } // machine);

  mkDarwinSystem =
    { name, ... }:
    throw ''
      ${name}: Macs are made by nix-darwin. Add it to the inputs of flake.nix, and have mkDarwinSystem in lib/default.nix be
      { directory, ... }: inputs.nix-darwin.lib.darwinSystem { modules = [ (directory + "/configuration.nix") ]; };
    '';
}
