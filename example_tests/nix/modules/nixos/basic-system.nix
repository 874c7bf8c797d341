# What every machine of the household has.
{ config, lib, ... }:
{
  options.basic-system.enable = lib.mkEnableOption "what every machine of the household has";

  config = lib.mkIf config.basic-system.enable {
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
  };
}
