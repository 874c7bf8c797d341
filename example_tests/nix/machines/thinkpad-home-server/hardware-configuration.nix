# Of nixos-generate-config: disks, and what the kernel needs to find them.
{
  config,
  lib,
  modulesPath,
  ...
}:
{
  imports = [ (modulesPath + "/installer/scan/not-detected.nix") ];

  boot.initrd.availableKernelModules = [
    "ehci_pci"
    "ahci"
    "usb_storage"
    "sd_mod"
    "sdhci_pci"
  ];

  fileSystems."/" = {
    device = "/dev/disk/by-uuid/4a2f7d3e-5b1c-4f60-9d52-7c1f0e6a9b38";
    fsType = "ext4";
  };

  fileSystems."/srv" = {
    device = "/dev/disk/by-uuid/c90d1e62-38d4-4a77-8b0e-2f6a5d7713ee";
    fsType = "ext4";
    options = [ "noatime" ];
  };

  swapDevices = [ { device = "/dev/disk/by-uuid/0be81c45-9f3a-4d1d-a6c7-51e2f0c4d8a9"; } ];

  nixpkgs.hostPlatform = lib.mkDefault "x86_64-linux";
  hardware.cpu.intel.updateMicrocode = lib.mkDefault config.hardware.enableRedistributableFirmware;
}
