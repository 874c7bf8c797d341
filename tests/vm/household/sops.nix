# What a configuration sees of sops-nix: options with its names and defaults, and scripts that fail
# as its do on a machine that has no key.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.sops;
  option = type: default: mkOption { inherit type default; };

  ownership = {
    mode = option types.str "0400";
    owner = option (types.nullOr types.str) null;
    uid = option (types.nullOr types.int) 0;
    group = option (types.nullOr types.str) null;
    gid = option (types.nullOr types.int) 0;
    restartUnits = option (types.listOf types.str) [ ];
    reloadUnits = option (types.listOf types.str) [ ];
  };
  secret =
    { name, config, ... }:
    {
      options = ownership // {
        name = option types.str name;
        key = option types.str name;
        format = option types.str "yaml";
        neededForUsers = option types.bool false;
        path = option types.str (
          if config.neededForUsers then "/run/secrets-for-users/${config.name}" else "/run/secrets/${config.name}"
        );
      };
    };
  template =
    { name, config, ... }:
    {
      options = ownership // {
        name = option types.str name;
        content = option types.lines "";
        path = option types.str "/run/secrets/rendered/${config.name}";
        file = option types.anything (pkgs.writeText config.name config.content);
      };
    };

  install = what: ''
    [ -e /run/current-system ] || echo setting up ${what}...
    if [ ! -e /var/lib/sops-nix/key.txt ]; then
      echo "sops-install-secrets: cannot read keyfile '/var/lib/sops-nix/key.txt'" >&2
      false
    fi
  '';
in
{
  options.sops = {
    secrets = option (types.attrsOf (types.submodule secret)) { };
    templates = option (types.attrsOf (types.submodule template)) { };
    placeholder = option (types.attrsOf types.str) { };
  };

  config = {
    sops.placeholder = lib.mapAttrs (
      name: _: "<SOPS:${builtins.hashString "sha256" name}:PLACEHOLDER>"
    ) cfg.secrets;

    system.activationScripts = {
      setupSecretsForUsers = {
        deps = [ "specialfs" ];
        text = install "secrets for users";
      };
      users.deps = [ "setupSecretsForUsers" ];
      setupSecrets = {
        deps = [
          "specialfs"
          "users"
          "groups"
        ];
        text = install "secrets";
      };
    };
  };
}
