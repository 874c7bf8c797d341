# Machines whose sshd does not let everybody in, each in its own way.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { nixpkgs, ... }:
    let
      machine =
        name: module:
        nixpkgs.lib.nixosSystem {
          modules = [
            module
            {
              nixpkgs.hostPlatform = "x86_64-linux";
              networking.hostName = name;
              services.openssh.enable = nixpkgs.lib.mkDefault true;
              users.users.alice.isNormalUser = true;
              users.users.bob.isNormalUser = true;
              virtualisation.vmVariant.virtualisation = {
                graphics = false;
                cores = 2;
              };
              system.stateVersion = "25.11";
            }
          ];
        };
    in
    {
      nixosConfigurations = builtins.mapAttrs machine {
        other-port.services.openssh.ports = [ 2222 ];
        no-root.services.openssh.settings.PermitRootLogin = "no";
        only-bob.services.openssh.settings.AllowUsers = [ "bob" ];
        keys-elsewhere.services.openssh.authorizedKeysFiles = nixpkgs.lib.mkForce [
          "/etc/ssh/authorized_keys.d/%u"
        ];
        nobody.services.openssh.settings = {
          PermitRootLogin = "no";
          AllowUsers = [ "carol" ];
        };
      };
    };
}
