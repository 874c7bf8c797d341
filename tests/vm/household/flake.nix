# A server and a laptop as their owners keep them: for their own disks, cards and secrets, with
# nothing about VMs.
{
  description = "The machines of a household.";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    let
      machine =
        modules:
        nixpkgs.lib.nixosSystem {
          system = "x86_64-linux";
          modules = modules ++ [ ./common.nix ];
        };
    in
    {
      nixosConfigurations = {
        server = machine [
          ./sops.nix
          ./server.nix
        ];
        laptop = machine [
          ./age.nix
          ./laptop.nix
        ];
      };
    };
}
