# What TEMPLATE is for.
{ userConfig, ... }:
{
  imports = [
    ../../../modules/nixos
    ../../../modules/nixos/vm
  ];

  vm = {
    enable = true;
    diskSize = "10G";
    memorySize = "2G";
  };

  networking.hostName = "TEMPLATE";

  basic-system.enable = true;

  services.openssh.enable = true;

  mainUser = {
    enable = true;
    user = userConfig.username;
  };

  system.stateVersion = "25.11";
}
