# The laptop: an encrypted disk, Wi-Fi, sound, a printer now and then.
{ userConfig, ... }:
{
  imports = [
    ./hardware-configuration.nix
    ../../modules/nixos
  ];

  boot.loader.systemd-boot.enable = true;
  boot.loader.efi.canTouchEfiVariables = true;

  networking.hostName = "dell-xps-15";
  networking.networkmanager.enable = true;
  users.groups.networkmanager.members = [ userConfig.username ];

  hardware.graphics.enable = true;
  hardware.bluetooth.enable = true;
  services.pipewire = {
    enable = true;
    pulse.enable = true;
  };
  services.printing.enable = true;

  basic-system.enable = true;

  services.openssh.enable = true;

  mainUser = {
    enable = true;
    user = userConfig.username;
  };

  system.stateVersion = "25.11";
}
