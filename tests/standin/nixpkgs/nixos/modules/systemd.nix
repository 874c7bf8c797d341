# systemd.*: units, as text with their scripts. What Debian ships under a unit's name gets a drop-in, as in NixOS.
{ lib, config, pkgs, ... }:
let
  inherit (lib) mkOption types mapAttrs' nameValuePair optionalAttrs;
  cfg = config.systemd;
  atom = types.nullOr (types.oneOf [ types.bool types.int types.float types.str types.path types.package ]);
  section = types.attrsOf (types.either atom (types.listOf atom));
  strings = mkOption { type = types.listOf types.str; default = [ ]; };
  lines = mkOption { type = types.lines; default = ""; };
  flag = default: mkOption { type = types.bool; inherit default; };
  field = mkOption { type = types.str; default = "-"; };
  options' = mkOption { type = section; default = { }; };

  common = {
    enable = flag true;
    description = mkOption { type = types.singleLineStr; default = ""; };
    documentation = strings;
    after = strings; before = strings; wants = strings; requires = strings; requisite = strings; bindsTo = strings;
    partOf = strings; conflicts = strings; upholds = strings; onFailure = strings; onSuccess = strings; wantedBy = strings;
    requiredBy = strings; upheldBy = strings;
    aliases = strings;
    unitConfig = options';
    overrideStrategy = mkOption {
      type = types.enum [ "asDropinIfExists" "asDropin" ];
      default = "asDropinIfExists";
    };
    restartTriggers = mkOption { type = types.listOf types.unspecified; default = [ ]; };
    reloadTriggers = mkOption { type = types.listOf types.unspecified; default = [ ]; };
    startLimitBurst = mkOption { type = types.nullOr types.int; default = null; };
    startLimitIntervalSec = mkOption { type = types.nullOr types.int; default = null; };
  };
  service = {
    serviceConfig = options';
    environment = mkOption { type = types.attrsOf atom; default = { }; };
    path = mkOption { type = types.listOf (types.oneOf [ types.package types.str ]); default = [ ]; };
    script = lines; preStart = lines; postStart = lines; preStop = lines; postStop = lines; reload = lines;
    scriptArgs = mkOption { type = types.str; default = ""; };
    enableStrictShellChecks = flag false;
    restartIfChanged = flag true; reloadIfChanged = flag false; stopIfChanged = flag true; notSocketActivated = flag false;
    startAt = mkOption { type = types.either types.str (types.listOf types.str); default = [ ]; apply = lib.toList; };
  };
  mount = {
    what = mkOption { type = types.str; };
    where = mkOption { type = types.str; };
    type = mkOption { type = types.str; default = ""; };
    options = mkOption { type = types.commas; default = ""; };
    mountConfig = options';
  };
  units = extra: mkOption { type = types.attrsOf (types.submodule { options = common // extra; }); default = { }; };

  show = v: if lib.isBool v then lib.boolToString v else toString v;
  body = name: values: lib.optionalString (values != { }) "[${name}]\n" + lib.concatStrings (lib.mapAttrsToList (k: v:
    lib.concatMapStrings (x: "${k}=${show x}\n") (lib.filter (x: x != null) (lib.toList v))) values) + "\n";
  listed = name: values: optionalAttrs (values != [ ]) { ${name} = lib.concatStringsSep " " values; };
  unitSection = u:
    optionalAttrs (u.description != "") { Description = u.description; } // listed "Documentation" u.documentation
    // listed "After" u.after // listed "Before" u.before // listed "Wants" u.wants // listed "Requires" u.requires
    // listed "Requisite" u.requisite // listed "BindsTo" u.bindsTo // listed "PartOf" u.partOf
      // listed "Conflicts" u.conflicts
    // listed "Upholds" u.upholds // listed "OnFailure" u.onFailure // listed "OnSuccess" u.onSuccess
    // optionalAttrs (u.startLimitBurst != null) { StartLimitBurst = u.startLimitBurst; }
    // optionalAttrs (u.startLimitIntervalSec != null) { StartLimitIntervalSec = u.startLimitIntervalSec; }
    // triggers "X-Restart-Triggers" u.restartTriggers // triggers "X-Reload-Triggers" u.reloadTriggers
    // u.unitConfig;
  # NixOS has the path of a file with these texts here.
  triggers = key: values: optionalAttrs (values != [ ]) {
    ${key} = builtins.hashString "sha256" (toString (map toString (lib.flatten values)));
  };
  # What switch-to-configuration is to do with a service that has changed.
  switching = u:
    optionalAttrs u.reloadIfChanged { X-ReloadIfChanged = true; }
    // optionalAttrs (!u.reloadIfChanged && !u.restartIfChanged) { X-RestartIfChanged = false; }
    // optionalAttrs (!u.stopIfChanged) { X-StopIfChanged = false; }
    // optionalAttrs u.notSocketActivated { X-NotSocketActivated = true; };

  unit = suffix: text: name: u: nameValuePair "${name}.${suffix}" {
    inherit (u) enable aliases;
    override = u.overrideStrategy == "asDropin" || u.overrideStrategy == "asDropinIfExists";
    wants = u.wantedBy; requires = u.requiredBy; upholds = u.upheldBy;
    text = body "Unit" (unitSection u) + text u;
  };
  defaultPath = with pkgs; [ coreutils findutils gnugrep gnused systemd ];
  steps = {
    script = "start";
    preStart = "pre-start";
    postStart = "post-start";
    preStop = "pre-stop";
    postStop = "post-stop";
    reload = "reload";
  };
  serviceText = name: u:
    let
      # A path of its own for each: a unit is another one when its own script is, not with any change anywhere.
      file = step:
        let script = scriptName "${name}-${steps.${step}}"; in
        "${pkgs.writeTextFile {
          name = "unit-script-${script}";
          executable = true;
          destination = "/bin/${script}";
          text = "#!${pkgs.runtimeShell}\nset -e\n${u.${step}}\n";
        }}/bin/${script}";
      when = step: key: value: optionalAttrs (u.${step} != "") { ${key} = value; };
      environment = {
        PATH = lib.concatMapStringsSep ":" (p: "${toString p}/bin") (u.path ++ defaultPath);
      } // cfg.globalEnvironment // u.environment;
    in body "Service" ({
      Environment = lib.mapAttrsToList (k: v: builtins.toJSON "${k}=${show v}") (lib.filterAttrs (_: v: v != null) environment);
    } // switching u // u.serviceConfig
      // when "script" "ExecStart" "${file "script"} ${u.scriptArgs}"
      // when "preStart" "ExecStartPre" ([ (file "preStart") ] ++ lib.toList (u.serviceConfig.ExecStartPre or [ ]))
      // when "postStart" "ExecStartPost" (file "postStart") // when "preStop" "ExecStop" (file "preStop")
      // when "postStop" "ExecStopPost" (file "postStop") // when "reload" "ExecReload" (file "reload"));
  scriptName = lib.replaceStrings [ "@" "\\" ":" ] [ "-" "-" "-" ];
  socketText = u: body "Socket" (u.socketConfig
    // optionalAttrs (u.listenStreams != [ ]) { ListenStream = u.listenStreams; }
    // optionalAttrs (u.listenDatagrams != [ ]) { ListenDatagram = u.listenDatagrams; });
  mountText = u: body "Mount" ({ What = u.what; Where = u.where; }
    // optionalAttrs (u.type != "") { Type = u.type; } // optionalAttrs (u.options != "") { Options = u.options; } // u.mountConfig);
  escaped = path: lib.replaceStrings [ "-" "/" ] [ "\\x2d" "-" ] (lib.removePrefix "/" path);
in {
  options.systemd = {
    services = units service;
    sockets = units { socketConfig = options'; listenStreams = strings; listenDatagrams = strings; };
    timers = units { timerConfig = options'; };
    paths = units { pathConfig = options'; };
    targets = units { };
    slices = units { sliceConfig = options'; };
    mounts = mkOption { type = types.listOf (types.submodule { options = common // mount; }); default = [ ]; };
    tmpfiles.rules = strings;
    tmpfiles.settings = mkOption {
      type = types.attrsOf (types.attrsOf (types.attrsOf (types.submodule { options = {
        user = field; group = field; mode = field; age = field; argument = mkOption { type = types.str; default = ""; };
      }; })));
      default = { };
    };
    defaultUnit = mkOption { type = types.str; default = "multi-user.target"; };
    globalEnvironment = mkOption { type = types.attrsOf atom; default = { }; };
    extraConfig = lines;
    settings.Manager = options';
    packages = mkOption { type = types.listOf types.package; default = [ ]; };
    enableEmergencyMode = flag true;
    suppressedSystemUnits = strings;
    built = mkOption { type = types.attrsOf types.raw; default = { }; internal = true; };
  };
  options.services.journald.extraConfig = lines;
  options.services.udev.extraRules = lines;
  # Packages of rules: accepted.
  options.services.udev.packages = mkOption { type = types.listOf types.path; default = [ ]; };

  config = {
    systemd.timers = lib.mapAttrs (_: s: { wantedBy = [ "timers.target" ]; timerConfig.OnCalendar = s.startAt; })
      (lib.filterAttrs (_: s: s.enable && s.startAt != [ ]) cfg.services);
    systemd.built =
      lib.concatMapAttrs (name: u: lib.listToAttrs [ (unit "service" (serviceText name) name u) ]) cfg.services
      // mapAttrs' (unit "socket" socketText) cfg.sockets
      // mapAttrs' (unit "timer" (u: body "Timer" u.timerConfig)) cfg.timers
      // mapAttrs' (unit "path" (u: body "Path" u.pathConfig)) cfg.paths
      // mapAttrs' (unit "target" (_: "")) cfg.targets
      // mapAttrs' (unit "slice" (u: body "Slice" u.sliceConfig)) cfg.slices
      // lib.listToAttrs (map (u: unit "mount" mountText (escaped u.where) u) cfg.mounts)
      // lib.genAttrs cfg.suppressedSystemUnits (_: { enable = false; text = ""; });
    environment.etc = {
      "systemd/system/default.target".source = "/usr/lib/systemd/system/${cfg.defaultUnit}";
      "systemd/system.conf".text = body "Manager" cfg.settings.Manager + cfg.extraConfig;
      "systemd/journald.conf".text = "[Journal]\nStorage=persistent\n" + config.services.journald.extraConfig;
      "tmpfiles.d/00-nixos.conf".text = lib.concatLines cfg.tmpfiles.rules;
    } // mapAttrs' (file: paths: nameValuePair "tmpfiles.d/${file}.conf" {
      text = lib.concatLines (lib.concatLists (lib.mapAttrsToList (path: lib.mapAttrsToList (type: r:
        "${type} ${path} ${r.mode} ${r.user} ${r.group} ${r.age} ${r.argument}")) paths));
    }) cfg.tmpfiles.settings // {
      "udev/rules.d/99-local.rules".text = config.services.udev.extraRules;
    };
  };
}
