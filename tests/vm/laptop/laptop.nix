{ config, ... }:
{
  networking = {
    hostName = "laptop";
    useDHCP = false;
    defaultGateway = "192.168.77.1";
    interfaces.enp3s0.ipv4.addresses = [
      {
        address = "192.168.77.10";
        prefixLength = 24;
      }
    ];
    interfaces.wlp2s0.useDHCP = false;
    firewall.interfaces.enp3s0.allowedTCPPorts = [ 8080 ];
  };

  fileSystems."/" = {
    device = "/dev/mapper/cryptroot";
    fsType = "btrfs";
  };
  fileSystems."/boot" = {
    device = "/dev/disk/by-label/ESP";
    fsType = "vfat";
  };
  swapDevices = [ { device = "/dev/disk/by-label/swap"; } ];
  boot.initrd.luks.devices.cryptroot.device = "/dev/disk/by-label/crypt";
  boot.loader.systemd-boot.enable = true;
  disko.devices.disk.main.device = "/dev/nvme0n1";
  services.timesyncd.enable = true;

  services.openssh.enable = true;
  users.users.alice = {
    isNormalUser = true;
    hashedPasswordFile = config.sops.secrets.alice.path;
  };

  sops.secrets.alice.neededForUsers = true;
  sops.secrets."app/key" = {
    owner = "alice";
    group = "users";
    mode = "0440";
    path = "/var/lib/app/key";
    restartUnits = [ "app.service" ];
  };
  age.secrets.token.owner = "alice";

  # Ends at once without its secrets.
  systemd.services.app = {
    wantedBy = [ "multi-user.target" ];
    serviceConfig.User = "alice";
    script = ''
      test -s /var/lib/app/key
      test -s ${config.age.secrets.token.path}
      exec sleep infinity
    '';
  };

  system.stateVersion = "25.11";
}
