# Machines that show what the options of the module `vm` come to; tests/vm/test_vm_options.py says
# how. The test writes here.nix: what this host has.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";
  inputs.pytest-nixvm.url = "github:pytest-nixvm/pytest-nixvm?dir=pytest_nixvm/nixos";

  outputs =
    { nixpkgs, pytest-nixvm, ... }:
    let
      inherit (pytest-nixvm.lib) machines mkVmSystem vmUser;
      here = import ./here.nix;
      # "swordfish", made with `mkpasswd -m sha-512`.
      hashedPassword = "$6$abcdefgh$nXozMQ7eIF4OiwaKAhepst9mtOKKwNBYsZ.fglGECyVpFcHnUxZl1rg3LFqBimZ7VM0sJWgFd.52RjaQ/cpR90";
      authorizedKeys = [ here.key ];
      user = vmUser // {
        inherit authorizedKeys hashedPassword;
      };
      shared = {
        username = "alice";
        inherit authorizedKeys hashedPassword;
      };
    in
    {
      nixosConfigurations = machines {
        names = [
          "options-vm"
          "additions-vm"
        ];
        directory = ./machines;
        make =
          { name, directory }:
          mkVmSystem {
            inherit
              nixpkgs
              name
              directory
              user
              ;
            users = [
              user
              shared
            ];
            specialArgs = { inherit here; };
          };
      };
    };
}
