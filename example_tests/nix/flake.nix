{
  description = "The machines of one household";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    let
      lib = import ./lib { inherit nixpkgs; };

      # A directory of this name is in machines/vms.
      vmMachines = [
        "dev-vm"
        "test-vm"
      ];
    in
    {
      inherit lib;

      nixosConfigurations = nixpkgs.lib.genAttrs vmMachines (name: lib.mkVmSystem { inherit name; });
    };
}
