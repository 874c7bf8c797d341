# services.openssh: sshd.service with a configuration of NixOS's form. Only an ed25519 host key is made: RSA takes seconds.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types mkIf mkDefault;
  cfg = config.services.openssh;
  atom = types.nullOr (types.oneOf [ types.bool types.int types.str (types.listOf types.str) ]);
  flag = default: mkOption { type = types.nullOr types.bool; inherit default; };
  show = v: if v == true then "yes"
    else if v == false then "no" else if lib.isList v then lib.concatStringsSep "," v else toString v;
  separate = [ "AllowUsers" "AllowGroups" "DenyUsers" "DenyGroups" ];
  line = k: v:
    let text = if lib.isList v && lib.elem k separate then lib.concatStringsSep " " v else show v; in
    lib.optionalString (v != null) "${k} ${text}\n";
  exec = "/usr/sbin/sshd";
  address = {
    addr = mkOption { type = types.nullOr types.str; default = null; };
    port = mkOption { type = types.nullOr types.int; default = null; };
  };
  listen = l: "ListenAddress ${l.addr}${lib.optionalString (l.port != null) ":${toString l.port}"}\n";
in {
  options.services.openssh = {
    enable = mkOption { type = types.bool; default = false; };
    startWhenNeeded = mkOption { type = types.bool; default = false; };
    ports = mkOption { type = types.listOf types.port; default = [ 22 ]; };
    openFirewall = mkOption { type = types.bool; default = true; };
    allowSFTP = mkOption { type = types.bool; default = true; };
    listenAddresses = mkOption { type = types.listOf (types.submodule { options = address; }); default = [ ]; };
    hostKeys = mkOption {
      type = types.listOf (types.attrsOf types.anything);
      default = [ { type = "ed25519"; path = "/etc/ssh/ssh_host_ed25519_key"; } ];
    };
    authorizedKeysFiles = mkOption { type = types.listOf types.str; default = [ ]; };
    authorizedKeysInHomedir = mkOption { type = types.bool; default = true; };
    banner = mkOption { type = types.nullOr types.lines; default = null; };
    extraConfig = mkOption { type = types.lines; default = ""; };
    settings = mkOption {
      default = { };
      type = types.submodule {
        freeformType = types.attrsOf atom;
        options = {
          PermitRootLogin = mkOption {
            type = types.nullOr (types.enum [
              "yes" "without-password" "prohibit-password" "forced-commands-only" "no"
            ]);
            default = "prohibit-password";
          };
          PasswordAuthentication = flag true;
          KbdInteractiveAuthentication = flag true;
          X11Forwarding = flag false;
          UsePAM = flag true;
          UseDns = flag false;
          StrictModes = flag true;
          GatewayPorts = mkOption { type = types.nullOr types.str; default = "no"; };
          LogLevel = mkOption {
            type = types.nullOr (types.enum [
              "QUIET" "FATAL" "ERROR" "INFO" "VERBOSE" "DEBUG" "DEBUG1" "DEBUG2" "DEBUG3"
            ]);
            default = "INFO";
          };
          PrintMotd = flag false;
          AllowUsers = mkOption { type = types.nullOr (types.listOf types.str); default = null; };
          AllowGroups = mkOption { type = types.nullOr (types.listOf types.str); default = null; };
          DenyUsers = mkOption { type = types.nullOr (types.listOf types.str); default = null; };
          DenyGroups = mkOption { type = types.nullOr (types.listOf types.str); default = null; };
        };
      };
    };
  };

  config = mkIf cfg.enable {
    services.openssh.authorizedKeysFiles = lib.optional cfg.authorizedKeysInHomedir "%h/.ssh/authorized_keys"
      ++ [ "/etc/ssh/authorized_keys.d/%u" ];
    users.users.sshd = { isSystemUser = true; group = "sshd"; description = "SSH privilege separation user"; };
    users.groups.sshd = { };
    networking.firewall.allowedTCPPorts = lib.optionals cfg.openFirewall cfg.ports;
    environment.etc."ssh/sshd_config".text = lib.concatStrings [
      (lib.concatMapStrings (line "Port") cfg.ports)
      (lib.concatMapStrings listen cfg.listenAddresses)
      (lib.concatStrings (lib.mapAttrsToList line cfg.settings))
      (lib.optionalString cfg.allowSFTP "Subsystem sftp /usr/lib/openssh/sftp-server\n")
      (lib.optionalString (cfg.banner != null) "Banner ${pkgs.writeText "ssh_banner" cfg.banner}\n")
      "AddressFamily ${if config.networking.enableIPv6 then "any" else "inet"}\n"
      "AuthorizedKeysFile ${toString cfg.authorizedKeysFiles}\n"
      (lib.concatMapStrings (k: "HostKey ${k.path}\n") cfg.hostKeys)
      cfg.extraConfig
    ];
    environment.etc."ssh/moduli".text = mkDefault "";

    systemd.services.sshd-keygen = {
      description = "SSH Host Keys Generation";
      unitConfig.ConditionFileNotEmpty = map (k: "|!${k.path}") cfg.hostKeys;
      serviceConfig.Type = "oneshot";
      script = lib.concatMapStrings (k: ''
        if ! [ -s "${k.path}" ]; then
          /usr/bin/ssh-keygen -q -t "${k.type}" ${lib.optionalString (k ? bits) "-b ${toString k.bits}"} -f "${k.path}" -N ""
        fi
      '') cfg.hostKeys;
    };
    systemd.services.sshd = mkIf (!cfg.startWhenNeeded) {
      description = "SSH Daemon";
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" "sshd-keygen.service" ];
      wants = [ "sshd-keygen.service" ];
      serviceConfig = {
        Type = "notify";
        Restart = "always";
        ExecStart = "${exec} -D -f /etc/ssh/sshd_config";
        ExecReload = "/bin/kill -HUP $MAINPID";
        KillMode = "process";
        RuntimeDirectory = "sshd";
      };
    };
    systemd.sockets.sshd = mkIf cfg.startWhenNeeded {
      description = "SSH Socket";
      wantedBy = [ "sockets.target" ];
      socketConfig = { ListenStream = map toString cfg.ports; Accept = true; };
    };
    systemd.services."sshd@" = mkIf cfg.startWhenNeeded {
      description = "SSH per-connection Daemon";
      after = [ "network.target" "sshd-keygen.service" ];
      wants = [ "sshd-keygen.service" ];
      serviceConfig = {
        ExecStart = "-${exec} -i -f /etc/ssh/sshd_config";
        StandardInput = "socket";
        KillMode = "process";
        RuntimeDirectory = "sshd";
        RuntimeDirectoryPreserve = true;
      };
    };
    security.pam.names = [ "sshd" ];
  };
}
