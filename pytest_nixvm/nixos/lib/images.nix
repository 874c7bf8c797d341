# Disk images, by the names that people know them by. nixpkgs has them since 25.05, as
# `system.build.images`, by the names of its modules.
rec {
  # format → nixpkgs' variant.
  formats = {
    qcow2 = "qemu";
    raw = "raw";
    iso = "iso";
    ova = "virtualbox";
    vmdk = "vmware";
    qcow2-efi = "qemu-efi";
    raw-efi = "raw-efi";
  };

  variants = nixos: nixos.config.system.build.images or { };

  variantOf = format: formats.${format} or format;

  # The image of a NixOS configuration in a format, which may be any variant's name, too.
  image =
    nixos: format:
    let
      known = variants nixos;
      names = builtins.attrNames formats;
      offered =
        builtins.filter (name: known ? ${formats.${name}}) names
        ++ builtins.filter (name: !formats ? ${name}) (builtins.attrNames known);
      name = nixos.config.networking.hostName or "this machine";
    in
    if known == { } && nixos.config.system.build ? image then
      throw "${name} is an image itself: a module that it imports makes its `config.system.build.image`, and nixpkgs has no other images of such a machine."
    else if known == { } then
      throw "There are no images of ${name}: its nixpkgs is older than 25.05, and has no `system.build.images`."
    else
      known.${variantOf format} or (throw "There is no image of ${name} in the format ${builtins.toJSON format}; there are: ${
        builtins.concatStringsSep ", " offered
      }.");
}
