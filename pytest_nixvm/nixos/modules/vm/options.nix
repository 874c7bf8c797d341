{ lib, config, ... }:
let
  inherit (lib) mkOption mkEnableOption types;
  inherit (import ./types.nix { inherit lib; }) sizeFrom hostPath guestPath;
  cfg = config.vm;

  # QEMU takes no more than 31 bytes as the name of a share; nixpkgs' own are among them.
  taken = [
    "nix-store"
    "xchg"
    "shared"
    "certs"
  ];
  # What NixOS mounts there, or starts with, would be hidden.
  theirs = [
    "/bin"
    "/boot"
    "/dev"
    "/etc"
    "/lib"
    "/lib64"
    "/nix"
    "/nix/.ro-store"
    "/nix/.rw-store"
    "/nix/store"
    "/nix/var"
    "/proc"
    "/run"
    "/sys"
    "/tmp"
    "/tmp/shared"
    "/tmp/xchg"
    "/usr"
    "/var"
  ];
  checkedFolders =
    folders:
    lib.mapAttrs (
      name: folder:
      let
        place = folder.guestPath;
        others = lib.filter (other: other != name && folders.${other}.guestPath == place) (
          lib.attrNames folders
        );
      in
      if builtins.match "[A-Za-z][A-Za-z0-9_-]{0,30}" name == null then
        throw "vm.sharedFolders.${builtins.toJSON name}: a folder's name is a letter, then letters, digits, - and _, no more than 31."
      else if lib.elem name taken then
        throw "vm.sharedFolders.${name}: NixOS' VMs have a folder of that name already (${lib.concatStringsSep ", " taken})."
      else if lib.elem place theirs then
        throw "vm.sharedFolders.${name}.guestPath: ${place} is NixOS' own: folders go elsewhere."
      else if others != [ ] then
        throw "vm.sharedFolders.${name}.guestPath: ${place} is that of vm.sharedFolders.${lib.head others}, too."
      else
        folder
    ) folders;

  checkedForwards =
    forwards:
    let
      places = map (each: "${each.protocol} port ${toString each.host}") forwards;
      again = lib.filter (place: lib.count (other: other == place) places > 1) places;
    in
    if again == [ ] then
      forwards
    else
      throw "vm.networking.forwardPorts: ${lib.head again} of the host is forwarded twice.";

  # Port 0 is none.
  port = types.ints.between 1 65535;

  forward = {
    options = {
      host = mkOption {
        type = port;
        description = "Port of the host. Only the host itself reaches it (127.0.0.1).";
      };
      guest = mkOption {
        type = port;
        description = "Port of the guest, which its firewall has to let in.";
      };
      protocol = mkOption {
        type = types.enum [
          "tcp"
          "udp"
        ];
        default = "tcp";
        description = "Protocol to forward.";
      };
    };
  };

  folder =
    { name, ... }:
    {
      options = {
        hostPath = mkOption {
          type = hostPath;
          example = "$HOME/projects";
          description = ''
            The directory of the host, which has to be there when the VM starts. `$HOME/…` is below
            the home of whoever starts it.
          '';
        };
        guestPath = mkOption {
          type = guestPath;
          default = "/mnt/${name}";
          defaultText = lib.literalExpression ''"/mnt/<name>"'';
          description = "Where the guest has it.";
        };
        readOnly = mkOption {
          type = types.bool;
          default = false;
          description = "Whether the guest may only read. QEMU sees to that, not only the guest.";
        };
      };
    };

  guest =
    name: what:
    mkOption {
      type = types.bool;
      default = cfg.backend == name;
      defaultText = lib.literalExpression ''config.vm.backend == "${name}"'';
      description = "Whether the guest has ${what}.";
    };
in
{
  options.vm = {
    enable = mkEnableOption "the settings of a virtual machine: a machine without is left as it is";

    backend = mkOption {
      type = types.enum [
        "qemu"
        "virtualbox"
        "vmware"
      ];
      default = "qemu";
      description = ''
        What the machine is made for: decides which additions the guest has, and which disk and boot
        loader its installed system expects. All images can be built with any of them, and tests
        boot it under QEMU.
      '';
    };

    diskSize = mkOption {
      type = sizeFrom "64M";
      default = "10G";
      example = "20G";
      description = "Size of the disk, and of the images that are a disk. Files are as large as what is in it.";
    };

    memorySize = mkOption {
      type = sizeFrom "64M";
      default = "2G";
      example = "4G";
      description = "Memory.";
    };

    cores = mkOption {
      type = types.ints.between 1 255;
      default = 2;
      description = "Number of processors.";
    };

    headless = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether the VM has no screen: its console is the serial port then. With a screen it has
        both, and the screen is the first console.
      '';
    };

    networking = {
      mode = mkOption {
        type = types.enum [
          "user"
          "isolated"
        ];
        default = "user";
        description = ''
          "user": QEMU's own network, on which the guest reaches whatever the host's user does.
          "isolated": the guest reaches nothing outside; ports can be forwarded to it all the same.
        '';
      };
      forwardPorts = mkOption {
        type = types.listOf (types.submodule forward);
        default = [ ];
        apply = checkedForwards;
        example = [
          {
            host = 8080;
            guest = 80;
          }
        ];
        description = "Ports of the host's 127.0.0.1 that lead into the guest.";
      };
    };

    guest = {
      qemu = guest "qemu" "the QEMU guest agent";
      virtualbox = guest "virtualbox" "VirtualBox' guest additions";
      vmware = guest "vmware" "VMware's tools (open-vm-tools)";
    };

    sharedFolders = mkOption {
      type = types.attrsOf (types.submodule folder);
      default = { };
      apply = checkedFolders;
      example = lib.literalExpression ''
        {
          projects.hostPath = "$HOME/projects";
          music = { hostPath = "/srv/music"; guestPath = "/music"; readOnly = true; };
        }
      '';
      description = ''
        Directories of the host that the guest has, too. Under VirtualBox and VMware it is the
        folder of that name that their own settings share. A machine that is frozen for its tests,
        as pytest-nixvm does where they may not share a VM, has none: QEMU can't freeze a share.
      '';
    };
  };

  # What is wrong is wrong for each system that is made of it, also where little of it is used.
  config.assertions = lib.mkIf cfg.enable [
    {
      assertion = builtins.deepSeq cfg true;
      message = "";
    }
  ];
}
