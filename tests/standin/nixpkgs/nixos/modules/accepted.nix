# Options that are accepted, some with their type, but change nothing in the guest (tests/standin/README.md says so too).
{ lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  any = mkOption { type = types.anything; default = { }; };
  free = mkOption { type = types.attrsOf types.anything; default = { }; };
  off = mkOption { type = types.bool; default = false; };
  on = mkOption { type = types.bool; default = true; };
  text = default: mkOption { type = types.str; inherit default; };
  lines = mkOption { type = types.lines; default = ""; };
  strings = mkOption { type = types.listOf types.str; default = [ ]; };
  switch = mkOption {
    type = types.submodule { freeformType = types.attrsOf types.anything; options.enable = off; };
    default = { };
  };
  switches = names: lib.genAttrs names (_: switch);
  frees = names: lib.genAttrs names (_: free);
in {
  options = {
    boot = {
      loader = {
        grub = {
          enable = on; device = text ""; devices = strings; efiSupport = off; efiInstallAsRemovable = off; useOSProber = off;
          configurationLimit = any;
        };
        systemd-boot = { enable = off; configurationLimit = any; editor = on; consoleMode = any; };
        limine = switch; refind = switch;
        efi = { canTouchEfiVariables = off; efiSysMountPoint = text "/boot"; };
        timeout = mkOption { type = types.nullOr types.int; default = 5; };
        generic-extlinux-compatible.enable = off; initScript.enable = off; external.enable = off;
      };
      initrd = {
        availableKernelModules = strings; kernelModules = strings; luks = free; systemd.enable = off; supportedFilesystems = any;
        verbose = on; secrets = free; network = free; includeDefaultModules = on;
      };
      kernelPackages = mkOption { type = types.raw; default = pkgs.linuxPackages; };
      kernelPatches = any; extraModulePackages = any; zfs = free; swraid.enable = off; bcache.enable = on;
      resumeDevice = text ""; hardwareScan = on; crashDump.enable = off; readOnlyNixStore = on; modprobeConfig = free;
      blacklistedKernelModules = strings; extraModprobeConfig = lines;
      supportedFilesystems = any; growPartition = off; isContainer = off; plymouth.enable = off; binfmt = free;
      tmp = { cleanOnBoot = off; useTmpfs = off; };
    };
    console = {
      keyMap = mkOption { type = types.either types.str types.path; default = "us"; };
      font = any; enable = on; earlySetup = off; useXkbConfig = off;
    };
    documentation = { enable = on; nixos.enable = on; man.enable = on; doc.enable = on; info.enable = on; dev.enable = off; };
    environment = {
      wordlist = free; localBinInPath = off; homeBinInPath = off; stub-ld = free; enableDebugInfo = off;
    } // lib.genAttrs [ "cinnamon" "cosmic" "gnome" "mate" "plasma5" "plasma6" "xfce" ] (_: free);
    lib = free; # what modules share
    i18n = { supportedLocales = strings; extraLocaleSettings = free; };
    nix = { enable = on; gc = free; optimise = free; registry = free; nixPath = strings; channel.enable = on; package = any; };
    # `gnupg`, for one, has no `enable` itself: these are as free as they come.
    programs = switches [
      "_1password" "_1password-gui" "adb" "appimage" "chromium" "command-not-found" "dconf" "direnv" "evolution" "firefox"
      "fish" "fuse" "fzf" "gamemode" "gnupg" "hyprland" "iftop" "iotop" "java" "kdeconnect" "less" "light" "mosh" "mtr"
      "neovim" "nh" "nix-index" "nix-ld" "noisetorch" "npm" "obs-studio" "partition-manager" "seahorse" "screen" "ssh"
      "starship" "steam" "sway" "system-config-printer" "thunar" "traceroute" "usbtop" "virt-manager" "wireshark" "xfconf"
      "xwayland" "yazi"
    ];
    security = frees [ "acme" "audit" "pki" "wrappers" ] // switches [
      "apparmor" "auditd" "doas" "polkit" "rtkit" "soteria" "sudo-rs" "tpm2"
    ] // {
      pam = frees [ "krb5" "mount" "p11" "sshAgentAuth" "u2f" "yubico" ] // { loginLimits = any; };
      protectKernelImage = off; lockKernelModules = off; allowUserNamespaces = on; forcePageTableIsolation = off;
      virtualisation = free; dhparams = free; krb5 = free; chromiumSuidSandbox = free; unprivilegedUsernsClone = off;
    };
    services = switches [
      "acpid" "adguardhome" "apcupsd" "asusd" "atd" "atuin" "auto-cpufreq" "automatic-timezoned" "autorandr" "avahi"
      "blueman" "bluemap" "borgbackup" "btrbk" "btrfs" "caddy" "chrony" "cloud-init" "cloudflared" "cockpit" "colord"
      "coredns" "couchdb" "cron" "dbus" "ddclient" "deluge" "desktopManager" "displayManager" "dnsmasq" "dovecot2"
      "duplicati" "earlyoom" "elasticsearch" "ente" "envfs" "etcd" "fail2ban" "flatpak" "forgejo" "frigate" "fstrim"
      "fwupd" "gitea" "github-runners" "gitlab" "gitlab-runner" "gitolite" "gnome" "gonic" "gpm" "grafana" "greetd"
      "gvfs" "haproxy" "hardware" "haveged" "headscale" "heimdall" "home-assistant" "homepage-dashboard" "httpd"
      "i2pd" "immich" "influxdb2" "invidious" "iperf3" "irqbalance" "jackett" "jellyfin" "jellyseerr" "joycond" "k3s"
      "kavita" "kea" "keycloak" "keyd" "kubernetes" "languagetool" "libinput" "lidarr" "lldpd" "locate" "logind"
      "logrotate" "loki" "lvm" "mailpit" "matrix-synapse" "mattermost" "memcached" "minecraft-server" "minidlna"
      "miniflux" "minio" "monado" "monit" "mosquitto" "mpd" "mullvad-vpn" "munin-node" "murmur" "mysql" "navidrome"
      "netbird" "netdata" "nextcloud" "nginx" "nfs" "nomad" "nscd" "ntfy-sh" "ntp" "ntpd-rs" "oauth2-proxy" "octoprint"
      "ollama" "ombi" "onlyoffice" "open-webui" "openldap" "openntpd" "openvpn" "orca-slicer" "paperless" "pcscd"
      "pgadmin" "photoprism" "picom" "pihole-ftl" "pipewire" "playerctld" "plex" "postfix" "postgresql"
      "postgresqlBackup" "power-profiles-daemon" "printing" "prometheus" "promtail" "prowlarr" "pulseaudio"
      "qbittorrent" "rabbitmq" "radarr" "radicale" "readarr" "redis" "redshift" "resilio" "resolved" "restic"
      "roundcube" "rpcbind" "rsnapshot" "rsyncd" "sabnzbd" "samba" "samba-wsdd" "sanoid" "searx" "seatd" "smartd"
      "snapper" "snapraid" "snowflake-proxy" "sonarr" "spice-vdagentd" "spotifyd" "squid" "step-ca" "strongswan"
      "sunshine" "syncoid" "syncthing" "syslog-ng" "sysstat" "tailscale" "tang" "tautulli" "tcsd" "telegraf"
      "thermald" "thinkfan" "throttled" "timesyncd" "tlp" "tor" "touchegg" "traefik" "transmission" "trezord"
      "tumbler" "udisks2" "unbound" "undervolt" "unifi" "upower" "uptime-kuma" "usbguard" "usbmuxd" "v4l2-relayd"
      "vault" "vaultwarden" "vector" "victoriametrics" "vikunja" "vnstat" "vsftpd" "wg-netmanager" "wordpress"
      "wpa_supplicant" "xrdp" "xserver" "yggdrasil" "zerotierone" "zfs" "zigbee2mqtt" "zoneminder" "zram-generator"
    ];
    system = {
      autoUpgrade = free; copySystemConfiguration = off; disableInstallerTools = off; rebuild = free; tools = free;
      etc.overlay = free; fsPackages = any; nssModules = any;
    };
    systemd = frees [ "automounts" "coredump" "network" "nspawn" "oomd" "repart" "sleep" "sysusers" "user" "watchdog" ];
    networking = frees [
      "bonds" "bridges" "dhcpcd" "dhcpcdConfig" "iproute2" "macvlans" "modemmanager" "nat" "proxy" "resolvconf" "sits" "tcpcrypt"
      "vlans" "vswitches" "wg-quick" "wireguard" "wlanInterfaces"
    ] // {
      search = strings; timeServers = strings; tempAddresses = text "default"; useHostResolvConf = off;
      defaultGateway6 = any; localCommands = lines; stevenblack = free; hostFiles = any; dhcpHostName = text "";
    };
    virtualisation = frees [
      "containerd" "containers" "docker" "hypervGuest" "incus" "libvirtd" "lxd" "oci-containers" "podman"
      "spiceUSBRedirection" "waydroid" "xen"
    ] // {
      virtualbox = { guest = switch; host = switch; };
      vmware = { guest = switch; host = switch; };
    };
    appstream.enable = on;
    # nixos-generate-config's file asks for one of these.
    hardware = mkOption {
      type = types.submodule {
        freeformType = types.attrsOf types.anything;
        options = { enableAllFirmware = off; enableRedistributableFirmware = off; enableAllHardware = off; };
      };
      default = { };
    };
  } // frees [ "fonts" "gtk" "location" "powerManagement" "qt" "sound" "xdg" "zramSwap" ];
}
