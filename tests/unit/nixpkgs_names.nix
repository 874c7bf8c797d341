# What flake.nix takes of nixpkgs, by name: functions return what they were given, and a package is
# its name. A name that is not here is an error, as it is there.
{ lib, nixosSystem }:
let
  package = version: name: {
    inherit name version;
    type = "derivation";
    outPath = "/nix/store/${name}";
    overridePythonAttrs = changes: package changes.version "${name}-changed";
  };
  packages = names: lib.genAttrs names (package "1.0");
  call = set: function: arguments: function (builtins.intersectAttrs (builtins.functionArgs function) set // arguments);
  fix = f: let x = f x; in x;

  python = final:
    packages [
      "click" "cryptography" "filelock" "hatchling" "paramiko" "pexpect" "platformdirs" "pytest" "pytest-html"
      "pytest-testinfra" "pytest-timeout" "pytest-xdist" "rich"
    ] // {
      qemu-qmp = package "0.0.3" "qemu-qmp"; # as nixos-25.11 had it
      buildPythonPackage = given: package given.version given.pname // given // { propagatedBuildInputs = given.dependencies; };
      fetchPypi = given: given;
      toPythonApplication = package: package;
      callPackage = call final;
    };
  pkgs = system: final:
    packages [ "gitMinimal" "installShellFiles" "makeWrapper" "nix" "nixfmt-tree" "openssh" "qemu_kvm" "ruff" ] // {
      stdenv.hostPlatform.system = system;
      pythonPackagesExtensions = [ ];
      python3Packages = fix (self: lib.foldl' (before: extension: before // extension self before) (python self)
        final.pythonPackagesExtensions);
      python3.withPackages = choose: map (p: p.name) (choose final.python3Packages);
      callPackage = call final;
      mkShell = given: given;
      symlinkJoin = given: given;
      writeText = _: text: text;
      extend = overlay: fix (self: pkgs system self // overlay self (pkgs system self));
    };
in {
  lib = {
    # Where the stand-in's lib is used, which has not these.
    importTOML = file: builtins.fromTOML (builtins.readFile file);
    versionAtLeast = a: b: builtins.compareVersions a b >= 0;
    licenses.mit = "mit";
    platforms.linux = [ ];
  } // lib // {
    inherit nixosSystem;
    fileset = { unions = files: map toString files; toSource = given: given; };
  };
  legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: fix (pkgs system));
}
