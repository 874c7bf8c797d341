# home-manager.*: what Home Manager's module for NixOS is called by, with what a test may look at: files in the home, made
# by home-manager-USER.service, packages and variables.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.home-manager;
  flag = mkOption {
    type = types.bool;
    default = false;
  };
  user = types.submoduleWith {
    class = "homeManager";
    specialArgs = {
      inherit pkgs;
      osConfig = config;
      nixosConfig = config;
    }
    // cfg.extraSpecialArgs;
    modules = [
      ./home.nix
      (
        { name, ... }:
        {
          home.username = lib.mkDefault config.users.users.${name}.name;
          home.homeDirectory = lib.mkDefault config.users.users.${name}.home;
        }
      )
    ]
    ++ cfg.sharedModules;
  };
in
{
  options.home-manager = {
    useGlobalPkgs = flag;
    # Without it the packages would come from a profile in the home: here they are the user's either way.
    useUserPackages = flag;
    verbose = flag;
    overwriteBackup = flag;
    backupFileExtension = mkOption {
      type = types.nullOr types.str;
      default = null;
    };
    extraSpecialArgs = mkOption {
      type = types.attrs;
      default = { };
    };
    sharedModules = mkOption {
      type = types.listOf types.raw;
      default = [ ];
    };
    users = mkOption {
      type = types.attrsOf user;
      default = { };
    };
  };

  config = {
    users.users = lib.mapAttrs (_: home: { inherit (home.home) packages; }) cfg.users;
    warnings = lib.concatLists (lib.mapAttrsToList (_: home: home.warnings) cfg.users);
    assertions = lib.concatLists (
      lib.mapAttrsToList (
        name: home:
        home.assertions
        ++ [
          {
            assertion = home.home.stateVersion != null;
            message = "home-manager.users.${name}.home.stateVersion is not set.";
          }
        ]
      ) cfg.users
    );
    systemd.services = lib.mapAttrs' (
      _: home:
      lib.nameValuePair "home-manager-${home.home.username}" {
        description = "Home Manager environment for ${home.home.username}";
        wantedBy = [ "multi-user.target" ];
        before = [ "systemd-user-sessions.service" ];
        stopIfChanged = false;
        unitConfig.RequiresMountsFor = home.home.homeDirectory;
        environment.HOME_MANAGER_BACKUP_EXT = lib.mkIf (
          cfg.backupFileExtension != null
        ) cfg.backupFileExtension;
        serviceConfig = {
          User = home.home.username;
          Type = "oneshot";
          RemainAfterExit = true;
          TimeoutStartSec = "5m";
          SyslogIdentifier = "hm-activate-${home.home.username}";
          ExecStart = "${home.home.activationPackage}/activate";
        };
      }
    ) cfg.users;
  };
}
