# The image format `virtualbox`: an OVA, which is a tar of a description and a compressed disk.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.virtualbox;
  inherit (config.image) baseName fileName;
  xml = lib.replaceStrings [ "&" "<" ">" "\"" ] [ "&amp;" "&lt;" "&gt;" "&quot;" ];
  item = id: type: more: "<Item>" + lib.concatStrings (lib.mapAttrsToList (n: v: "<rasd:${n}>${toString v}</rasd:${n}>")
    ({ InstanceID = id; ResourceType = type; } // more)) + "</Item>";
  namespace = "http://schemas.dmtf.org/ovf/envelope/1";
  ovf = ''
    <?xml version="1.0"?>
    <Envelope ovf:version="1.0" xmlns="${namespace}" xmlns:ovf="${namespace}"
      xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
      xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
      <References><File ovf:href="${xml baseName}-disk001.vmdk" ovf:id="file1" ovf:size="@size@"/></References>
      <DiskSection>
        <Info>The disk</Info>
        <Disk ovf:capacity="@capacity@" ovf:diskId="vmdisk1" ovf:fileRef="file1"
          ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
      </DiskSection>
      <NetworkSection><Info>NAT</Info><Network ovf:name="NAT"><Description>NAT</Description></Network></NetworkSection>
      <VirtualSystem ovf:id="${xml cfg.vmName}">
        <Info>A machine</Info>
        <OperatingSystemSection ovf:id="101"><Info>Linux, 64 bit</Info></OperatingSystemSection>
        <VirtualHardwareSection>
          <Info>What it is made of</Info>
          <System>
            <vssd:ElementName>Virtual Hardware Family</vssd:ElementName><vssd:InstanceID>0</vssd:InstanceID>
            <vssd:VirtualSystemType>virtualbox-2.2</vssd:VirtualSystemType>
          </System>
          ${item 1 3 { ElementName = "1 virtual CPU"; VirtualQuantity = 1; }}
          ${item 2 4 {
            AllocationUnits = "MegaBytes"; ElementName = "${toString cfg.memorySize} MB of memory";
            VirtualQuantity = cfg.memorySize;
          }}
          ${item 3 20 { Address = 0; ElementName = "SATA"; ResourceSubType = "AHCI"; }}
          ${item 4 17 { AddressOnParent = 0; ElementName = "disk1"; HostResource = "/disk/vmdisk1"; Parent = 3; }}
          ${item 5 10 {
            AutomaticAllocation = "true"; Connection = "NAT"; ElementName = "Ethernet adapter"; ResourceSubType = "virtio";
          }}
        </VirtualHardwareSection>
      </VirtualSystem>
    </Envelope>
  '';
in {
  imports = [ ../image/file-options.nix ../image/standin-disk.nix ./disk-size-option.nix ];
  options.virtualbox = mkOption {
    default = { };
    description = "The appliance. Of nixpkgs' other options none has an effect.";
    type = types.submodule {
      freeformType = types.attrsOf types.anything;
      options = {
        memorySize = mkOption { type = types.int; default = 1536; };
        vmDerivationName = mkOption {
          type = types.str;
          default = "nixos-ova-${config.system.nixos.label}-${pkgs.stdenv.hostPlatform.system}";
        };
        vmName = mkOption {
          type = types.str;
          default = with config.system.nixos; "${distroName} ${label} (${pkgs.stdenv.hostPlatform.system})";
        };
      };
    };
  };
  config = {
    boot.growPartition = true;
    boot.loader.grub.device = "/dev/sda";
    fileSystems."/" = { device = "/dev/disk/by-label/nixos"; autoResize = true; fsType = "ext4"; };
    swapDevices = [ { device = "/var/swap"; size = 2048; } ];
    virtualisation.virtualbox.guest.enable = true;
    system.nixos.tags = [ "virtualbox" ];
    image.extension = "ova";
    system.build.image = lib.mkDefault config.system.build.virtualBoxOVA;
    system.build.virtualBoxOVA = config.standin.disk.make {
      name = cfg.vmDerivationName;
      finish = ''
        base=${lib.escapeShellArg baseName}
        qemu-img convert -f raw -O vmdk -o subformat=streamOptimized disk "$base-disk001.vmdk"
        sed -e "s/@size@/$(stat -c %s "$base-disk001.vmdk")/" -e "s/@capacity@/$(stat -c %s disk)/" \
          ${pkgs.writeText "machine.ovf" ovf} > "$base.ovf"
        for file in "$base.ovf" "$base-disk001.vmdk"; do
          echo "SHA1 ($file) = $(sha1sum "$file" | cut -d ' ' -f 1)"
        done > "$base.mf"
        mkdir -p $out/nix-support
        # The description comes first.
        tar --format=ustar --owner=0 --group=0 --mtime=@0 -cf $out/${lib.escapeShellArg fileName} \
          "$base.ovf" "$base.mf" "$base-disk001.vmdk"
        echo "file ova $out/"${lib.escapeShellArg fileName} >> $out/nix-support/hydra-build-products
      '';
    };
  };
}
