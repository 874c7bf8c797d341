# system.*, boot.*, fileSystems: the toplevel, its stage 2 and its activation.
{ lib, config, options, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.system;
  script = types.either types.str (types.submodule { options = {
    deps = mkOption { type = types.listOf types.str; default = [ ]; };
    text = mkOption { type = types.lines; default = ""; };
    supportsDryActivation = mkOption { type = types.bool; default = false; };
  }; });
  # Activation snippets in the order of their `deps`.
  ordered = lib.foldl' visit [ ] (lib.attrNames cfg.activationScripts);
  visit = done: name:
    if lib.elem name done then done
    else if !(cfg.activationScripts ? ${name}) then throw "Activation snippet `${name}' does not exist."
    else lib.foldl' visit done cfg.activationScripts.${name}.deps ++ [ name ];
  failed = map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);
  checked = v:
    if failed != [ ] then throw "\nFailed assertions:\n${lib.concatMapStringsSep "\n" (m: "- ${m}") failed}"
    else lib.foldl' (acc: w: builtins.trace "evaluation warning: ${w}" acc) v config.warnings;
  mounts = lib.filterAttrs (_: fs: fs.enable) config.fileSystems;
  # Parents first, and what is made of other mounts last.
  derived = fs: fs.fsType == "overlay" || lib.elem "bind" fs.options;
  mountOrder = let all = lib.sortOn (fs: lib.stringLength fs.mountPoint) (lib.attrValues mounts); in
    lib.filter (fs: !derived fs) all
    ++ lib.filter derived all;
  isForBoot = fs: fs.neededForBoot || lib.elem fs.mountPoint [
    "/" "/nix" "/nix/store" "/var" "/var/log" "/var/lib" "/etc" "/usr"
  ];
  mountLine = fs: lib.concatStringsSep " " [
    (if fs.device == null then "none" else fs.device)
    fs.mountPoint
    (if lib.elem "bind" fs.options then "bind" else fs.fsType)
    (lib.concatStringsSep "," (lib.filter (o: !lib.hasPrefix "x-" o) fs.options))
  ] + "\n";
  fstabLine = fs: lib.concatStringsSep " " [
    (if fs.device == null then fs.fsType else fs.device)
    fs.mountPoint
    fs.fsType
    (lib.concatStringsSep "," (lib.unique (fs.options ++ lib.optional (isForBoot fs) "x-initrd.mount")))
    "0 0\n"
  ];

  snippet = name: ''
    #### Activation script snippet ${name}:
    _localstatus=0
    ${cfg.activationScripts.${name}.text}
    if (( _localstatus > 0 )); then echo "Activation script snippet '${name}' failed ($_localstatus)"; fi
  '';
  activate = ''
    #!${pkgs.runtimeShell}
    # Brings the running system in line with this configuration; also the last act of stage 2.
    systemConfig='@out@'
    export PATH=/usr/sbin:/usr/bin
    _status=0
    trap '_localstatus=$?; _status=1' ERR
    mkdir -p /run
    ${lib.concatMapStrings snippet ordered}
    ln -sfn "$systemConfig" /run/current-system
    exit $_status
  '';
  dryActivate = ''
    #!${pkgs.runtimeShell}
    # The snippets that say what they would do (supportsDryActivation).
    systemConfig='@out@'
    export PATH=/usr/sbin:/usr/bin NIXOS_ACTION=dry-activate
    ${lib.concatMapStrings snippet (lib.filter (name: cfg.activationScripts.${name}.supportsDryActivation) ordered)}
    exit 0
  '';
  init = ''
    #!${pkgs.runtimeShell}
    # Stage 2: started by stage 1 on the mounted root, ends as systemd.
    systemConfig='@out@'
    export HOME=/root PATH=/usr/sbin:/usr/bin
    echo; echo "<<< NixOS Stage 2 >>>"; echo
    if [ ! -s /etc/machine-id ]; then read -r uuid < /proc/sys/kernel/random/uuid; echo "''${uuid//-/}" > /etc/machine-id; fi
    echo "running activation script..."
    "$systemConfig/activate"
    ln -s "$systemConfig" /run/booted-system
    # /var is there already: the journal need not be written to /run first, and then once more.
    mkdir -p /run/systemd/journal; : > /run/systemd/journal/flushed
    ${config.boot.postBootCommands}
    echo "starting systemd..."
    export PATH=/run/current-system/sw/bin
    exec /usr/lib/systemd/systemd "$@"
  '';
in {
  options = {
    system = {
      name = mkOption {
        type = types.str;
        default = if config.networking.hostName == "" then "unnamed" else config.networking.hostName;
      };
      stateVersion = mkOption { type = types.strMatching "[0-9]{2}\\.[0-9]{2}"; default = cfg.nixos.release; };
      build = mkOption { type = types.lazyAttrsOf types.unspecified; default = { }; };
      path = mkOption { type = types.package; internal = true; };
      extraDependencies = mkOption { type = types.listOf types.path; default = [ ]; };
      extraSystemBuilderCmds = mkOption { type = types.lines; default = ""; };
      activationScripts = mkOption {
        type = types.attrsOf script;
        default = { };
        apply = lib.mapAttrs (_: s: if lib.isString s then { deps = [ ]; text = s; supportsDryActivation = false; } else s);
      };
      configurationRevision = mkOption { type = types.nullOr types.str; default = null; };
      nixos = lib.mapAttrs (_: default: mkOption { type = types.str; inherit default; }) {
        release = "25.11"; version = "25.11.standin"; codeName = "Xantusia"; distroName = "NixOS"; distroId = "nixos";
        variant_id = "";
      } // {
        tags = mkOption { type = types.listOf types.str; default = [ ]; };
        label = mkOption {
          type = types.str;
          default = lib.concatStringsSep "-" (lib.sort (a: b: a < b) cfg.nixos.tags ++ [ cfg.nixos.version ]);
        };
      };
    };
    boot = {
      kernelParams = mkOption {
        type = types.listOf (types.strMatching ''([^"[:space:]]|"[^"]*")+'');
        default = [ ];
      };
      kernelModules = mkOption { type = types.listOf types.str; default = [ ]; };
      kernel.sysctl = mkOption {
        type = types.attrsOf (types.nullOr (types.oneOf [ types.bool types.int types.str ]));
        default = { };
      };
      consoleLogLevel = mkOption { type = types.int; default = 4; };
      postBootCommands = mkOption { type = types.lines; default = ""; };
    };
    fileSystems = mkOption {
      default = { };
      type = types.attrsOf (types.submodule ({ name, ... }: { options = {
        enable = mkOption { type = types.bool; default = true; };
        mountPoint = mkOption { type = types.str; default = name; };
        device = mkOption { type = types.nullOr types.str; default = null; };
        label = mkOption { type = types.nullOr types.str; default = null; };
        fsType = mkOption { type = types.str; default = "auto"; };
        options = mkOption { type = types.listOf types.str; default = [ "defaults" ]; };
        neededForBoot = mkOption { type = types.bool; default = false; };
        autoFormat = mkOption { type = types.bool; default = false; };
        autoResize = mkOption { type = types.bool; default = false; };
        noCheck = mkOption { type = types.bool; default = false; };
        depends = mkOption { type = types.listOf types.str; default = [ ]; };
      }; }));
    };
    # The stand-in's own, nixpkgs has none of it.
    standin.unpackedKernel = mkOption {
      type = types.bool;
      default = true;
      description = ''
        Whether `kernel` is the unpacked kernel, which boots three seconds sooner under emulation. NixOS's is a bzImage.
      '';
    };
    standin.initrd = mkOption { type = types.package; default = pkgs.standin.initrd; };
    swapDevices = mkOption { type = types.listOf (types.attrsOf types.anything); default = [ ]; };
  };

  config = {
    assertions = [ {
      assertion = lib.any (fs: fs.mountPoint == "/") mountOrder;
      message = "The ‘fileSystems’ option does not specify your root file system.";
    } ];
    boot.kernelParams = [ "loglevel=${toString config.boot.consoleLogLevel}" ];
    systemd.services.systemd-sysctl = lib.mkIf (config.boot.kernel.sysctl != { }) {
      wantedBy = [ "sysinit.target" ];
    };
    systemd.services.systemd-modules-load = lib.mkIf (config.boot.kernelModules != [ ]) {
      wantedBy = [ "sysinit.target" ];
    };
    environment.etc = {
      fstab.text = lib.concatMapStrings fstabLine mountOrder;
      os-release.text = ''
        ANSI_COLOR="0;38;2;126;186;228"
        BUG_REPORT_URL="https://github.com/NixOS/nixpkgs/issues"
        BUILD_ID="${cfg.nixos.version}"
        ID=${cfg.nixos.distroId}
        NAME=${cfg.nixos.distroName}
        PRETTY_NAME="${cfg.nixos.distroName} ${cfg.nixos.release} (stand-in made of Debian's packages)"
        VERSION="${cfg.nixos.release} (${cfg.nixos.codeName})"
        VERSION_CODENAME=${lib.toLower cfg.nixos.codeName}
        VERSION_ID="${cfg.nixos.release}"
      '';
      NIXOS.text = "";
      "sysctl.d/60-nixos.conf" = lib.mkIf (config.boot.kernel.sysctl != { }) {
        text = lib.concatStrings (lib.mapAttrsToList (k: v:
          lib.optionalString (v != null) "${k}=${if v == true then "1" else if v == false then "0" else toString v}\n"
        ) config.boot.kernel.sysctl);
      };
      "modules-load.d/nixos.conf" = lib.mkIf (config.boot.kernelModules != [ ]) {
        text = lib.concatLines config.boot.kernelModules;
      };
    };
    system.activationScripts.etc = {
      deps = [ "users" "usr" ];
      text = "etc=${cfg.build.etc}\nsource ${./activate-etc.sh}\n";
    };
    system.activationScripts.specialfs.text = "";
    system.activationScripts.usr.text = "source ${./activate-usr.sh}\n";
    # Set here and not by systemd alone: a switch to another name takes effect.
    system.activationScripts.hostname.text = lib.optionalString (config.networking.hostName != "") ''
      echo ${lib.escapeShellArg config.networking.hostName} > /proc/sys/kernel/hostname
    '';
    system.activationScripts.groups = { deps = [ "users" ]; text = ""; };

    system.build = {
      kernel = pkgs.linux.out;
      # One archive for all machines, and behind it the mounts of this one.
      initialRamdisk = pkgs.standin.run "initrd" {
        base = config.standin.initrd;
        mounts = lib.concatMapStrings mountLine (lib.filter isForBoot mountOrder);
        passAsFile = [ "mounts" ];
      } ''
        mkdir -p $out; cp $base $out/initrd; chmod u+w $out/initrd
        cp "$mountsPath" mounts; echo mounts | cpio -o -H newc -R 0:0 --quiet --reproducible >> $out/initrd
      '';
      toplevel = checked (pkgs.standin.run "nixos-system-${cfg.name}-${cfg.nixos.label}" {
        inherit (cfg.build) etc kernel initialRamdisk;
        inherit (cfg) path extraDependencies;
        inherit (pkgs.stdenv.hostPlatform) system;
        inherit activate dryActivate init;
        passAsFile = [ "activate" "dryActivate" "init" ];
        params = lib.concatStringsSep " " config.boot.kernelParams;
        version = cfg.nixos.label;
        kernelFile = if config.standin.unpackedKernel then "image" else "bzImage";
        graph = [ cfg.build.etc cfg.path ];
        exportReferencesGraph = [ "closure" cfg.build.etc "closure-path" cfg.path ];
      } ''
        mkdir -p $out/bin
        ln -s $kernel/$kernelFile $out/kernel; ln -s $initialRamdisk/initrd $out/initrd; ln -s /usr $out/kernel-modules
        ln -s $etc/etc $out/etc; ln -s $path $out/sw; ln -s /usr/lib/systemd $out/systemd
        printf %s "$params" > $out/kernel-params; printf %s "$version" > $out/nixos-version; printf %s "$system" > $out/system
        echo 1 > $out/init-interface-version; echo "$extraDependencies" > $out/extra-dependencies
        for f in activate init; do eval "sed s#@out@#$out#g < \$''${f}Path > $out/$f"; chmod 755 $out/$f; done
        sed s#@out@#$out#g < $dryActivatePath > $out/dry-activate; chmod 755 $out/dry-activate
        # The packages in the closure: stage 1 lays them over /usr, wherever the configuration mentions them.
        sort -u closure closure-path | grep "^$NIX_STORE/" | while read -r p; do
          [ ! -e $p/nix-support/standin-layer ] || echo $p
        done > $out/usr-layers
        ${cfg.extraSystemBuilderCmds}
      '');
    };
  };
}
