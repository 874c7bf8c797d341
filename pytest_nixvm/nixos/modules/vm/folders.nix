# Folders of the host.
{
  lib,
  config,
  options,
  ...
}:
let
  inherit (lib) mapAttrsToList mkIf;
  cfg = config.vm;
  folders = cfg.sharedFolders;
  readOnly = lib.filterAttrs (_: folder: folder.readOnly) folders;
  writable = lib.filterAttrs (_: folder: !folder.readOnly) folders;

  # As a word of the start script. Only the variable is left to the shell.
  word =
    path:
    if lib.hasPrefix "$HOME/" path then
      ''"$HOME"/${lib.escapeShellArg (lib.removePrefix "$HOME/" path)}''
    else
      lib.escapeShellArg path;

  # The folders that are read only, in QEMU's own words: nixpkgs' option can't say so. A machine
  # whose `sharedDirectories` have been taken away, as pytest-nixvm does to freeze it, has none of
  # these either.
  wanted = config.virtualisation.sharedDirectories != { };

  # Mounted when somebody looks: where nothing is shared under that name, nothing fails.
  whenUsed = mode: [
    mode
    "noauto"
    "x-systemd.automount"
  ];
in
{
  config = mkIf (cfg.enable && folders != { }) (
    if options.virtualisation ? memorySize then
      {
        virtualisation = {
          sharedDirectories = lib.mapAttrs (_: folder: {
            source = word folder.hostPath;
            target = folder.guestPath;
          }) writable;
          qemu.options = mkIf wanted (
            mapAttrsToList (
              name: folder:
              "-virtfs local,path=${word folder.hostPath},security_model=mapped-xattr,mount_tag=${name},readonly=on"
            ) readOnly
          );
          fileSystems = mkIf wanted (
            lib.mapAttrs' (name: folder: {
              name = folder.guestPath;
              value = {
                device = name;
                fsType = "9p";
                options = [
                  "trans=virtio"
                  "version=9p2000.L"
                  "msize=262144"
                  "x-systemd.requires=modprobe@9pnet_virtio.service"
                  "ro"
                ];
              };
            }) readOnly
          );
        };
      }
    else
      {
        fileSystems = mkIf (cfg.backend != "qemu") (
          lib.mapAttrs' (name: folder: {
            name = folder.guestPath;
            value =
              let
                options = whenUsed (if folder.readOnly then "ro" else "rw");
              in
              if cfg.backend == "virtualbox" then
                {
                  device = name;
                  fsType = "vboxsf";
                  inherit options;
                }
              else
                {
                  device = ".host:/${name}";
                  fsType = "fuse./run/current-system/sw/bin/vmhgfs-fuse";
                  options = options ++ [ "allow_other" ];
                };
          }) folders
        );
      }
  );
}
