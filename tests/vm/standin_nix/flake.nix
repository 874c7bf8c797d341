# What the stand-in's nix and its Home Manager are tried with; tests/vm/test_standin_nix.py says how.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";
  inputs.home-manager.url = "github:nix-community/home-manager/release-25.11";
  inputs.home-manager.inputs.nixpkgs.follows = "nixpkgs";

  outputs =
    { nixpkgs, home-manager, ... }:
    let
      machine =
        more:
        nixpkgs.lib.nixosSystem {
          modules = [
            home-manager.nixosModules.home-manager
            (
              { pkgs, ... }:
              {
                nixpkgs.hostPlatform = "x86_64-linux";
                networking.hostName = "target";
                system.stateVersion = "25.11";
                fileSystems."/".device = "/dev/disk/by-label/nixos";
                boot.loader.grub.device = "/dev/vda";
                services.openssh.enable = true;
                environment.systemPackages = [ pkgs.nix ];
                users.users.alice.isNormalUser = true;
                home-manager = {
                  useGlobalPkgs = true;
                  useUserPackages = true;
                  backupFileExtension = "before";
                  extraSpecialArgs.greeting = "hi";
                  users.alice =
                    { greeting, pkgs, ... }:
                    {
                      home.stateVersion = "25.11";
                      home.packages = [ pkgs.hello ];
                      home.file."notes/${greeting}.txt".text = "${greeting} there\n";
                      home.sessionVariables.GREETING = greeting;
                      xdg.configFile."tool/settings".source = ./flake.nix;
                      programs.home-manager.enable = true;
                      programs.bash = {
                        enable = true;
                        shellAliases.greet = "echo ${greeting}";
                      };
                      programs.git = {
                        enable = true;
                        settings.user.name = "Alice Example";
                      };
                    };
                };
              }
            )
            more
          ];
        };
    in
    {
      nixosConfigurations.target = machine { };
      # Copied to the guest by a test, and switched to.
      nixosConfigurations.second = machine {
        environment.etc."second".text = "yes\n";
        home-manager.users.alice.home.file."notes/new.txt".text = "new\n";
      };
    };
}
