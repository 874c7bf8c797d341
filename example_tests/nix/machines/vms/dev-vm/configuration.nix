# A machine to develop on: a window, room, and tools.
{ pkgs, userConfig, ... }:
{
  imports = [
    ../../../modules/nixos
    ../../../modules/nixos/vm
  ];

  vm = {
    enable = true;
    diskSize = "20G";
    memorySize = "4G";
    headless = false;
  };

  networking.hostName = "dev-vm";

  basic-system.enable = true;

  environment.systemPackages = with pkgs; [
    git
    vim
  ];

  services.openssh.enable = true;

  mainUser = {
    enable = true;
    user = userConfig.username;
  };

  system.stateVersion = "25.11";
}
