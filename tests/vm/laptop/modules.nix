# The options of sops-nix, agenix and disko as far as laptop.nix uses them, in the modules' own form.
# As on a real machine without its key, nothing can be decrypted: the scripts fail.
{ lib, config, ... }:
let
  inherit (lib) mkOption types;
  option = type: default: mkOption { inherit type default; };
  secret = module: option (types.attrsOf (types.submodule module)) { };
  noKey = name: "echo ${name}: no key could decrypt the secrets >&2; false";
in
{
  options.disko.devices = option (types.attrsOf types.anything) { };

  options.sops.secrets = secret (
    { name, config, ... }:
    {
      options = {
        name = option types.str name;
        neededForUsers = option types.bool false;
        path = option types.str (
          if config.neededForUsers then "/run/secrets-for-users/${name}" else "/run/secrets/${name}"
        );
        mode = option types.str "0400";
        owner = option (types.nullOr types.str) null;
        uid = option (types.nullOr types.int) 0;
        group = option (types.nullOr types.str) null;
        gid = option (types.nullOr types.int) 0;
        restartUnits = option (types.listOf types.str) [ ];
        reloadUnits = option (types.listOf types.str) [ ];
      };
    }
  );

  options.age.secrets = secret (
    { name, ... }:
    {
      options = {
        name = option types.str name;
        path = option types.str "/run/agenix/${name}";
        mode = option types.str "0400";
        owner = option types.str "0";
        group = option types.str "0";
        symlink = option types.bool true;
      };
    }
  );

  config.system.activationScripts = {
    setupSecretsForUsers = {
      deps = [ "specialfs" ];
      text = noKey "sops-nix";
    };
    setupSecrets = {
      deps = [
        "specialfs"
        "users"
        "groups"
      ];
      text = noKey "sops-nix";
    };
    agenixNewGeneration = {
      deps = [ "specialfs" ];
      text = "echo agenix: a new generation";
    };
    agenixInstall = {
      deps = [ "agenixNewGeneration" ];
      text = noKey "agenix";
    };
    agenixChown = {
      deps = [
        "users"
        "groups"
      ];
      text = noKey "agenix";
    };
    users.deps = lib.optionals (config.sops.secrets != { }) [
      "setupSecretsForUsers"
      "agenixInstall"
    ];
  };
}
