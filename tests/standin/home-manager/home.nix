# The options of one home. What has an effect has an option; all else under programs, services, … is accepted.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.home;
  free = mkOption {
    type = types.attrsOf types.anything;
    default = { };
  };
  text =
    kind:
    mkOption {
      type = kind;
      default = "";
    };
  file = types.submodule (
    { name, config, ... }:
    {
      options = {
        enable = mkOption {
          type = types.bool;
          default = true;
        };
        target = mkOption {
          type = types.str;
          default = name;
        };
        text = mkOption {
          type = types.nullOr types.lines;
          default = null;
        };
        source = mkOption { type = types.path; };
        executable = mkOption {
          type = types.nullOr types.bool;
          default = null;
        };
        recursive = mkOption {
          type = types.bool;
          default = false;
        };
        force = mkOption {
          type = types.bool;
          default = false;
        };
      };
      config.source = lib.mkIf (config.text != null) (
        lib.mkDefault (pkgs.writeText (lib.replaceStrings [ "/" "." ] [ "-" "_" ] "hm_${name}") config.text)
      );
    }
  );
  files = mkOption {
    type = types.attrsOf file;
    default = { };
  };
  program = types.submodule {
    freeformType = types.attrsOf types.anything;
    options.enable = mkOption {
      type = types.bool;
      default = false;
    };
  };
  enabled = lib.filterAttrs (_: p: p.enable) config.programs;
  exports =
    values:
    lib.concatStrings (
      lib.mapAttrsToList (name: value: "export ${name}=\"${toString value}\"\n") values
    );
  aliases =
    values:
    lib.concatStrings (
      lib.mapAttrsToList (name: value: "alias -- ${name}=${lib.escapeShellArg value}\n") values
    );

  bash = {
    shellAliases = { };
    sessionVariables = { };
    initExtra = "";
    bashrcExtra = "";
    profileExtra = "";
  }
  // config.programs.bash or { };

  # git's settings: section → key → value, or section → subsection → key → value.
  git = config.programs.git or { };
  show = value: if lib.isBool value then lib.boolToString value else builtins.toJSON (toString value);
  section =
    title: values:
    "[${title}]\n"
    + lib.concatStrings (
      lib.mapAttrsToList (key: value: "\t${key} = ${show value}\n") (
        lib.filterAttrs (_: value: !lib.isAttrs value) values
      )
    )
    + lib.concatStrings (
      lib.mapAttrsToList (name: section "${title} \"${name}\"") (
        lib.filterAttrs (_: lib.isAttrs) values
      )
    );
  gitSettings = lib.foldl' lib.recursiveUpdate { } [
    (lib.optionalAttrs (git ? userName) { user.name = git.userName; })
    (lib.optionalAttrs (git ? userEmail) { user.email = git.userEmail; })
    (lib.optionalAttrs (git ? aliases) { alias = git.aliases; })
    (git.extraConfig or { })
    (git.settings or { })
  ];
in
{
  options = {
    home = {
      username = mkOption { type = types.str; };
      homeDirectory = mkOption { type = types.path; };
      stateVersion = mkOption {
        type = types.nullOr types.str;
        default = null;
      };
      enableNixpkgsReleaseCheck = mkOption {
        type = types.bool;
        default = true;
      };
      packages = mkOption {
        type = types.listOf types.package;
        default = [ ];
      };
      file = files;
      sessionVariables = free;
      shellAliases = free;
      activationPackage = mkOption {
        type = types.package;
        internal = true;
      };
    };
    xdg = {
      enable = mkOption {
        type = types.bool;
        default = false;
      };
      configFile = files;
      dataFile = files;
    };
    programs = mkOption {
      type = types.attrsOf program;
      default = { };
    };
    services = free;
    systemd.user = free;
    dconf = free;
    gtk = free;
    fonts = free;
    news = free;
    nix = free;
    nixpkgs = free;
    manual = free;
    assertions = mkOption {
      type = types.listOf types.unspecified;
      default = [ ];
    };
    warnings = mkOption {
      type = types.listOf types.str;
      default = [ ];
    };
  };

  config.home = {
    # A program that is not a package here has its files only.
    packages = lib.concatLists (
      lib.mapAttrsToList (
        name: _:
        lib.optional (
          !(lib.elem name [
            "bash"
            "home-manager"
          ])
          && pkgs ? ${name}
          && (builtins.tryEval pkgs.${name}).success
        ) pkgs.${name}
      ) enabled
    );
    file = lib.mkMerge [
      (lib.mapAttrs' (name: f: {
        name = ".config/${name}";
        value = removeAttrs f [ "target" ];
      }) config.xdg.configFile)
      (lib.mapAttrs' (name: f: {
        name = ".local/share/${name}";
        value = removeAttrs f [ "target" ];
      }) config.xdg.dataFile)
      (lib.mkIf (enabled ? bash) {
        ".profile".text = exports cfg.sessionVariables + exports bash.sessionVariables + bash.profileExtra;
        ".bash_profile".text = ''
          [[ -f ~/.profile ]] && . ~/.profile
          [[ -f ~/.bashrc ]] && . ~/.bashrc
        '';
        ".bashrc".text = ''
          ${bash.bashrcExtra}
          [[ $- == *i* ]] || return
          ${aliases (cfg.shellAliases // bash.shellAliases)}
          ${bash.initExtra}
        '';
      })
      (lib.mkIf (enabled ? git) {
        ".config/git/config".text = lib.concatStrings (lib.mapAttrsToList section gitSettings);
      })
      (lib.mkIf (enabled ? vim && config.programs.vim ? extraConfig) {
        ".vimrc".text = config.programs.vim.extraConfig;
      })
    ];
    activationPackage =
      pkgs.runCommand "home-manager-generation" { }
        ''
          mkdir -p $out/home-files
          ${lib.concatMapStrings (f: ''
            target=$out/home-files/${lib.escapeShellArg f.target}
            mkdir -p "$(dirname "$target")"
            ${
              if f.recursive then
                ''cp -rs --no-preserve=mode ${f.source} "$target"''
              else if f.executable == null then
                ''ln -s ${f.source} "$target"''
              else
                ''install -m ${if f.executable then "755" else "644"} ${f.source} "$target"''
            }
          '') (lib.filter (f: f.enable) (lib.attrValues cfg.file))}
          sed "s#@out@#$out#g" < ${./activate.sh} > $out/activate
          chmod 755 $out/activate
        '';
  };
}
