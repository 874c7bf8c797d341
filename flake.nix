# pytest-nixvm for NixOS people: the plugin and the `nixvm` command as packages, and the Nix library.
#
#     nix run github:pytest-nixvm/pytest-nixvm -- init my-machines
#     nix develop github:pytest-nixvm/pytest-nixvm -c pytest --nixvm-flake=.
#
# A flake that needs only the library takes `github:pytest-nixvm/pytest-nixvm?dir=pytest_nixvm/nixos`:
# that one has no inputs.
{
  description = "Test NixOS configurations in VMs with pytest; VMs and physical machines in one flake";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      library = (import ./pytest_nixvm/nixos/flake.nix).outputs { };
      project = (lib.importTOML ./pyproject.toml).project;

      each =
        make:
        lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (
          system: make (nixpkgs.legacyPackages.${system}.extend self.overlays.default)
        );

      plugin =
        {
          buildPythonPackage,
          fetchPypi,
          hatchling,
          click,
          cryptography,
          filelock,
          paramiko,
          pexpect,
          platformdirs,
          pytest,
          qemu-qmp,
          rich,
        }:
        buildPythonPackage {
          pname = project.name;
          inherit (project) version;
          pyproject = true;
          # The example is what `nixvm init` writes.
          src = lib.fileset.toSource {
            root = ./.;
            fileset = lib.fileset.unions [
              ./pytest_nixvm
              ./example_tests
              ./pyproject.toml
              ./README.md
              ./LICENSE
            ];
          };
          build-system = [ hatchling ];
          dependencies = [
            click
            cryptography
            filelock
            paramiko
            pexpect
            platformdirs
            pytest
            rich
            (
              if lib.versionAtLeast qemu-qmp.version "0.0.5" then
                qemu-qmp
              else
                qemu-qmp.overridePythonAttrs {
                  version = "0.0.6";
                  src = fetchPypi {
                    pname = "qemu_qmp";
                    version = "0.0.6";
                    hash = "sha256-o8Jdhx+rVJEisjQIEN4fmUgQAslCohMkdrBiqs2/bpI=";
                  };
                }
            )
          ];
          # Its tests start nix and QEMU, which a build may not.
          doCheck = false;
          pythonImportsCheck = [
            "pytest_nixvm.plugin"
            "pytest_nixvm.cli"
          ];
          meta = {
            inherit (project) description;
            homepage = "https://github.com/pytest-nixvm/pytest-nixvm";
            license = lib.licenses.mit;
            mainProgram = "nixvm";
            platforms = lib.platforms.linux;
          };
        };

      # With the programs it starts, behind those that its user has.
      command =
        {
          python3Packages,
          symlinkJoin,
          makeWrapper,
          installShellFiles,
          gitMinimal,
          nix,
          openssh,
          qemu_kvm,
        }:
        symlinkJoin {
          name = "nixvm-${project.version}";
          paths = [ (python3Packages.toPythonApplication python3Packages.pytest-nixvm) ];
          nativeBuildInputs = [
            makeWrapper
            installShellFiles
          ];
          postBuild = ''
            wrapProgram $out/bin/nixvm --suffix PATH : ${
              lib.makeBinPath [
                gitMinimal
                nix
                openssh
                qemu_kvm
              ]
            }
            export HOME=$TMPDIR
            for shell in bash zsh fish; do
              $out/bin/nixvm completion $shell > nixvm.$shell
            done
            installShellCompletion --cmd nixvm \
              --bash nixvm.bash --zsh nixvm.zsh --fish nixvm.fish
          '';
          inherit (python3Packages.pytest-nixvm) meta;
        };

      programs = pkgs: [
        pkgs.gitMinimal
        pkgs.nix
        pkgs.openssh
        pkgs.qemu_kvm
      ];
    in
    {
      inherit (library) lib nixosModules templates;

      overlays.default = final: prev: {
        pythonPackagesExtensions = prev.pythonPackagesExtensions ++ [
          (python: _: { pytest-nixvm = python.callPackage plugin { }; })
        ];
        nixvm = final.callPackage command { };
      };

      packages = each (pkgs: {
        inherit (pkgs.python3Packages) pytest-nixvm;
        inherit (pkgs) nixvm;
        default = pkgs.nixvm;
      });

      devShells = each (pkgs: {
        # For people who test their machines.
        default = pkgs.mkShell {
          packages = programs pkgs ++ [
            (pkgs.python3.withPackages (python: [
              python.pytest-html
              python.pytest-nixvm
              python.pytest-testinfra
              python.pytest-xdist
            ]))
          ];
        };
        # For work on the plugin: `python -m pytest tests/unit` in a checkout. (mypy is tox's: nixpkgs
        # lacks stubs that it needs.)
        develop = pkgs.mkShell {
          inputsFrom = [ pkgs.python3Packages.pytest-nixvm ];
          packages = programs pkgs ++ [
            pkgs.ruff
            (pkgs.python3.withPackages (
              python:
              python.pytest-nixvm.propagatedBuildInputs
              ++ [
                python.pytest-html
                python.pytest-testinfra
                python.pytest-timeout
                python.pytest-xdist
              ]
            ))
          ];
        };
      });

      checks = each (
        pkgs:
        let
          machine = lib.nixosSystem {
            modules = [
              library.nixosModules.vm
              {
                vm.enable = true;
                networking.hostName = "check";
                nixpkgs.hostPlatform = pkgs.stdenv.hostPlatform.system;
                system.stateVersion = "25.11";
              }
            ];
          };
          inherit (machine.config.system) build;
          # Evaluated, and not built: an image takes gigabytes. What makes an OVA is for x86 only.
          formats = lib.filter (format: format != "ova" || pkgs.stdenv.hostPlatform.system == "x86_64-linux") (
            lib.attrNames library.lib.formats
          );
          evaluated = map (
            format: "${format} ${builtins.unsafeDiscardStringContext (library.lib.image machine format).drvPath}"
          ) formats;
        in
        {
          inherit (pkgs.python3Packages) pytest-nixvm;
          inherit (pkgs) nixvm;
          inherit (build) toplevel vm;
          images = pkgs.writeText "images" (lib.concatLines evaluated);
        }
      );

      formatter = each (pkgs: pkgs.nixfmt-tree);
    };
}
