# GRUB, disks by their labels, a static address on a card that has a name.
{ config, pkgs, ... }:
{
  networking = {
    hostName = "server";
    useDHCP = false;
    interfaces.enp3s0.ipv4.addresses = [
      {
        address = "192.168.7.20";
        prefixLength = 24;
      }
    ];
    defaultGateway = "192.168.7.1";
    nameservers = [ "192.168.7.1" ];
    firewall.interfaces.enp3s0.allowedTCPPorts = [ 8080 ];
  };

  boot.loader.grub = {
    enable = true;
    device = "/dev/disk/by-id/ata-SAMSUNG_MZ7LH960_S45NNE0M";
  };
  fileSystems."/" = {
    device = "/dev/disk/by-label/nixos";
    fsType = "ext4";
  };
  fileSystems."/srv" = {
    device = "/dev/disk/by-label/srv";
    fsType = "xfs";
    options = [ "noatime" ];
  };
  swapDevices = [ { device = "/dev/disk/by-label/swap"; } ];
  services.chrony.enable = true;

  sops.secrets."alice/password".neededForUsers = true;
  users.users.alice.hashedPasswordFile = config.sops.secrets."alice/password".path;

  sops.secrets."shop/database" = {
    owner = "shop";
    group = "shop";
    mode = "0440";
    restartUnits = [ "shop.service" ];
  };
  sops.secrets."shop/mail".path = "/var/lib/shop-keys/mail";
  sops.templates."shop.env" = {
    owner = "shop";
    content = ''
      DATABASE=postgres://shop:${config.sops.placeholder."shop/database"}@localhost/shop
    '';
  };

  users.users.shop = {
    isSystemUser = true;
    group = "shop";
  };
  users.groups.shop = { };
  # It reads its secret when it starts, fails without one, and says what it has read: as a digest.
  systemd.services.shop = {
    description = "A shop";
    wantedBy = [ "multi-user.target" ];
    serviceConfig = {
      User = "shop";
      RuntimeDirectory = "shop";
    };
    script = ''
      test -s ${config.sops.secrets."shop/database".path}
      sha256sum < ${config.sops.secrets."shop/database".path} > /run/shop/index.html
      exec ${pkgs.busybox}/bin/busybox httpd -f -p 8080 -h /run/shop
    '';
  };
}
