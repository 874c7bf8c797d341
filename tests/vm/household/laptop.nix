# systemd-boot, an encrypted disk, a card and an antenna, graphics.
{ config, ... }:
{
  networking = {
    hostName = "laptop";
    useDHCP = false;
    interfaces.enp0s31f6.useDHCP = true;
    interfaces.wlp2s0.useDHCP = true;
    wireless.enable = true;
    firewall.interfaces.enp0s31f6.allowedTCPPorts = [ 22000 ];
    firewall.interfaces.wlp2s0.allowedTCPPorts = [ 22001 ];
  };

  boot.loader.systemd-boot.enable = true;
  boot.loader.efi.canTouchEfiVariables = true;
  boot.initrd.luks.devices.vault.device = "/dev/disk/by-uuid/3e6be9de-8139-4e5b-9106-a43f08d823a6";
  fileSystems."/" = {
    device = "/dev/mapper/vault";
    fsType = "btrfs";
    options = [ "subvol=root" ];
  };
  fileSystems."/boot" = {
    device = "/dev/disk/by-label/ESP";
    fsType = "vfat";
  };
  swapDevices = [ { device = "/dev/mapper/vault-swap"; } ];
  services.timesyncd.enable = true;

  hardware.graphics.enable = true;
  hardware.bluetooth.enable = true;
  services.xserver.videoDrivers = [ "amdgpu" ];

  age.secrets.password = { };
  users.users.alice.hashedPasswordFile = config.age.secrets.password.path;
  age.secrets.backup = {
    owner = "alice";
    group = "users";
    mode = "0440";
  };
  # A file, not a link, in a home that is not there yet when agenix makes it.
  age.secrets.mail = {
    path = "/home/alice/.mail/token";
    symlink = false;
    owner = "alice";
  };
}
