# People, as records that machines share:
#
#     {
#       username = "alice";            # the only one that has to be there
#       description = "Alice Example";
#       extraGroups = [ "wheel" ];
#       authorizedKeys = [ "ssh-ed25519 …" ];
#       hashedPassword = "$y$…";       # mkpasswd; null: no password opens the account
#       shell = pkgs: pkgs.zsh;        # or a package; null: the system's
#     }
let
  fields = [
    "username"
    "description"
    "extraGroups"
    "authorizedKeys"
    "hashedPassword"
    "shell"
  ];

  checked =
    user:
    let
      unknown = builtins.filter (name: !builtins.elem name fields) (builtins.attrNames user);
    in
    if !builtins.isAttrs user || !builtins.isString (user.username or null) then
      throw ''A user is a set with at least `username`, such as { username = "alice"; }.''
    else if builtins.match "[a-z_][a-z0-9_-]{0,30}" user.username == null then
      throw "The user name ${builtins.toJSON user.username} is not one that Linux takes: lower case, digits, - and _, no more than 31."
    else if unknown != [ ] then
      throw "The user ${user.username} has `${builtins.head unknown}`; known are: ${builtins.concatStringsSep ", " fields}."
    else
      user;
in
{
  # Who uses a VM when nothing else is said. No password opens the account: `nixvm ssh` and the
  # tests bring a key. A password that everybody knows would be in every image, too.
  vmUser = {
    username = "vm";
    description = "User of the virtual machine";
    extraGroups = [ "wheel" ];
    authorizedKeys = [ ];
    hashedPassword = null;
  };

  # A module that declares these people. All of it is a default: what a configuration says of the
  # same account replaces it, and is not added to it. NixOS has mkDefaults of its own for accounts:
  # of the shell, than which ours is stronger, and of the password, than which it is weaker.
  userModule =
    users:
    {
      lib,
      pkgs,
      ...
    }:
    let
      account =
        user:
        let
          shell = user.shell or null;
          hashedPassword = user.hashedPassword or null;
        in
        {
          isNormalUser = lib.mkDefault true;
          description = lib.mkDefault (user.description or "");
          extraGroups = lib.mkDefault (user.extraGroups or [ ]);
          openssh.authorizedKeys.keys = lib.mkDefault (user.authorizedKeys or [ ]);
        }
        // lib.optionalAttrs (hashedPassword != null) {
          hashedPassword = lib.mkOverride 1100 hashedPassword;
        }
        // lib.optionalAttrs (shell != null) {
          shell = lib.mkOverride 900 (if builtins.isFunction shell then shell pkgs else shell);
        };
    in
    {
      _file = "users of pytest-nixvm's mkSystem";
      users.users = lib.listToAttrs (
        map (user: lib.nameValuePair user.username (account user)) (map checked users)
      );
    };
}
