# The guest agent, log-in on consoles, PAM and sudo.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types mkIf mkEnableOption;
  cfg = config.services;
  autologin = lib.optionals (cfg.getty.autologinUser != null) [ "--autologin" cfg.getty.autologinUser ];
  agetty = "/sbin/agetty ${lib.escapeShellArgs (cfg.getty.extraArgs ++ autologin)}";
  # pam_env gives PATH to every kind of log-in, as in NixOS. No pam_systemd: a user manager for each takes a second here.
  rootMay = [ "su" "su-l" "runuser" "runuser-l" "passwd" "chpasswd" "useradd" "usermod" ];
  pam = name: lib.concatLines (
    lib.optional (lib.elem name rootMay) "auth sufficient pam_rootok.so" ++ [
      "auth sufficient pam_unix.so nullok"
      "auth required pam_deny.so"
      "account required pam_unix.so"
      "password required pam_unix.so nullok sha512"
      "session required pam_env.so conffile=/etc/pam/environment readenv=0"
      "session required pam_unix.so"
    ]);
  rule = r: lib.concatMapStrings (who: "${who} ALL=(${r.runAs or "ALL:ALL"}) ${lib.concatMapStringsSep ", " (c:
    if lib.isString c then c else "${lib.concatMapStrings (o: "${o}:") (c.options or [ ])} ${c.command}") (r.commands or [ "ALL" ])}\n")
    (r.users or [ ] ++ map (g: "%${g}") (r.groups or [ ]));
in {
  options = {
    services.qemuGuest.enable = mkEnableOption "the QEMU guest agent";
    services.getty = {
      autologinUser = mkOption { type = types.nullOr types.str; default = null; };
      autologinOnce = mkOption { type = types.bool; default = false; };
      extraArgs = mkOption { type = types.listOf types.str; default = [ ]; };
      greetingLine = mkOption {
        type = types.str;
        default = "<<< Welcome to ${config.system.nixos.distroName} ${config.system.nixos.label} (\\m) - \\l >>>";
      };
      helpLine = mkOption { type = types.lines; default = ""; };
    };
    security.sudo = {
      enable = mkOption { type = types.bool; default = true; };
      wheelNeedsPassword = mkOption { type = types.bool; default = true; };
      extraRules = mkOption { type = types.listOf (types.attrsOf types.anything); default = [ ]; };
      extraConfig = mkOption { type = types.lines; default = ""; };
    };
    security.pam.names = mkOption { type = types.listOf types.str; default = [ ]; internal = true; };
    security.pam.services = mkOption { type = types.attrsOf (types.attrsOf types.anything); default = { }; };
  };

  config = lib.mkMerge [
    (mkIf cfg.qemuGuest.enable {
      services.udev.extraRules = ''
        SUBSYSTEM=="virtio-ports", ATTR{name}=="org.qemu.guest_agent.0", TAG+="systemd" ENV{SYSTEMD_WANTS}="qemu-guest-agent.service"
      '';
      systemd.services.qemu-guest-agent = {
        description = "Run the QEMU Guest Agent";
        serviceConfig = {
          ExecStart = "/usr/sbin/qemu-ga --statedir /run/qemu-ga";
          Restart = "always";
          RestartSec = 0;
          RuntimeDirectory = "qemu-ga";
          RuntimeDirectoryMode = "0755";
          LogLevelMax = "notice";
        };
      };
    })
    {
      systemd.services."getty@".serviceConfig.ExecStart = [
        "" "-${agetty} --noclear --keep-baud %I 115200,38400,9600 $TERM"
      ];
      systemd.services."serial-getty@".serviceConfig.ExecStart = [
        "" "-${agetty} --keep-baud 115200,57600,38400,9600 %I $TERM"
      ];
      # What logind does in NixOS, for one small process: systemd-logind (with D-Bus) only starts when somebody asks for it.
      systemd.services.power-button = {
        description = "Power off when the power button is pressed";
        wantedBy = [ "multi-user.target" ];
        serviceConfig.ExecStart = "/bin/busybox acpid -f";
      };
      environment.etc."acpi/PWRF/00000080" = {
        mode = "0755";
        text = "#!/bin/sh\nexec /usr/bin/systemctl poweroff\n";
      };
      environment.etc.issue.text = "\n${cfg.getty.greetingLine}\n${cfg.getty.helpLine}\n\n";
      security.pam.names = [
        "login" "su" "su-l" "passwd" "chpasswd" "other" "runuser" "runuser-l" "systemd-user" "sudo" "useradd"
        "usermod"
      ];
    }
    (mkIf config.security.sudo.enable {
      environment.systemPackages = [ pkgs.sudo ];
      environment.etc.sudoers = {
        mode = "0440";
        text = ''
          Defaults secure_path="/run/wrappers/bin:/run/current-system/sw/bin"
          root ALL=(ALL:ALL) SETENV: ALL
          %wheel ALL=(ALL:ALL) ${lib.optionalString (!config.security.sudo.wheelNeedsPassword) "NOPASSWD:"}SETENV: ALL
          ${lib.concatMapStrings rule config.security.sudo.extraRules}${config.security.sudo.extraConfig}
        '';
      };
    })
    {
      environment.etc = lib.genAttrs' config.security.pam.names (n: lib.nameValuePair "pam.d/${n}" { text = pam n; }) // {
        "pam/environment".text = ''
          PATH DEFAULT="/run/wrappers/bin:/etc/profiles/per-user/@{PAM_USER}/bin:/run/current-system/sw/bin"
        '';
      };
    }
  ];
}
