{ nixpkgs }:
let
  users = import ./users.nix;
in
{
  # A NixOS system from machines/vms/NAME/configuration.nix.
  # `user` is who uses it (see users.nix), `modules` are added to its own.
  mkVmSystem =
    {
      name,
      system ? "x86_64-linux",
      user ? users.vmUser,
      modules ? [ ],
    }:
    nixpkgs.lib.nixosSystem {
      specialArgs.userConfig = user;
      modules = [
        { nixpkgs.hostPlatform = system; }
        (../machines/vms + "/${name}/configuration.nix")
      ]
      ++ modules;
    };
}
