# virtualisation.*: the virtual machine's options, and the script that starts it (contract: nixpkgs' module of this name).
{ lib, config, options, pkgs, ... }:
let
  inherit (lib) mkOption types mkIf mkMerge mkVMOverride optionalString;
  cfg = config.virtualisation;
  build = config.system.build;
  qemu = cfg.qemu.package;
  flag = default: mkOption { type = types.bool; inherit default; };
  drive.options = {
    name = mkOption { type = types.nullOr types.str; default = null; };
    file = mkOption { type = types.str; };
    driveExtraOpts = mkOption { type = types.attrsOf types.str; default = { }; };
    deviceExtraOpts = mkOption { type = types.attrsOf types.str; default = { }; };
  };
  share.options = {
    source = mkOption { type = types.str; };
    target = mkOption { type = types.path; };
    securityModel = mkOption {
      type = types.enum [ "passthrough" "mapped-xattr" "mapped-file" "none" ];
      default = "mapped-xattr";
    };
  };
  forward.options = {
    from = mkOption { type = types.enum [ "host" "guest" ]; default = "host"; };
    proto = mkOption { type = types.enum [ "tcp" "udp" ]; default = "tcp"; };
    host.address = mkOption { type = types.str; default = ""; }; host.port = mkOption { type = types.port; };
    guest.address = mkOption { type = types.str; default = ""; }; guest.port = mkOption { type = types.port; };
  };

  pairs = s: lib.concatStringsSep "," (lib.mapAttrsToList (k: v: "${k}=${v}") s);
  driveLine = n: d:
    let
      id = "drive${toString n}";
      drive = d.driveExtraOpts // { inherit id; inherit (d) file; "if" = "none"; index = toString n; };
    in "-drive ${pairs drive} -device virtio-blk-pci,${pairs (d.deviceExtraOpts // { drive = id; })}";
  shareLine = tag: s: "-virtfs local,path=${s.source},security_model=${s.securityModel},mount_tag=${tag}";
  shellName = lib.replaceStrings [ "-" "." ] [ "_" "_" ] config.system.name;
  restrict = optionalString cfg.restrictNetwork "restrict=on,";
  bootParams = "init=${build.toplevel}/init regInfo=${closure}/registration";
  forwardOption = f:
    let guest = "${f.guest.address}:${toString f.guest.port}"; in
    if f.from == "host" then "hostfwd=${f.proto}:${f.host.address}:${toString f.host.port}-${guest},"
    else "'guestfwd=${f.proto}:${guest}-cmd:/bin/nc ${f.host.address} ${toString f.host.port}',";
  consoles = lib.concatMapStringsSep " " (c: "console=${c}") cfg.qemu.consoles;
  lines = lib.concatStringsSep " \\\n    ";
  # What has to be in the store image, and where the paths stand that `additionalPaths` promises.
  closure = if config.standin.hasNix then pkgs.closureInfo { rootPaths = cfg.additionalPaths; }
    else pkgs.standin.run "closure-info" {
    exportReferencesGraph = lib.concatLists (lib.imap0 (n: p: [ "graph-${toString n}" p ]) cfg.additionalPaths);
  } ''
    mkdir -p $out; sort -u graph-* | grep "^$NIX_STORE/" > $out/store-paths
    touch $out/registration # for a nix in the guest, which has none: see nix.nix
  '';
  systemImage = import ./system-image.nix {
    inherit pkgs closure;
    inherit (build) toplevel installBootLoader;
    size = cfg.diskSize;
  };
  start = ''
    #! /bin/bash
    export PATH="''${PATH:+$PATH:}/usr/sbin:/usr/bin:/sbin:/bin"
    set -e

    createEmptyFilesystemImage() {
      local name=$1 size=$2 temp
      temp=$(mktemp)
      ${qemu}/bin/qemu-img create -q -f raw "$temp" "$size"
      mkfs.ext4 -q -L nixos -E assume_storage_prezeroed=1,nodiscard "$temp"
      ${qemu}/bin/qemu-img convert -f raw -O qcow2 "$temp" "$name"
      rm "$temp"
    }

    NIX_DISK_IMAGE=$(readlink -f "''${NIX_DISK_IMAGE:-${toString cfg.diskImage}}") || test -z "$NIX_DISK_IMAGE"

    if test -n "$NIX_DISK_IMAGE" && ! test -e "$NIX_DISK_IMAGE"; then
        echo "Disk image do not exist, creating the virtualisation disk image..."
        ${if cfg.useBootLoader
          then ''${qemu}/bin/qemu-img create -q -f qcow2 -b ${systemImage}/nixos.qcow2 -F qcow2 "$NIX_DISK_IMAGE"''
          else ''createEmptyFilesystemImage "$NIX_DISK_IMAGE" "${toString cfg.diskSize}M"''}
        echo "Virtualisation disk image created."
    fi

    # Create a directory for storing temporary data of the running VM.
    if [ -z "$TMPDIR" ] || [ -z "$USE_TMPDIR" ]; then
        TMPDIR=$(mktemp -d nix-vm.XXXXXXXXXX --tmpdir)
    fi

    ${optionalString cfg.useNixStoreImage ''
      echo "Creating Nix store image..."
      removeStoreCopy() { # its directories are ours, its files may be the store's own
        [ ! -e "$TMPDIR/store" ] || { find "$TMPDIR/store" -type d -exec chmod u+w {} +; rm -rf "$TMPDIR/store"; }
      }
      removeStoreCopy; mkdir -p "$TMPDIR/store"
      ${optionalString config.standin.hasNix ''cp -a ${closure} "$TMPDIR/store/"''}
      # Hard links where that is possible: same file system, and protected_hardlinks lets us.
      xargs cp -al -t "$TMPDIR/store" < ${closure}/store-paths 2> /dev/null || {
        removeStoreCopy; mkdir -p "$TMPDIR/store"
        ${optionalString config.standin.hasNix ''cp -a ${closure} "$TMPDIR/store/"''}
        xargs cp -a -t "$TMPDIR/store" < ${closure}/store-paths
      }
      mkfs.erofs --quiet --force-uid=0 --force-gid=0 -T 0 -x-1 "$TMPDIR/store.img" "$TMPDIR/store"
      removeStoreCopy
      echo "Created Nix store image."
    ''}
    # Create a directory for exchanging data with the VM.
    mkdir -p "$TMPDIR/xchg"

    cd "$TMPDIR"
    ${lib.concatStrings (lib.imap0 (n: size: ''
      test -e "empty${toString n}.qcow2" || ${qemu}/bin/qemu-img create -q -f qcow2 "empty${toString n}.qcow2" "${toString size}M"
    '') cfg.emptyDiskImages)}
    # Start QEMU.
    exec ${qemu}/bin/qemu-system-x86_64 -machine accel=kvm:tcg -cpu max \
        -name ${config.system.name} \
        -m ${toString cfg.memorySize} \
        -smp ${toString cfg.cores} \
        -device virtio-rng-pci \
        ${lines cfg.qemu.networkingOptions} \
        ${lines (lib.mapAttrsToList shareLine cfg.sharedDirectories ++ lib.imap1 driveLine cfg.qemu.drives ++ cfg.qemu.options)} \
        $QEMU_OPTS \
        "$@"
  '';
in {
  imports = [ ./disk-size-option.nix ];
  options.virtualisation = {
    memorySize = mkOption { type = types.ints.positive; default = 1024; description = "Memory in MiB."; };
    cores = mkOption { type = types.ints.positive; default = 1; };
    diskImage = mkOption { type = types.nullOr types.str; default = "./${config.system.name}.qcow2"; };
    rootDevice = mkOption { type = types.nullOr types.path; default = "/dev/disk/by-label/nixos"; };
    graphics = flag true;
    msize = mkOption { type = types.ints.positive; default = 16384; };
    emptyDiskImages = mkOption { type = types.listOf types.ints.positive; default = [ ]; };
    fileSystems = options.fileSystems;
    sharedDirectories = mkOption { type = types.attrsOf (types.submodule share); default = { }; };
    mountHostNixStore = flag (!cfg.useNixStoreImage && !cfg.useBootLoader);
    useNixStoreImage = flag false;
    writableStore = flag cfg.mountHostNixStore;
    writableStoreUseTmpfs = flag true;
    additionalPaths = mkOption { type = types.listOf types.path; default = [ ]; };
    restrictNetwork = flag false;
    forwardPorts = mkOption { type = types.listOf (types.submodule forward); default = [ ]; };
    useBootLoader = flag false;
    useEFIBoot = flag false;
    useDefaultFilesystems = flag true;
    directBoot.enable = flag (!cfg.useBootLoader);
    resolution = mkOption { type = types.attrsOf types.ints.positive; default = { x = 1024; y = 768; }; };
    vlans = mkOption { type = types.listOf types.ints.unsigned; default = [ ]; };
    tpm.enable = flag false;
    host.pkgs = mkOption { type = types.raw; default = pkgs; };
    qemu = {
      package = mkOption { type = types.either types.package types.path; default = pkgs.qemu; };
      options = mkOption { type = types.listOf types.str; default = [ ]; };
      consoles = mkOption {
        type = types.listOf types.str;
        default = (if cfg.graphics then lib.id else lib.reverseList) [ "ttyS0,115200n8" "tty0" ];
      };
      networkingOptions = mkOption { type = types.listOf types.str; default = [ ]; };
      drives = mkOption { type = types.listOf (types.submodule drive); default = [ ]; };
      diskInterface = mkOption { type = types.enum [ "virtio" ]; default = "virtio"; };
      guestAgent.enable = flag true;
      virtioKeyboard = flag true;
    };
  };

  config = {
    assertions = [
      {
        assertion = !cfg.useEFIBoot && !cfg.tpm.enable;
        message = "The stand-in for nixpkgs has a BIOS and no TPM: no virtualisation.useEFIBoot, tpm.";
      }
      {
        assertion = if cfg.useBootLoader then !cfg.useNixStoreImage else cfg.mountHostNixStore || cfg.useNixStoreImage;
        message = "The stand-in for nixpkgs takes /nix/store from the host, from an image (useNixStoreImage), or with "
          + "a boot loader from its disk.";
      }
      {
        assertion = cfg.diskImage != null;
        message = "The stand-in for nixpkgs has no root on tmpfs (virtualisation.diskImage = null).";
      }
    ];
    virtualisation.diskSizeAutoSupported = false;
    virtualisation.additionalPaths = [ build.toplevel ];
    virtualisation.sharedDirectories = {
      nix-store = mkIf cfg.mountHostNixStore {
        source = builtins.storeDir;
        target = "/nix/.ro-store";
        securityModel = "none";
      };
      xchg = { source = ''"$TMPDIR"/xchg''; target = "/tmp/xchg"; securityModel = "none"; };
      shared = { source = ''"''${SHARED_DIR:-$TMPDIR/xchg}"''; target = "/tmp/shared"; securityModel = "none"; };
    };
    virtualisation.qemu = {
      networkingOptions = [
        "-net nic,netdev=user.0,model=virtio"
        "-netdev user,id=user.0,${lib.concatMapStrings forwardOption cfg.forwardPorts}${restrict}\"$QEMU_NET_OPTS\""
      ];
      options = mkMerge [
        (mkIf cfg.qemu.virtioKeyboard [ "-device virtio-keyboard" ])
        [ "-usb" "-device usb-tablet,bus=usb-bus.0" ]
        (mkIf cfg.directBoot.enable [
          "-kernel \${NIXPKGS_QEMU_KERNEL_${shellName}:-${build.toplevel}/kernel}"
          "-initrd ${build.toplevel}/initrd"
          ''-append "$(cat ${build.toplevel}/kernel-params) ${bootParams} ${consoles} $QEMU_KERNEL_PARAMS"''
        ])
        (mkIf (!cfg.graphics) [ "-nographic" ])
      ];
      drives = mkMerge [
        [ {
          name = "root";
          file = ''"$NIX_DISK_IMAGE"'';
          driveExtraOpts = { cache = "writeback"; werror = "report"; };
          deviceExtraOpts = { bootindex = "1"; serial = "root"; };
        } ]
        (mkIf cfg.useNixStoreImage [ {
          name = "nix-store";
          file = ''"$TMPDIR"/store.img'';
          driveExtraOpts.format = "raw";
          deviceExtraOpts = { bootindex = "2"; serial = "nix-store"; };
        } ])
        (lib.imap0 (n: _: {
          file = "$(pwd)/empty${toString n}.qcow2";
          driveExtraOpts.werror = "report";
        }) cfg.emptyDiskImages)
        # The stand-in's own: Debian's files, which become /usr.
        (lib.mkAfter [ {
          name = "standin-base";
          file = "${pkgs.standin.base.out}";
          driveExtraOpts = { format = "raw"; readonly = "on"; };
          deviceExtraOpts.serial = "standin-base";
        } ])
      ];
    };

    fileSystems = mkIf (cfg.fileSystems != { }) (mkVMOverride cfg.fileSystems);
    virtualisation.fileSystems = mkMerge [
      (lib.mapAttrs' (tag: s: lib.nameValuePair s.target {
        device = tag;
        fsType = "9p";
        neededForBoot = true;
        options = [
          "trans=virtio" "version=9p2000.L" "msize=${toString cfg.msize}"
        ] ++ lib.optional (tag == "nix-store") "cache=loose";
      }) cfg.sharedDirectories)
      {
        "/" = { device = lib.mkDefault cfg.rootDevice; fsType = "ext4"; };
        "/nix/.ro-store" = mkIf cfg.useNixStoreImage {
          device = "/dev/disk/by-id/virtio-nix-store";
          fsType = "erofs";
          neededForBoot = true;
          options = [ "ro" ];
        };
        "/nix/.rw-store" = mkIf (cfg.writableStore && cfg.writableStoreUseTmpfs) {
          device = "tmpfs";
          fsType = "tmpfs";
          neededForBoot = true;
          options = [ "mode=0755" ];
        };
        "/nix/store" = mkIf (cfg.mountHostNixStore || cfg.useNixStoreImage) (if cfg.writableStore
          then {
            device = "overlay";
            fsType = "overlay";
            neededForBoot = true;
            options = [ "lowerdir=/nix/.ro-store" "upperdir=/nix/.rw-store/upper" "workdir=/nix/.rw-store/work" ];
          }
          else { device = "/nix/.ro-store"; fsType = "none"; neededForBoot = true; options = [ "bind" ]; });
      }
    ];
    # Without it each PCI device costs a third of a second under emulation: interrupt routing by interpreted ACPI code.
    boot.kernelParams = [ "pci=noacpi" ];
    # GRUB boots a bzImage, and only that.
    standin.unpackedKernel = mkIf cfg.useBootLoader (lib.mkDefault false);
    system.build.installBootLoader = mkIf cfg.useBootLoader
      (lib.mkOverride 90 (pkgs.writeScript "install-grub" (builtins.readFile ../install-grub.sh)));
    swapDevices = mkVMOverride [ ];
    boot.initrd.luks = mkVMOverride { };
    boot.loader.grub.device = mkVMOverride "/dev/disk/by-id/virtio-root";
    networking.usePredictableInterfaceNames = false;
    networking.wireless.enable = mkVMOverride false;
    services.timesyncd.enable = lib.mkForce false;
    services.qemuGuest.enable = lib.mkDefault cfg.qemu.guestAgent.enable;

    system.build.vm = pkgs.standin.run "nixos-vm" {
      inherit (build) toplevel;
      inherit start;
      passAsFile = [ "start" ];
    } ''
      mkdir -p $out/bin; ln -s $toplevel $out/system
      cp "$startPath" $out/bin/run-${config.system.name}-vm; chmod 755 $out/bin/run-${config.system.name}-vm
    '' // { meta.mainProgram = "run-${config.system.name}-vm"; };
  };
}
