# sops-nix and agenix themselves, evaluated with nixpkgs' own lib, and what the plugin changes in
# that. What the modules need of NixOS is declared here as nixpkgs declares it.
{ modules, lib, sops, agenix, units }:
let
  derivation' = name: derivation { inherit name; system = "x86_64-linux"; builder = "/bin/sh"; };
  pkgs = lib: {
    age = derivation' "age";
    gnupg = derivation' "gnupg";
    mount = derivation' "mount";
    stdenv = { buildPlatform = "here"; hostPlatform = "here"; };
    writeTextFile = { name, ... }: derivation' name;
    writeText = name: text: builtins.toFile name (builtins.unsafeDiscardStringContext text);
    writeShellScript = name: _: derivation' name;
    callPackage = file: arguments:
      if lib.hasSuffix "manifest-for.nix" (toString file)
      then import file (arguments // { inherit lib; inherit (pkgs lib) writeTextFile; })
      else { sops-install-secrets = derivation' "sops-install-secrets"; };
  };
  evaluate = lib:
    let
      inherit (lib) mkOption types;
      option = type: default: mkOption { inherit type default; };
      free = option (types.attrsOf types.anything) { };
      # nixos/modules/system/activation/activation-script.nix
      script = types.either types.str (types.submodule {
        options = {
          deps = option (types.listOf types.str) [ ];
          text = mkOption { type = types.lines; };
          supportsDryActivation = option types.bool false;
        };
      });
      service = types.submodule {
        freeformType = types.attrsOf types.anything;
        options = { preStart = option types.lines ""; serviceConfig = free; };
      };
      nixos = {
        options = {
          assertions = option (types.listOf types.anything) [ ];
          environment = free;
          i18n = free;
          networking = free;
          users.users = free;
          services.openssh = free;
          services.userborn.enable = option types.bool false;
          services.udev.extraRules = option types.lines "";
          systemd.sysusers.enable = option types.bool false;
          systemd.services = option (types.attrsOf service) { };
          system.build = option (types.lazyAttrsOf types.unspecified) { };
          system.dryActivationScript = option types.str "";
          system.activationScripts = mkOption {
            type = types.attrsOf script;
            default = { };
            apply = set: set // { script = throw "the whole script is not for us"; };
          };
        };
        config._module.args.pkgs = pkgs lib;
      };
      machine = { config, ... }: {
        services.userborn.enable = units;
        services.openssh = {
          enable = true;
          hostKeys = [ { type = "ed25519"; path = "/etc/ssh/ssh_host_ed25519_key"; } ];
        };
        users.users.web.group = "web";
        users.users.alice = { isNormalUser = true; hashedPasswordFile = config.sops.secrets.alice.path; };
        networking.interfaces.enp3s0.ipv4.addresses = [ { address = "10.0.0.5"; prefixLength = 24; } ];
        sops.validateSopsFiles = false;
        sops.defaultSopsFile = builtins.toFile "secrets.yaml" "{}";
        sops.secrets.alice.neededForUsers = true;
        sops.secrets."web/api" = { owner = "web"; restartUnits = [ "web.service" ]; };
        sops.templates.env.content = "KEY=${config.sops.placeholder."web/api"}";
        age.secrets.token = { file = builtins.toFile "token.age" ""; owner = "web"; };
        system.activationScripts.users = lib.mkIf (!units) { text = ""; };
        system.activationScripts.groups = "";
      };
      secrets = import (modules + "/secrets.nix");
      plain = lib.evalModules {
        modules = [ nixos machine (sops + "/modules/sops/default.nix") (agenix + "/modules/age.nix") ];
      };
      # As target.nix applies them.
      nest = path: value: if path == [ ] then value else { ${builtins.head path} = nest (builtins.tail path) value; };
      applies = o: o.merge or false || lib.hasAttrByPath o.option plain.config;
      changed = plain.extendModules {
        modules = map (o: nest o.option (if o.merge or false then o.value else lib.mkOverride 1 o.value))
          (lib.filter applies (
            (import (modules + "/interface.nix")).overrides plain.config
            ++ secrets.overrides plain.config [ { name = "token2"; path = "/etc/token2"; } ]));
      };
    in
    {
      scripts = lib.mapAttrs (_: s: { inherit (s) deps text; })
        (lib.filterAttrs (_: lib.isAttrs) (removeAttrs changed.config.system.activationScripts [ "script" ]));
      services = lib.mapAttrs (_: s: { inherit (s) serviceConfig preStart; script = s.script or ""; })
        changed.config.systemd.services;
      udev = changed.config.services.udev.extraRules;
      declared = import (modules + "/declared.nix") { real = plain.config; vm = changed.config; };
    };
in
evaluate (import lib)
