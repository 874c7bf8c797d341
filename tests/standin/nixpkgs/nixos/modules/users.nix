# users.*: accounts are written at build time (build-users.py); what passwd changed in the guest survives a reboot.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types mkIf mkDefault;
  cfg = config.users;
  password = mkOption { type = types.nullOr (types.passwdEntry types.str); default = null; };
  user = { name, config, ... }: {
    options = {
      enable = mkOption { type = types.bool; default = true; };
      name = mkOption { type = types.passwdEntry types.str; default = name; };
      description = mkOption { type = types.passwdEntry types.str; default = ""; };
      uid = mkOption { type = types.nullOr types.int; default = null; };
      isNormalUser = mkOption { type = types.bool; default = false; };
      isSystemUser = mkOption { type = types.bool; default = false; };
      group = mkOption { type = types.str; default = ""; apply = v: assert lib.stringLength v < 32; v; };
      extraGroups = mkOption { type = types.listOf types.str; default = [ ]; };
      home = mkOption { type = types.passwdEntry types.path; default = "/var/empty"; };
      homeMode = mkOption { type = types.strMatching "[0-7]{1,5}"; default = "700"; };
      createHome = mkOption { type = types.bool; default = false; };
      useDefaultShell = mkOption { type = types.bool; default = false; };
      shell = mkOption {
        type = types.nullOr (types.either types.shellPackage (types.passwdEntry types.path));
        default = "/run/current-system/sw/bin/nologin";
        apply = v: if lib.isDerivation v then "/run/current-system/sw${v.shellPath or "/bin/${lib.getName v}"}"
          else v;
      };
      inherit password;
      hashedPassword = password; initialPassword = password; initialHashedPassword = password; hashedPasswordFile = password;
      openssh.authorizedKeys.keys = mkOption { type = types.listOf types.singleLineStr; default = [ ]; };
      openssh.authorizedKeys.keyFiles = mkOption { type = types.listOf types.path; default = [ ]; };
      packages = mkOption { type = types.listOf types.package; default = [ ]; };
      linger = mkOption { type = types.nullOr types.bool; default = null; };
      autoSubUidGidRange = mkOption { type = types.bool; default = false; };
      ignoreShellProgramCheck = mkOption { type = types.bool; default = false; };
    };
    config = lib.mkMerge [
      (mkIf config.isNormalUser {
        group = mkDefault "users";
        createHome = mkDefault true;
        home = mkDefault "/home/${config.name}";
        useDefaultShell = mkDefault true;
      })
      (mkIf config.useDefaultShell { shell = mkDefault cfg.defaultUserShell; })
    ];
  };
  group = { name, ... }: {
    options = {
      name = mkOption { type = types.passwdEntry types.str; default = name; };
      gid = mkOption { type = types.nullOr types.int; default = null; };
      members = mkOption { type = types.listOf (types.passwdEntry types.str); default = [ ]; };
    };
  };
  users = lib.filter (u: u.enable) (lib.attrValues cfg.users);
  keys = lib.filter (u: u.openssh.authorizedKeys.keys ++ u.openssh.authorizedKeys.keyFiles != [ ]) users;
  accounts = pkgs.standin.run "accounts" {
    spec = builtins.toJSON {
      users = map (u: removeAttrs u [ "openssh" "packages" ]) users;
      groups = lib.attrValues cfg.groups;
    };
    passAsFile = [ "spec" ];
  } "python3 ${./build-users.py} $specPath $out";
in {
  options.users = {
    users = mkOption { type = types.attrsOf (types.submodule user); default = { }; };
    groups = mkOption { type = types.attrsOf (types.submodule group); default = { }; };
    mutableUsers = mkOption { type = types.bool; default = true; };
    defaultUserShell = mkOption {
      type = types.either types.shellPackage types.path;
      default = pkgs.bashInteractive;
    };
    allowNoPasswordLogin = mkOption { type = types.bool; default = false; };
    motd = mkOption { type = types.nullOr types.lines; default = null; };
    extraUsers = mkOption { type = types.attrsOf types.raw; default = { }; };
  };

  config = {
    users.users = lib.mkMerge [
      {
        root = {
          uid = 0;
          description = "System administrator";
          home = "/root";
          shell = mkDefault cfg.defaultUserShell;
          group = "root";
          isSystemUser = true;
        };
        nobody = {
          uid = 65534;
          isSystemUser = true;
          description = "Unprivileged account (don't use!)";
          group = "nogroup";
        };
        messagebus = { uid = 4; isSystemUser = true; group = "messagebus"; };
        systemd-network = { uid = 152; isSystemUser = true; group = "systemd-network"; };
      }
      cfg.extraUsers
    ];
    users.groups = lib.mapAttrs (_: gid: { inherit gid; }) {
      root = 0; wheel = 1; kmem = 2; tty = 3; messagebus = 4; disk = 6; audio = 17; floppy = 18; uucp = 19; lp = 20;
      cdrom = 24; tape = 25; video = 26; dialout = 27; utmp = 29; adm = 55; systemd-journal = 62; users = 100;
      systemd-network = 152; input = 174; kvm = 302; render = 303; sgx = 304; shadow = 318; nixbld = 30000; nogroup = 65534;
    };

    environment.etc = lib.listToAttrs (map (u: lib.nameValuePair "ssh/authorized_keys.d/${u.name}" {
      mode = "0444";
      text = lib.concatLines (u.openssh.authorizedKeys.keys ++ map lib.fileContents u.openssh.authorizedKeys.keyFiles);
    }) keys) // lib.listToAttrs (map (u: lib.nameValuePair "profiles/per-user/${u.name}" {
      source = pkgs.symlinkJoin { name = "user-environment"; paths = u.packages; };
    }) (lib.filter (u: u.packages != [ ]) users));
    system.build.accounts = accounts;
    system.activationScripts.users = {
      text = ''
        accounts=${accounts} mutable=${lib.optionalString cfg.mutableUsers "1"} merge=${./activate-users.awk}
        source ${./activate-users.sh}
      '';
    };

    assertions = lib.concatMap (u: [
      {
        assertion = u.shell == "/run/current-system/sw/bin/zsh" -> config.programs.zsh.enable
          || u.ignoreShellProgramCheck;
        message = "users.users.${u.name}.shell is set to zsh, but\nprograms.zsh.enable is not true.";
      }
      {
        assertion = u.isNormalUser != u.isSystemUser;
        message = "Exactly one of users.users.${u.name}.isSystemUser and users.users.${u.name}.isNormalUser must be set.";
      }
      {
        assertion = u.group != "";
        message = "users.users.${u.name}.group is unset. This used to default to\nnogroup, but this is unsafe.";
      }
      {
        assertion = u.group == "" || lib.any (g: g.name == u.group) (lib.attrValues cfg.groups);
        message = "The primary group `${u.group}' of users.users.${u.name} isn't in users.groups.";
      }
    ]) users;
  };
}
