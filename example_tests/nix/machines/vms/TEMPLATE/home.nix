# The home of whoever uses TEMPLATE (Home Manager). Without this file there is none.
{ userConfig, ... }:
{
  programs.git = {
    enable = true;
    settings.user.name = userConfig.description;
  };
}
