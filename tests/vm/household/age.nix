# What a configuration sees of agenix: options with its names and defaults, and scripts that fail as
# its do on a machine whose host key is not the right one.
{ config, lib, ... }:
let
  inherit (lib) mkOption types;
  inherit (config.users) users;
  cfg = config.age;
  option = type: default: mkOption { inherit type default; };

  secret =
    { name, config, ... }:
    {
      options = {
        name = option types.str name;
        path = option types.str "${cfg.secretsDir}/${config.name}";
        mode = option types.str "0400";
        owner = option types.str "0";
        group = option types.str users.${config.owner}.group or "0";
        symlink = option types.bool true;
      };
    };

  generation = ''
    _agenix_generation="$(basename "$(readlink ${cfg.secretsDir})" || echo 0)"
    (( ++_agenix_generation ))
    echo "[agenix] creating new generation in ${cfg.secretsMountPoint}/$_agenix_generation"
    mkdir -p "${cfg.secretsMountPoint}/$_agenix_generation"
  '';
in
{
  options.age = {
    secrets = option (types.attrsOf (types.submodule secret)) { };
    secretsDir = option types.str "/run/agenix";
    secretsMountPoint = option types.str "/run/agenix.d";
    identityPaths = option (types.listOf types.str) [ "/etc/ssh/ssh_host_ed25519_key" ];
  };

  config.system.activationScripts = {
    agenixNewGeneration = {
      deps = [ "specialfs" ];
      text = generation;
    };
    agenixInstall = {
      deps = [
        "agenixNewGeneration"
        "specialfs"
      ];
      text = ''
        echo "[agenix] decrypting secrets..."
        echo "age: error: no identity matched any of the recipients" >&2
        false
      '';
    };
    users.deps = [ "agenixInstall" ];
    agenixChown = {
      deps = [
        "users"
        "groups"
      ];
      text = ''
        chown :keys "${cfg.secretsMountPoint}/$_agenix_generation"
        ${lib.concatMapStrings (s: "chown ${s.owner}:${s.group} ${s.path}\n") (lib.attrValues cfg.secrets)}
      '';
    };
    agenix = {
      deps = [ "agenixChown" ];
      text = "";
    };
  };
}
