# nix.*: a nix in the guest where `pkgs.nix` is among the system's packages. It is root's own, without a daemon.
{ lib, config, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.nix;
  show = v: if lib.isBool v then lib.boolToString v else if lib.isList v then lib.concatMapStringsSep " " toString v
    else toString v;
in {
  options = {
    nix.settings = mkOption { type = types.attrsOf types.anything; default = { }; };
    nix.extraOptions = mkOption { type = types.lines; default = ""; };
    standin.hasNix = mkOption {
      type = types.bool;
      internal = true;
      default = lib.any (p: p.pname or "" == "nix") config.environment.systemPackages;
    };
  };

  config = lib.mkIf config.standin.hasNix {
    # No users that build, as there is nothing to build with.
    nix.settings = { build-users-group = lib.mkDefault ""; sandbox = lib.mkDefault false; };
    environment.etc."nix/nix.conf".text =
      lib.concatLines (lib.mapAttrsToList (n: v: "${n} = ${show v}") cfg.settings) + cfg.extraOptions;
    # What is in the store: said by whoever starts the machine, or left on its disk by whoever made that.
    boot.postBootCommands = lib.mkBefore ''
      for word in $(< /proc/cmdline); do
        case $word in regInfo=*)
          [ ! -s "''${word#regInfo=}" ] || /run/current-system/sw/bin/nix-store --load-db < "''${word#regInfo=}" ;;
        esac
      done
      if [ -e /nix-path-registration ]; then
        /run/current-system/sw/bin/nix-store --load-db < /nix-path-registration && rm /nix-path-registration
      fi
      mkdir -p /nix/var/nix/gcroots
      ln -sfn /run/booted-system /nix/var/nix/gcroots/booted-system
      ln -sfn /run/current-system /nix/var/nix/gcroots/current-system
    '';
  };
}
