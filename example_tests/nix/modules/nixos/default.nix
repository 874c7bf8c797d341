# What the machines have in common, physical or not.
{
  imports = [
    ./basic-system.nix
    ./mainUser.nix
  ];
}
