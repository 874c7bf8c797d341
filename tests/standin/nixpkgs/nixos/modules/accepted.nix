# Options that are accepted, and type-checked, but change nothing in the guest. tests/standin/README.md names them.
{ lib, ... }:
let
  inherit (lib) mkOption types;
  any = mkOption { type = types.anything; default = { }; };
  free = mkOption { type = types.attrsOf types.anything; default = { }; };
  off = mkOption { type = types.bool; default = false; };
  on = mkOption { type = types.bool; default = true; };
  strings = mkOption { type = types.listOf types.str; default = [ ]; };
  package = mkOption { type = types.nullOr types.raw; default = null; };

in {
  options = {
    boot.loader = {
      grub = { enable = on; device = mkOption { type = types.str; default = ""; }; devices = strings; efiSupport = off; efiInstallAsRemovable = off; useOSProber = off; configurationLimit = any; };
      systemd-boot = { enable = off; configurationLimit = any; editor = on; consoleMode = any; };
      efi = { canTouchEfiVariables = off; efiSysMountPoint = mkOption { type = types.str; default = "/boot"; }; };
      generic-extlinux-compatible.enable = off;
      timeout = mkOption { type = types.nullOr types.int; default = 5; };
      initScript.enable = off;
      external.enable = off;
    };
    boot.initrd = { availableKernelModules = strings; kernelModules = strings; luks = free; systemd.enable = off; supportedFilesystems = any; verbose = on; secrets = free; network = free; includeDefaultModules = on; };
    boot.kernelPackages = any; boot.extraModulePackages = mkOption { type = types.listOf types.raw; default = [ ]; };
    boot.blacklistedKernelModules = strings; boot.extraModprobeConfig = mkOption { type = types.lines; default = ""; };
    boot.supportedFilesystems = any; boot.growPartition = off; boot.isContainer = off; boot.plymouth.enable = off; boot.tmp = { cleanOnBoot = off; useTmpfs = off; }; boot.binfmt = free;
    console = { keyMap = mkOption { type = types.either types.str types.path; default = "us"; }; font = any; enable = on; earlySetup = off; useXkbConfig = off; };
    documentation = { enable = on; nixos.enable = on; man.enable = on; doc.enable = on; info.enable = on; dev.enable = off; };
    fonts = free; gtk = free; qt = free; xdg = free; powerManagement = free; sound = free;
    hardware = free;
    i18n = { supportedLocales = strings; extraLocaleSettings = free; };
    location = free;
    nix = { enable = on; settings = free; gc = free; optimise = free; package = package; registry = free; nixPath = strings; channel.enable = on; extraOptions = mkOption { type = types.lines; default = ""; }; };
    programs = lib.genAttrs [ "direnv" "fish" "gnupg" "less" "mtr" "neovim" "ssh" "command-not-found" "nix-ld" ]
      (_: mkOption { type = types.submodule { freeformType = types.attrsOf types.anything; options.enable = off; }; default = { }; });
    security = { polkit.enable = off; rtkit.enable = off; apparmor.enable = off; pki = free; acme = free; wrappers = free; };
    services = lib.genAttrs [ "automatic-timezoned" "avahi" "chrony" "fail2ban" "fstrim" "fwupd" "logind" "logrotate" "nscd" "openntpd" "resolved" "smartd" "spice-vdagentd"
      "thermald" "timesyncd" "printing" "pipewire" "pulseaudio" "xserver" "displayManager" "desktopManager" "libinput" "dbus" "cloud-init" "tailscale" ]
      (_: mkOption { type = types.submodule { freeformType = types.attrsOf types.anything; options.enable = off; }; default = { }; });
    systemd = { network = free; user = free; oomd = free; coredump = free; sleep = free; watchdog = free; };
    virtualisation = lib.genAttrs [ "docker" "podman" "libvirtd" "virtualbox" "vmware" "containers" "oci-containers" "hypervGuest" "spiceUSBRedirection" ] (_: free);
    zramSwap = free;
    system.autoUpgrade = free; system.copySystemConfiguration = off; system.switch.enable = on; system.disableInstallerTools = off;
    specialisation = free; appstream.enable = on; environment.wordlist = free;
  };
}
