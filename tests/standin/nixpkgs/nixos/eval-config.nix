# nixosSystem: what nixpkgs' function of that name takes and returns.
{ lib }:
{ system ? null, modules ? [ ], specialArgs ? { }, ... }:
let
  evaluated = lib.evalModules {
    class = "nixos";
    specialArgs = { modulesPath = toString ./modules; } // specialArgs;
    modules = import ./modules/module-list.nix
      ++ lib.optional (system != null) { _file = "nixosSystem's system"; nixpkgs.system = lib.mkDefault system; }
      ++ modules;
  };
  extended = c: c // {
    inherit lib;
    inherit (c._module.args) pkgs;
    extendModules = args: extended (c.extendModules args);
  };
in extended evaluated
