# Machines and what is made of them. Nothing here is evaluated before it is asked for, and nothing
# is built while evaluating.
let
  sizes = import ./sizes.nix;
  users = import ./users.nix;
  systems = import ./systems.nix { inherit users; };
  images = import ./images.nix;
  outputs = import ./outputs.nix { inherit images; };
in
{
  inherit (sizes) mebibytes;
  inherit (users) vmUser userModule;
  inherit (systems) machines mkSystem mkVmSystem;
  inherit (images) formats image;
  inherit (outputs)
    apps
    checks
    images
    imagesOf
    ;
}
