# nixpkgs.*, assertions, warnings, and small options that belong nowhere else.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.nixpkgs;
in {
  options = {
    assertions = mkOption { type = types.listOf types.unspecified; default = [ ]; internal = true; };
    warnings = mkOption { type = types.listOf types.str; default = [ ]; internal = true; };
    nixpkgs = {
      hostPlatform = mkOption {
        type = types.either types.str types.attrs;
        apply = lib.systems.elaborate;
        description = "The platform the machine runs on.";
      };
      buildPlatform = mkOption {
        type = types.either types.str types.attrs;
        default = cfg.hostPlatform;
        apply = lib.systems.elaborate;
      };
      system = mkOption { type = types.nullOr types.str; default = null; };
      config = mkOption { type = types.attrsOf types.anything; default = { }; };
      overlays = mkOption { type = types.listOf types.raw; default = [ ]; };
      pkgs = mkOption {
        type = types.raw;
        default = import ../../pkgs { inherit lib; inherit (cfg) overlays; inherit (cfg.hostPlatform) system; };
      };
    };
    time.timeZone = mkOption { type = types.nullOr types.str; default = null; };
    i18n.defaultLocale = mkOption { type = types.str; default = "en_US.UTF-8"; };
  };
  config = {
    nixpkgs.hostPlatform = lib.mkOptionDefault (if cfg.system != null then cfg.system
      else throw "Neither nixpkgs.hostPlatform nor the legacy option nixpkgs.system has been set.");
    _module.args.pkgs = lib.mkOptionDefault (cfg.pkgs // { inherit (cfg) config; });
    environment.etc = {
      localtime = lib.mkIf (config.time.timeZone != null) {
        source = "/usr/share/zoneinfo/${config.time.timeZone}";
        mode = "direct-symlink";
      };
      "locale.conf".text = "LANG=${config.i18n.defaultLocale}\n";
    };
  };
}
