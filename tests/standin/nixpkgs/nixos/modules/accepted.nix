# Options that are accepted, some with their type, but change nothing in the guest (tests/standin/README.md says so too).
{ lib, ... }:
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
        efi = { canTouchEfiVariables = off; efiSysMountPoint = text "/boot"; };
        timeout = mkOption { type = types.nullOr types.int; default = 5; };
        generic-extlinux-compatible.enable = off; initScript.enable = off; external.enable = off;
      };
      initrd = {
        availableKernelModules = strings; kernelModules = strings; luks = free; systemd.enable = off; supportedFilesystems = any;
        verbose = on; secrets = free; network = free; includeDefaultModules = on;
      };
      kernelPackages = any; extraModulePackages = any; blacklistedKernelModules = strings; extraModprobeConfig = lines;
      supportedFilesystems = any; growPartition = off; isContainer = off; plymouth.enable = off; binfmt = free;
      tmp = { cleanOnBoot = off; useTmpfs = off; };
    };
    console = {
      keyMap = mkOption { type = types.either types.str types.path; default = "us"; };
      font = any; enable = on; earlySetup = off; useXkbConfig = off;
    };
    documentation = { enable = on; nixos.enable = on; man.enable = on; doc.enable = on; info.enable = on; dev.enable = off; };
    environment.wordlist = free;
    i18n = { supportedLocales = strings; extraLocaleSettings = free; };
    nix = { enable = on; gc = free; optimise = free; registry = free; nixPath = strings; channel.enable = on; package = any; };
    programs = switches [ "command-not-found" "direnv" "fish" "gnupg" "less" "mtr" "neovim" "nix-ld" "ssh" ];
    security = frees [ "acme" "pki" "wrappers" ] // { apparmor.enable = off; polkit.enable = off; rtkit.enable = off; };
    services = switches [
      "automatic-timezoned" "avahi" "chrony" "cloud-init" "dbus" "desktopManager" "displayManager" "fail2ban" "fstrim" "fwupd"
      "libinput" "logind" "logrotate" "nscd" "openntpd" "pipewire" "printing" "pulseaudio" "resolved" "smartd" "spice-vdagentd"
      "tailscale" "thermald" "timesyncd" "xserver"
    ];
    system = { autoUpgrade = free; copySystemConfiguration = off; disableInstallerTools = off; };
    systemd = frees [ "coredump" "network" "oomd" "sleep" "user" "watchdog" ];
    virtualisation = frees [
      "containers" "docker" "hypervGuest" "libvirtd" "oci-containers" "podman" "spiceUSBRedirection" "virtualbox" "vmware"
    ];
    appstream.enable = on;
  } // frees [ "fonts" "gtk" "hardware" "location" "powerManagement" "qt" "sound" "xdg" "zramSwap" ];
}
