# specialisation.*: variants of the configuration, in the toplevel's specialisation/.
{ lib, config, extendModules, ... }:
let
  inherit (lib) mkOption types;
  alone = lib.evalModules {
    class = "nixos";
    specialArgs.modulesPath = toString ./.;
    modules = import ./module-list.nix ++ [ { nixpkgs.hostPlatform = config.nixpkgs.hostPlatform.system; } ];
  };
  variant = { config, ... }: {
    options = {
      inheritParentConfig = mkOption { type = types.bool; default = true; };
      configuration = mkOption {
        type = (if config.inheritParentConfig
          then extendModules { modules = [ { specialisation = lib.mkOverride 0 { }; } ]; } else alone).type;
        default = { };
      };
    };
  };
in {
  options.specialisation = mkOption { type = types.attrsOf (types.submodule variant); default = { }; };
  config.system.extraSystemBuilderCmds = ''
    mkdir $out/specialisation
    ${lib.concatStrings (lib.mapAttrsToList (name: s: ''
      ln -s ${s.configuration.system.build.toplevel} $out/specialisation/${lib.escapeShellArg name}
    '') config.specialisation)}
  '';
}
