# Types whose errors say what was expected.
{ lib }:
let
  sizes = import ../../lib/sizes.nix;
  checked =
    name: description: check:
    lib.types.str
    // {
      inherit name description;
      check = value: builtins.isString value && check value;
    };
in
{
  # A size of at least so much: less is a typing error, and a machine that does not start.
  sizeFrom =
    least:
    checked "size" ''size from "${least}", written as a number and its unit, such as "512M" or "20G"'' (
      text:
      builtins.match sizes.pattern text != null && sizes.mebibytes text >= sizes.mebibytes least
    );

  # A directory of the host. A Nix path (./folder) is none: that would be a copy in the store.
  hostPath = checked "hostPath" ''absolute path on the host, or one below "$HOME/", as a string without a comma'' (
    text: builtins.match "(/|[$]HOME/)[^,\n]*" text != null
  );

  guestPath = checked "guestPath" ''absolute path in the guest below "/", without blanks, "." or ".."'' (
    text:
    builtins.match "/[^/[:space:]]+(/[^/[:space:]]+)*" text != null
    && lib.all (part: part != "." && part != "..") (lib.splitString "/" text)
  );
}
