# system.switch.*, system.preSwitchChecks: bin/switch-to-configuration, and nix-env for the system's profile.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.system;
  net = config.networking;
  # Shown to the user as nixpkgs does; JSON by awk, for there is no jq: one object of strings.
  inhibitors = ''
    incoming="''${1-}"
    action="''${2-}"
    case "$action" in
      boot|dry-activate)
        echo "Not checking switch inhibitors (action = $action)"
        exit ;;
    esac
    echo -n "Checking switch inhibitors..."
    diff=$(awk '
      { text = $0; n = 0
        while (match(text, /"([^"\\]|\\.)*"/)) {
          word = substr(text, RSTART + 1, RLENGTH - 2); text = substr(text, RSTART + RLENGTH)
          if (n++ % 2 == 0) key = word
          else if (FILENAME ~ /^\/run\/current-system\//) { old[key] = word; order[++keys] = key } else new[key] = word
        } }
      END { for (i = 1; i <= keys; i++) { key = order[i]
        if (key in new && new[key] != old[key]) print key " : " old[key] " -> " new[key] } }
    ' $(ls /run/current-system/switch-inhibitors "$incoming/switch-inhibitors" 2> /dev/null) < /dev/null)
    if [ -n "$diff" ]; then
      echo
      echo "There are changes to critical components of the system:"
      echo
      echo "$diff"
      echo
      echo "Switching into this system is not recommended."
      echo "You probably want to run 'nixos-rebuild boot' and reboot your system instead."
      echo
      echo "If you really want to switch into this configuration directly, then"
      echo "you can set NIXOS_NO_CHECK=1 to ignore pre-switch checks."
      echo
      echo "WARNING: doing so might cause the switch to fail or your system to become unstable."
      echo
      exit 1
    else
      echo " done"
    fi
  '';
  text = name: config.environment.etc.${name}.text;
  program = pkgs.standin.run "switch-to-configuration" { } ''
    mkdir -p $out; cp ${./switch-to-configuration.sh} $out/main.sh; cp ${./switch.awk} $out/plan.awk
  '';
  start = ''
    #!${pkgs.runtimeShell}
    OUT='@out@'
    DISTRO_ID=${lib.escapeShellArg cfg.nixos.distroId}
    INSTALL_BOOTLOADER=${lib.escapeShellArg (toString cfg.build.installBootLoader)}
    PRE_SWITCH_CHECK=${cfg.preSwitchChecksScript}
    PLANNER=${program}/plan.awk
    . ${program}/main.sh
  '';
in {
  options.system = {
    switch = {
      enable = mkOption { type = types.bool; default = true; };
      inhibitors = mkOption { type = types.attrsOf types.str; default = { }; };
    };
    preSwitchChecks = mkOption { type = types.attrsOf types.str; default = { }; };
    preSwitchChecksScript = mkOption { type = types.path; internal = true; };
  };

  config = lib.mkMerge [
    {
      system.build.installBootLoader = lib.mkDefault "/usr/bin/true";
      # A real nix comes first.
      environment.systemPackages = lib.mkAfter [ (pkgs.writeScriptBin "nix-env" "#!${pkgs.runtimeShell}\n. ${./nix-env.sh}\n") ];
    }
    (lib.mkIf cfg.switch.enable {
      system.preSwitchChecksScript = pkgs.writeShellScript "pre-switch-checks" (lib.concatStrings (lib.mapAttrsToList (name: text: ''
        # pre-switch check ${name}
        if ! (
          ${text}
        ) >&2; then
          echo "Pre-switch check '${name}' failed" >&2
          exit 1
        fi
      '') cfg.preSwitchChecks));
      system.preSwitchChecks.switchInhibitors = inhibitors;
      # As nixpkgs' module of D-Bus does: the one may not take the other's place in a running system.
      system.switch.inhibitors.dbus-implementation = toString (config.services.dbus.implementation or "dbus");
      system.extraSystemBuilderCmds = ''
        cp ${pkgs.writeText "switch-inhibitors" (builtins.toJSON cfg.switch.inhibitors)} $out/switch-inhibitors
        sed s#@out@#$out#g < ${pkgs.writeText "switch-to-configuration-start" start} > $out/bin/switch-to-configuration
        chmod 755 $out/bin/switch-to-configuration
      '';
    })
    {
      # Only there to start again, when switching, what is ordered before sysinit.target. Nothing starts it at boot.
      systemd.targets.sysinit-reactivation.description = "Reactivate sysinit units";
      systemd.services.systemd-tmpfiles-resetup = {
        description = "Re-setup tmpfiles on a system that is already running.";
        requiredBy = [ "sysinit-reactivation.target" ];
        after = [ "local-fs.target" "systemd-journald.service" ];
        before = [ "sysinit-reactivation.target" "shutdown.target" ];
        conflicts = [ "shutdown.target" ];
        restartTriggers = [ config.systemd.tmpfiles.rules (builtins.toJSON config.systemd.tmpfiles.settings) ];
        unitConfig.DefaultDependencies = false;
        serviceConfig = {
          Type = "oneshot";
          RemainAfterExit = true;
          ExecStart = "/usr/bin/systemd-tmpfiles --create --remove --exclude-prefix=/dev";
          SuccessExitStatus = "DATAERR CANTCREAT";
        };
      };
    }
    {
      # What NixOS's modules say about services that have changed.
      systemd.services = {
        "getty@".restartIfChanged = false;
        "serial-getty@".restartIfChanged = false;
        systemd-journald = { restartTriggers = [ (text "systemd/journald.conf") ]; stopIfChanged = false; };
        systemd-udevd = {
          restartTriggers = [ (text "udev/rules.d/99-local.rules") ];
          stopIfChanged = false;
          notSocketActivated = true;
        };
        systemd-sysctl = lib.mkIf (config.boot.kernel.sysctl != { }) { restartTriggers = [ (text "sysctl.d/60-nixos.conf") ]; };
        systemd-modules-load = lib.mkIf (config.boot.kernelModules != [ ]) {
          restartTriggers = [ (text "modules-load.d/nixos.conf") ];
        };
        sshd = lib.mkIf (config.services.openssh.enable && !config.services.openssh.startWhenNeeded) {
          restartTriggers = [ (text "ssh/sshd_config") ];
          stopIfChanged = false;
        };
        dhcpcd = lib.mkIf (net.useDHCP || lib.any (i: i.useDHCP == true) (lib.attrValues net.interfaces)) {
          stopIfChanged = false;
        };
        firewall = lib.mkIf net.firewall.enable { reloadIfChanged = true; };
      };
    }
  ];
}
