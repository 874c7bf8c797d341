{
  description = "A laptop: disks, encryption, a static address, secrets. None of it fits into a VM as it is.";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    {
      nixosConfigurations.laptop = nixpkgs.lib.nixosSystem {
        system = "x86_64-linux";
        modules = [
          ./modules.nix
          ./laptop.nix
        ];
      };
    };
}
