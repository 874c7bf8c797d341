# What NixOS configurations need of pytest-nixvm. It has no inputs: `nixpkgs` and Home Manager are
# handed to its functions, so there is nothing to keep in step.
#
#     inputs.pytest-nixvm.url = "github:pytest-nixvm/pytest-nixvm?dir=pytest_nixvm/nixos";
{
  description = "Virtual machines beside physical ones in a NixOS flake, tested with pytest-nixvm";

  outputs =
    { ... }:
    {
      nixosModules = rec {
        # Not the path alone: `nix flake check` of older versions takes that for no module.
        vm.imports = [ ./modules/vm ];
        default = vm;
      };

      lib = import ./lib;

      templates = rec {
        vm = {
          # A link to the example in a checkout, where `nix flake init` of newer versions follows none.
          path = if (builtins.readDir ./.).layout == "symlink" then ../../example_tests/nix else ./layout;
          description = "Physical machines and VMs in one flake (`nixvm init` writes the same, and asks for names)";
          welcomeText = ''
            The guide to it is AGENTS.md. Alice and her password are in lib/users.nix: write down who you
            are instead. (`nixvm init` would have done so.) Then:

                git init && git add .
                pytest --nixvm-flake=.
          '';
        };
        default = vm;
      };
    };
}
