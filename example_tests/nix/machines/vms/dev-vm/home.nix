# The home of whoever uses dev-vm (Home Manager).
{ userConfig, ... }:
{
  programs.git = {
    enable = true;
    settings = {
      user.name = userConfig.description;
      user.email = "${userConfig.username}@localhost";
      init.defaultBranch = "main";
    };
  };
}
