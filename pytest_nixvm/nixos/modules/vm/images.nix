# Disk images: nixpkgs' `system.build.images.*`, as large as the VM's disk; and its former names.
{
  lib,
  config,
  options,
  ...
}:
let
  inherit (lib) mkDefault mkIf optionalAttrs;
  inherit (import ../../lib/sizes.nix) mebibytes;
  cfg = config.vm;
  host = config.networking.hostName;

  # Of its former names an image has only those that its own module gives it.
  gone =
    former: variant: format:
    mkDefault (
      throw ''
        system.build.${former} no longer exists: use nixosConfigurations.${host}.config.system.build.images.${variant}, or: nixvm image build ${host} --format ${format}''
    );
in
{
  config = mkIf cfg.enable (
    lib.mkMerge [
      {
        system.build = {
          qcow2 = gone "qcow2" "qemu" "qcow2";
          virtualBoxOVA = gone "virtualBoxOVA" "virtualbox" "ova";
          vmwareImage = gone "vmwareImage" "vmware" "vmdk";
        };
      }
      (optionalAttrs (options.virtualisation ? diskSize) {
        virtualisation.diskSize = mkDefault (mebibytes cfg.diskSize);
      })
      # Before 26.05 a VMDK had an option of its own, which is an alias since then.
      (optionalAttrs (options.vmware.baseImageSize.visible or (options ? vmware.baseImageSize)) {
        vmware.baseImageSize = mkDefault (mebibytes cfg.diskSize);
      })
      (optionalAttrs (options ? virtualbox) {
        virtualbox = {
          memorySize = mkDefault (mebibytes cfg.memorySize);
          params.cpus = mkDefault cfg.cores;
        };
      })
    ]
  );
}
