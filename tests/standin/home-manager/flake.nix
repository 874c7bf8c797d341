{
  description = "A stand-in for Home Manager: the files and packages of users, as a module of NixOS";

  outputs =
    { self }:
    {
      nixosModules = {
        home-manager = import ./nixos.nix;
        default = self.nixosModules.home-manager;
      };
      lib.homeManagerConfiguration = throw "the stand-in for Home Manager is a module of NixOS, and nothing but that";
    };
}
