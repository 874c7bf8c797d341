# Sizes as people write them: "512M", "20G", "1T", each a multiple of 1024.
rec {
  pattern = "[1-9][0-9]{0,6}[MGT]";

  # The size in MiB, which is what nixpkgs' options take.
  mebibytes =
    text:
    let
      parts = builtins.match "([1-9][0-9]{0,6})([MGT])" text;
      unit = {
        M = 1;
        G = 1024;
        T = 1024 * 1024;
      };
    in
    if !builtins.isString text || parts == null then
      throw ''${builtins.toJSON text} is no size: a size is a number and its unit, such as "512M", "20G" or "1T".''
    else
      builtins.fromJSON (builtins.elemAt parts 0) * unit.${builtins.elemAt parts 1};
}
