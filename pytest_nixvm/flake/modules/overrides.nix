# What the plugin changes in a machine's configuration: as little as possible, and only where
# the user's own value differs. What QEMU's arguments can do (memory, ports, devices, no window)
# is not here. Every entry that takes effect is shown to the user, with its reason.
#
# `only`, if given, says of the user's configuration whether the entry applies. `keep` are options
# whose defaults follow from this one: they stay as the user has them.
let
  inherit (builtins) any attrValues elem match;

  # Whatever nixpkgs' version calls that share, and whichever option has made it.
  storeIsShared = config:
    any (share: elem share.target [ "/nix/.ro-store" "/nix/store" ])
      (attrValues (config.virtualisation.sharedDirectories or { }));

  serialConsole = {
    option = [ "boot" "kernelParams" ];
    value = [ "console=ttyAMA0,115200n8" "console=ttyS0,115200n8" ];
    merge = true;
    reason = "so that its console can be read: a boot loader hears nothing of QEMU's options";
  };
in
{
  always = [
    {
      option = [ "services" "qemuGuest" "enable" ];
      value = true;
      reason = "the guest agent tells when the machine is ready, and lets the tests in";
    }
  ];

  # In the variant of a machine that can be frozen: QEMU saves no state of a mounted share.
  freezable = [
    {
      option = [ "virtualisation" "sharedDirectories" ];
      value = { };
      reason = "so that it can be frozen and cloned: a mounted share can't be";
    }
    {
      # Not where the store comes from a disk anyway, as it does with a boot loader.
      option = [ "virtualisation" "useNixStoreImage" ];
      only = storeIsShared;
      value = true;
      keep = [ [ "virtualisation" "writableStore" ] ];
      reason = "so that it can be frozen and cloned: its store is an image then, and no share";
    }
    {
      # The certificates come by a share; without it there would be none at all.
      option = [ "virtualisation" "useHostCerts" ];
      value = false;
      reason = "so that it can be frozen and cloned: the host's certificates are a share";
    }
    {
      # It is there for virtiofs, and gives QEMU a memory that ends with it.
      option = [ "virtualisation" "qemu" "enableSharedMemory" ];
      value = false;
      reason = "so that it can be frozen and cloned: its memory has to be a file that clones can read";
    }
  ];

  # In a VM that is to be switched, and whose kernel QEMU loads: `switch` and `boot` install the boot
  # loader first, and there is no disk that could take one (nixpkgs #344535).
  direct = [
    {
      option = [ "system" "build" "installBootLoader" ];
      value = "/run/current-system/sw/bin/true";
      reason = "so that it can be switched: QEMU loads its kernel, and there is no boot loader";
    }
  ];

  # What qemu-vm.nix tells a kernel that QEMU loads itself, a boot loader has to be told otherwise.
  bootLoader = [ serialConsole ];

  # In an image, whose boot loader hears nothing of QEMU's options either.
  image = [
    (serialConsole // {
      only = config: !(any (text: match "console=tty(S|AMA)0.*" text != null) (config.boot.kernelParams or [ ]));
    })
  ];
}
