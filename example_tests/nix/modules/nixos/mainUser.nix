# The person who uses the machine. The account itself comes from lib/users.nix.
{ config, lib, ... }:
let
  cfg = config.mainUser;
in
{
  options.mainUser = {
    enable = lib.mkEnableOption "the person who uses this machine";
    user = lib.mkOption {
      type = lib.types.str;
      description = "Log-in name of that person.";
    };
  };

  config = lib.mkIf cfg.enable {
    users.users.${cfg.user}.isNormalUser = true;
    nix.settings.trusted-users = [
      "root"
      cfg.user
    ];
  };
}
