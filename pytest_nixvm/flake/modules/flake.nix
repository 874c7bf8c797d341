# A flake around the user's flake. The plugin evaluates
#
#     nix eval --json path:HERE#this --apply 'this: …' --override-input target REF --no-write-lock-file
#
# so that the user's flake is read as it is, with its own flake.lock, purely, and nothing is
# written beside it. `target` is always overridden.
{
  inputs.target.url = "path:/nonexistent";
  outputs = { target, ... }: { this = import ./target.nix { inherit target; }; };
}
