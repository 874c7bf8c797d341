# Outputs of a flake, of its `nixosConfigurations`: each by the platform that the machine is for.
{ images }:
let
  inherit (builtins)
    attrNames
    concatMap
    filter
    groupBy
    listToAttrs
    mapAttrs
    ;

  systemOf = nixos: nixos.pkgs.stdenv.hostPlatform.system;

  # { configurations } → { <system> = { <name of an output> = value; }; }. `entries` are the outputs
  # of one machine.
  bySystem =
    entries: configurations:
    mapAttrs
      (
        _: names:
        listToAttrs (
          concatMap (
            name:
            map (entry: {
              name = "${name}${entry.suffix}";
              inherit (entry) value;
            }) (entries name configurations.${name})
          ) names
        )
      )
      (groupBy (name: systemOf configurations.${name}) (attrNames configurations));

  isVm = nixos: nixos.config.vm.enable or false;
  vmsOf = configurations: listToAttrs (
    map (name: {
      inherit name;
      value = configurations.${name};
    }) (filter (name: isVm configurations.${name}) (attrNames configurations))
  );

  imagesBy =
    formatsOf:
    bySystem (
      _: nixos:
      map
        (format: {
          suffix = "-${format}";
          value = images.image nixos format;
        })
        (filter (format: images.variants nixos ? ${images.variantOf format}) (formatsOf nixos))
    );

  # `packages.<system>."<machine>-<format>"`. A format that nixpkgs does not have is left out, for
  # `nix flake check` looks at all of them; `image` says so.
  imagesOf = { configurations, formats }: imagesBy (_: formats) configurations;

  # Where there is no BIOS, there is EFI. VirtualBox, which makes the OVA, is for x86 in nixpkgs.
  usual =
    nixos:
    if systemOf nixos == "x86_64-linux" then
      [
        "qcow2"
        "raw"
        "iso"
        "ova"
        "vmdk"
      ]
    else
      [
        "qcow2-efi"
        "raw-efi"
        "iso"
        "vmdk"
      ];
in
{
  inherit imagesOf;

  # Images of the VMs (of machines with `vm.enable`), in the usual formats of its platform.
  images = configurations: imagesBy usual (vmsOf configurations);

  # `nix run .#<machine>`: the VM, in a window if it has one. Its disk is <machine>.qcow2 in the
  # working directory and stays there; `nixvm run` has more to offer.
  apps =
    configurations:
    bySystem (_: nixos: [
      {
        suffix = "";
        value =
          let
            inherit (nixos.config.system.build) vm;
          in
          {
            type = "app";
            program = "${vm}/bin/${vm.meta.mainProgram or "run-${nixos.config.system.name}-vm"}";
            meta.description = "The virtual machine ${nixos.config.system.name}";
          };
      }
    ]) (vmsOf configurations);

  # `nix flake check`: each machine's system builds.
  checks = bySystem (
    _: nixos: [
      {
        suffix = "";
        value = nixos.config.system.build.toplevel;
      }
    ]
  );
}
