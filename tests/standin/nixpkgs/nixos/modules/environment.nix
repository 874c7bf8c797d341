# environment.*: files in /etc, the packages of the system, and what a log-in shell finds.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.environment;
  entry = { name, config, ... }: {
    options = {
      enable = mkOption { type = types.bool; default = true; };
      target = mkOption { type = types.str; default = name; };
      text = mkOption { type = types.nullOr types.lines; default = null; };
      source = mkOption { type = types.nullOr types.path; default = null; };
      mode = mkOption { type = types.str; default = "symlink"; };
      uid = mkOption { type = types.int; default = 0; };
      gid = mkOption { type = types.int; default = 0; };
      user = mkOption { type = types.str; default = "+${toString config.uid}"; };
      group = mkOption { type = types.str; default = "+${toString config.gid}"; };
    };
  };
  # Of these, `enable` installs the package and the rest is accepted.
  programs = [ "git" "htop" "nano" "tmux" "vim" "zsh" ];
  enabled = lib.filter (f: f.enable) (lib.attrValues cfg.etc);
  variables = lib.mapAttrs (_: v: if lib.isList v then lib.concatMapStringsSep ":" toString v else toString v)
    (lib.filterAttrs (_: v: v != null) (cfg.sessionVariables // cfg.variables));
  # NixOS's, without the places that only a nix in the guest would fill.
  path = "/run/wrappers/bin:/etc/profiles/per-user/$USER/bin:/run/current-system/sw/bin";
  value = types.nullOr (types.oneOf [
    (types.listOf (types.oneOf [ types.int types.str types.path ])) types.int types.str types.path
  ]);
in {
  options = {
    environment = {
      etc = mkOption { type = types.attrsOf (types.submodule entry); default = { }; };
      systemPackages = mkOption { type = types.listOf types.package; default = [ ]; };
      defaultPackages = mkOption { type = types.listOf types.package; default = [ ]; };
      pathsToLink = mkOption { type = types.listOf types.str; default = [ ]; };
      variables = mkOption { type = types.attrsOf value; default = { }; };
      sessionVariables = mkOption { type = types.attrsOf value; default = { }; };
      shellAliases = mkOption { type = types.attrsOf (types.nullOr types.str); default = { }; };
      shellInit = mkOption { type = types.lines; default = ""; };
      loginShellInit = mkOption { type = types.lines; default = ""; };
      interactiveShellInit = mkOption { type = types.lines; default = ""; };
      shells = mkOption { type = types.listOf (types.either types.shellPackage types.path); default = [ ]; };
      enableAllTerminfo = mkOption { type = types.bool; default = false; };
    };
    programs = lib.genAttrs programs (_: mkOption {
      type = types.submodule {
        freeformType = types.attrsOf types.anything;
        options.enable = mkOption { type = types.bool; default = false; };
      };
      default = { };
    }) // {
      bash.enable = mkOption { type = types.bool; default = true; };
      bash.interactiveShellInit = mkOption { type = types.lines; default = ""; };
      bash.shellAliases = mkOption { type = types.attrsOf (types.nullOr types.str); default = { }; };
    };
  };

  config = {
    environment.systemPackages = with pkgs; [
      bashInteractive bzip2 coreutils cpio curl dbus diffutils e2fsprogs file findutils gawk glibc gnugrep gnused gnutar gzip hostname
      iproute2 iputils kmod less mount ncurses netcat nixos-version openssh procps psmisc shadow systemd util-linux which xz zstd
    ] ++ cfg.defaultPackages ++ map (n: pkgs.${n}) (lib.filter (n: config.programs.${n}.enable) programs);
    environment.variables = { EDITOR = lib.mkDefault "nano"; PAGER = lib.mkDefault "less -R"; };

    environment.etc = {
      set-environment.text = ''
        # Sourced by /etc/profile and /etc/bashrc.
        export __NIXOS_SET_ENVIRONMENT_DONE=1
        export PATH="${path}"
        ${lib.concatLines (lib.mapAttrsToList (n: v: "export ${n}=${lib.escapeShellArg v}") variables)}
      '';
      profile.text = ''
        if [ -n "$__ETC_PROFILE_SOURCED" ]; then return; fi
        __ETC_PROFILE_SOURCED=1
        if [ -z "$__NIXOS_SET_ENVIRONMENT_DONE" ]; then . /etc/set-environment; fi
        ${cfg.shellInit}
        ${cfg.loginShellInit}
        if [ -n "''${BASH_VERSION:-}" ]; then . /etc/bashrc; fi
      '';
      bashrc.text = ''
        if [ -n "$__ETC_BASHRC_SOURCED" ]; then return; fi
        __ETC_BASHRC_SOURCED=1
        if [ -z "$__NIXOS_SET_ENVIRONMENT_DONE" ]; then . /etc/set-environment; fi
        if [ -n "$PS1" ]; then
          PS1='\n\[\033[1;32m\][\u@\h:\w]\$\[\033[0m\] '
          [ "$TERM" != dumb ] || PS1='[\u@\h:\w]\$ '
          ${lib.concatLines (lib.mapAttrsToList (n: v: "alias -- ${n}=${lib.escapeShellArg v}")
            (lib.filterAttrs (_: v: v != null) (cfg.shellAliases // config.programs.bash.shellAliases)))}
          ${cfg.interactiveShellInit}
          ${config.programs.bash.interactiveShellInit}
        fi
      '';
      "bash.bashrc".text = ". /etc/bashrc\n"; # what Debian's bash reads, also for commands over SSH
      zshenv.text = ". /etc/set-environment\nzsh-newuser-install() { :; }\n";
      shells.text = lib.concatLines ([ "/bin/sh" "/bin/bash" ] ++ map (n: "/run/current-system/sw/bin/${n}") [ "bash" "sh" "zsh" ]
        ++ map (s: if lib.isDerivation s then "/run/current-system/sw${s.shellPath}" else toString s) cfg.shells);
    };

    system.path = pkgs.standin.run "system-path" { packages = lib.unique (map toString cfg.systemPackages); } ''
      mkdir -p $out/bin
      for p in $packages; do
        if [ -d "$p/bin" ]; then ls "$p/bin" | sed "s#^#$p/bin/#"; fi
      done | awk -F / '!seen[$NF]++' | xargs -r ln -sf -t $out/bin
      for d in sbin share etc lib; do mkdir -p $out/$d; done
    '';
    # Files and units are written by one derivation: each one costs a process and a scan.
    system.build.etc = pkgs.standin.run "etc" {
      spec = builtins.toJSON {
        files = map (f: {
          inherit (f) target text mode user group;
          source = if f.source == null then null else "${f.source}";
        }) enabled;
        units = config.systemd.built;
        info = "${pkgs.standin.base.info}";
      };
      passAsFile = [ "spec" ];
    } "python3 ${./build-etc.py} $specPath $out";
  };
}
