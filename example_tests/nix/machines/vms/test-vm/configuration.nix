# A small machine without a display, reached through SSH only.
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
    headless = true;
  };

  networking.hostName = "test-vm";

  basic-system.enable = true;

  services.openssh.enable = true;

  mainUser = {
    enable = true;
    user = userConfig.username;
  };

  system.stateVersion = "25.11";
}
