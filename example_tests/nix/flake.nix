{
  description = "The machines of one household";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

    # What makes systems and images out of the directories in machines/, and the options vm.*.
    pytest-nixvm.url = "github:pytest-nixvm/pytest-nixvm?dir=pytest_nixvm/nixos";

    home-manager.url = "github:nix-community/home-manager/release-25.11";
    home-manager.inputs.nixpkgs.follows = "nixpkgs";
  };

  outputs =
    inputs:
    let
      lib = import ./lib inputs;

      # Physical machines: each has a directory in machines/.
      nixosMachines = [
        "dell-xps-15"
        "thinkpad-home-server"
      ];

      # Virtual ones: each has a directory in machines/vms/. `nixvm init vm NAME` adds one.
      vmMachines = [
        "dev-vm"
        "test-vm"
      ];

      # Macs, in machines/ as well; lib.mkDarwinSystem says what they need.
      darwinMachines = [ ];

      nixosConfigurations =
        lib.machines {
          names = nixosMachines;
          directory = ./machines;
          make = lib.mkSystem;
        }
        // lib.machines {
          names = vmMachines;
          directory = ./machines/vms;
          make = lib.mkVmSystem;
        };
    in
    {
      inherit lib nixosConfigurations;

      darwinConfigurations = lib.machines {
        names = darwinMachines;
        directory = ./machines;
        make = lib.mkDarwinSystem;
      };

      # nix build .#dev-vm-qcow2, or -raw, -iso, -ova, -vmdk
      packages = lib.images nixosConfigurations;

      # nix run .#dev-vm
      apps = lib.apps nixosConfigurations;

      # nix flake check: every machine builds.
      checks = lib.checks nixosConfigurations;
    };
}
