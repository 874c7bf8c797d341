# What the machines have in common, physical or not.
{
  config,
  lib,
  userConfig,
  ...
}:
let
  cfg = config.mainUser;
in
{
  options = {
    basic-system.enable = lib.mkEnableOption "what every machine of the household has";

    mainUser = {
      enable = lib.mkEnableOption "the person who uses this machine";
      user = lib.mkOption {
        type = lib.types.str;
        example = "alice";
        description = "Log-in name of that person; the rest comes from lib/users.nix.";
      };
    };
  };

  config = lib.mkMerge [
    (lib.mkIf config.basic-system.enable {
      time.timeZone = lib.mkDefault "Europe/Berlin";
      networking.firewall.enable = true;
      nix.settings.experimental-features = [
        "nix-command"
        "flakes"
      ];
      # Keys only, on whichever machine turns sshd on.
      services.openssh.settings = {
        PasswordAuthentication = false;
        KbdInteractiveAuthentication = false;
      };
    })

    (lib.mkIf cfg.enable {
      users.users.${cfg.user} = {
        isNormalUser = true;
        inherit (userConfig) description extraGroups hashedPassword;
        openssh.authorizedKeys.keys = userConfig.authorizedKeys;
      };
    })
  ];
}
