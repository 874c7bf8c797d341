{
  description = "A stand-in for nixpkgs: the NixOS module system and a guest that boots, made of Debian's packages";

  outputs = { ... }:
    let
      lib = import ./lib;
      systems = [ "x86_64-linux" "aarch64-linux" "x86_64-darwin" "aarch64-darwin" ];
      nixosSystem = import ./nixos/eval-config.nix { inherit lib; };
    in {
      lib = lib // { inherit nixosSystem; nixos.runTest = throw "the stand-in for nixpkgs has no NixOS tests"; };
      legacyPackages = lib.genAttrs systems (system: import ./. { inherit system; });
      nixosModules = { };
    };
}
