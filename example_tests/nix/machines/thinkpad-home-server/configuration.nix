# An old ThinkPad in the cellar: always on, its lid closed, with an address of its own.
{ userConfig, ... }:
{
  imports = [
    ./hardware-configuration.nix
    ../../modules/nixos
  ];

  boot.loader.grub = {
    enable = true;
    device = "/dev/disk/by-id/ata-SAMSUNG_MZ7LN256HCHP_S20HNXAG812345";
  };

  networking = {
    hostName = "thinkpad-home-server";
    useDHCP = false;
    interfaces.enp0s25.ipv4.addresses = [
      {
        address = "192.168.1.10";
        prefixLength = 24;
      }
    ];
    defaultGateway = "192.168.1.1";
    nameservers = [ "192.168.1.1" ];
  };

  basic-system.enable = true;

  services.openssh.enable = true;
  services.fstrim.enable = true;
  services.logind.settings.Login.HandleLidSwitch = "ignore";

  mainUser = {
    enable = true;
    user = userConfig.username;
  };

  system.stateVersion = "25.11";
}
