# The package set: Debian's packages under nixpkgs' names.
{ lib, system, overlays ? [ ] }:
let
  names = lib.importJSON ./debian.json;
  lock = if builtins.pathExists ../lock.json then lib.importJSON ../lock.json
    else throw "the stand-in for nixpkgs is not prepared: run tests/standin/prepare and use the path that it prints";
  build = import ./build.nix { inherit lib system lock; };
  inherit (build) run runAsRoot deb;
  named = name: p: p // { pname = name; meta.mainProgram = names.mainProgram.${name} or name; };

  kernel = run "linux" {
    deb = deb lock.kernel;
    outputs = [ "out" "modules" ];
    names = import ./modules.nix ++ stage1Modules;
    vmlinux = ./vmlinux.py;
  } (builtins.readFile ./kernel.sh);
  stage1Modules = [
    "virtio_pci" "virtio_blk" "ext4" "erofs" "overlay" "9p" "9pnet_virtio" "virtio_console" "virtio_net"
    "virtio-rng" "autofs4" "nf_tables" "nft_ct" "button" "evdev"
  ];
  base = runAsRoot "standin-base.erofs" {
    outputs = [ "out" "info" ];
    debs = map (p: "${p}=${deb p}") lock.base;
    inherit (kernel) modules;
  } (builtins.readFile ./base.sh);
  initrd = run "standin-initrd" {
    kernel = kernel.out;
    inherit (kernel) modules;
    busybox = deb "busybox-static";
    names = stage1Modules;
    stage1 = ./stage-1.sh;
  } (builtins.readFile ./initrd.sh);

  # The same for images: as an image may be put on any bus, with their drivers, which a virtual machine's own /usr has
  # not. And `loop`: /usr is in a file.
  imageInitrd = run "standin-image-initrd" rec {
    kernel = run "linux-for-images" {
      deb = deb lock.kernel;
      outputs = [ "out" "modules" ];
      inherit names;
      vmlinux = ./vmlinux.py;
    } (builtins.readFile ./kernel.sh);
    inherit (kernel) modules;
    busybox = deb "busybox-static";
    names = stage1Modules ++ [
      "loop" "isofs" "ahci" "ata_piix" "sd_mod" "sr_mod" "mptspi" "vmw_pvscsi" "virtio_scsi" "vfat" "nls_cp437" "nls_ascii" "nls_iso8859-1"
    ];
    stage1 = ./stage-1.sh;
  } (builtins.readFile ./initrd.sh);

  # Packages of the base: nothing but links to its programs, all in one derivation.
  links = run "standin-base-packages" {
    inherit (base) info;
    wanted = lib.mapAttrsToList (name: debs: "${name}=${lib.concatStringsSep "," (lib.splitString " " debs)}") names.inBase;
  } ''
    for w in $wanted; do
      mkdir -p "$out/''${w%%=*}/bin"
      echo "''${w#*=}" | tr , '\n' | while read -r deb; do
        while read -r program; do ln -sf "$program" "$out/''${w%%=*}/bin/"; done < "$info/bins/$deb"
      done
    done
  '';
  fromBase = lib.mapAttrs (name: _: named name {
    type = "derivation";
    inherit name system;
    inherit (links) drvPath;
    outPath = "${links}/${name}";
    outputName = "out";
    __toString = self: self.outPath;
  }) names.inBase;

  # Other packages: a tree that stage 1 lays over /usr, with a bin/ as nixpkgs' packages have. Dependencies are inside.
  fromDebian = lib.mapAttrs (name: debs: named name (run name {
    debs = map (p: toString (deb p)) debs;
    links = lib.mapAttrsToList (from: to: "${from}=${to}") (names.links.${name} or { });
  } (builtins.readFile ./package.sh))) lock.packages;

  # Well-known names that are not here: an undefined variable would not say why.
  lacking = lib.genAttrs names.lacking (name: throw ("the stand-in for nixpkgs has no package `${name}'; "
    + "it can be added to tests/standin/nixpkgs/pkgs/debian.json if Debian has it"));

  self = lacking // {
    inherit lib system;
    inherit (build) runCommand runCommandLocal closureInfo symlinkJoin linkFarm writeTextFile writeText writeTextDir writeScript writeScriptBin;
    writeShellScript = name: text: build.writeScript name "#!${self.runtimeShell}\n${text}";
    writeShellScriptBin = name: text: build.writeScriptBin name "#!${self.runtimeShell}\n${text}";
    writeShellApplication = { name, text, runtimeInputs ? [ ], ... }: self.writeShellScriptBin name ''
      set -o errexit -o nounset -o pipefail
      export PATH="${lib.makeBinPath runtimeInputs}:$PATH"
      ${text}
    '';
    runtimeShell = "${self.bash}/bin/bash";
    stdenv = { hostPlatform = import ../lib/platform.nix system; isLinux = true; inherit system; };
    hostPlatform = self.stdenv.hostPlatform;
    config = { };
    formats = lib.genAttrs [ "json" "yaml" ] (_: _: {
      type = lib.types.anything;
      generate = name: value: self.writeText name (builtins.toJSON value);
    });
    linux = kernel;
    linuxPackages = { kernel = kernel; };
    linuxPackages_latest = self.linuxPackages;
    nixos-version = self.writeShellScriptBin "nixos-version" ''. /etc/os-release; echo "$VERSION_ID (stand-in)"'';
    qemu = "/usr";
    # For the modules in nixos/, not for configurations.
    standin = { inherit kernel base initrd imageInitrd run runAsRoot; };
    extend = overlay: compose (overlays ++ [ overlay ]);
  } // fromBase
    // lib.genAttrs [ "bash" "bashInteractive" ] (name: fromBase.${name} // { shellPath = "/bin/bash"; })
    // fromDebian // { zsh = fromDebian.zsh // { shellPath = "/bin/zsh"; }; };
  compose = lib.foldl' (pkgs: overlay: let next = pkgs // overlay next pkgs; in next) self;
in compose overlays
