{
  here,
  userConfig,
  pkgs,
  ...
}:
{
  vm = {
    diskSize = "700M";
    memorySize = "900M";
    cores = 3;
    headless = true;
    networking.mode = "isolated";
    networking.forwardPorts = [
      {
        host = here.port;
        guest = 22;
      }
    ];
    sharedFolders.work.hostPath = here.work;
    sharedFolders.music = {
      hostPath = here.music;
      guestPath = "/srv/music";
      readOnly = true;
    };
  };
  services.openssh.enable = true;
  environment.etc."vm-user".text = userConfig.username;
  environment.systemPackages = [ pkgs.util-linux ];
  system.stateVersion = "25.11";
}
