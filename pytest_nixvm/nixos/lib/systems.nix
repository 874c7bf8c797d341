# NixOS systems out of directories of machines.
{ users }:
let
  inherit (builtins)
    concatStringsSep
    filter
    head
    isAttrs
    length
    listToAttrs
    match
    pathExists
    toJSON
    ;

  optional = condition: value: if condition then [ value ] else [ ];

  # RFC 1123, as NixOS has it for networking.hostName.
  isHostName = name: match "[a-zA-Z0-9]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?" name != null;

  checkedName =
    name:
    if isHostName name then
      name
    else
      throw "${toJSON name} can't be a machine's name: it is its host name, so letters, digits and hyphens (dev-vm), no more than 63.";

  # The configuration's own file, or an error that says which one was expected.
  configurationOf =
    name: directory:
    let
      file = directory + "/configuration.nix";
    in
    if pathExists file then
      file
    else
      throw "The machine ${name} has no ${toString file}. A directory that git does not know is not there for Nix either: git add it.";

  # Home Manager as a part of the system, for the machine's home.nix.
  homeModule =
    {
      name,
      file,
      home-manager,
      user,
      specialArgs,
    }:
    if home-manager == null then
      throw "The machine ${name} has a ${toString file}, but Home Manager is missing: give mkSystem `inherit home-manager;` (an input of the flake), or remove the file."
    else if user == null then
      throw "The machine ${name} has a ${toString file}, but nobody whose home that is: give mkSystem a `user`."
    else
      {
        imports = [ (home-manager.nixosModules.home-manager or home-manager.nixosModules.default) ];
        config = {
          home-manager = {
            extraSpecialArgs = specialArgs;
            users.${user.username} =
              { lib, osConfig, ... }:
              {
                imports = [ file ];
                home.stateVersion = lib.mkDefault osConfig.system.stateVersion;
              };
          };
        };
      };

  homeDefaults =
    { lib, ... }:
    {
      home-manager.useGlobalPkgs = lib.mkDefault true;
      home-manager.useUserPackages = lib.mkDefault true;
    };

  # A NixOS system from DIRECTORY/configuration.nix, and DIRECTORY/home.nix where there is one.
  #
  # nixpkgs      the flake input
  # name         its host name, unless the configuration says another
  # directory    where its files are
  # system       its platform, unless the configuration (hardware-configuration.nix) says another
  # modules      more modules
  # specialArgs  more arguments for every module, beside `userConfig`
  # user         who uses it, the modules' `userConfig`: a record as in users.nix, or null
  # users        the people who have an account on it: `user` alone, unless said otherwise
  # home-manager the flake input, for home.nix
  mkSystem =
    {
      nixpkgs,
      name,
      directory,
      system ? "x86_64-linux",
      modules ? [ ],
      specialArgs ? { },
      user ? null,
      users ? optional (user != null) user,
      home-manager ? null,
    }:
    let
      arguments = {
        userConfig = user;
      }
      // specialArgs;
      home = directory + "/home.nix";
      hasHome = pathExists home;
    in
    nixpkgs.lib.nixosSystem {
      specialArgs = arguments;
      modules = [
        (configurationOf name directory)
        (defaults { inherit name system; })
        (userModule users)
      ]
      ++ optional hasHome (homeModule {
        inherit name home-manager user;
        file = home;
        specialArgs = arguments;
      })
      ++ optional hasHome homeDefaults
      ++ modules;
    };

  inherit (users) userModule vmUser;

  # Weaker than a module's own mkDefault: hardware-configuration.nix says its platform so.
  defaults =
    { name, system }:
    { lib, ... }:
    {
      _file = "defaults of pytest-nixvm's mkSystem";
      networking.hostName = lib.mkDefault (checkedName name);
      nixpkgs.hostPlatform = lib.mkOverride 1200 system;
    };

  # The same for a virtual machine: with the module `vm`, which is on, and somebody who uses it.
  mkVmSystem =
    arguments:
    mkSystem (
      {
        user = vmUser;
      }
      // arguments
      // {
        modules = [
          ../modules/vm
          vmDefaults
        ]
        ++ arguments.modules or [ ];
      }
    );

  vmDefaults =
    { lib, ... }:
    {
      _file = "defaults of pytest-nixvm's mkVmSystem";
      vm.enable = lib.mkDefault true;
    };

  # `names` are directories in `directory`; `make` is given { name, directory } of each and returns
  # its system.
  machines =
    {
      names,
      directory,
      make,
    }:
    let
      twice = filter (name: length (filter (other: other == name) names) > 1) names;
      one = name: {
        inherit name;
        value =
          let
            place = directory + "/${name}";
          in
          builtins.seq (configurationOf (checkedName name) place) (make {
            inherit name;
            directory = place;
          });
      };
    in
    if isAttrs names then
      throw "`names` is a list of names, in machines { names = [ … ]; directory = ${toString directory}; … }."
    else if twice != [ ] then
      throw "The machine ${head twice} is named twice: ${concatStringsSep " " names}."
    else
      listToAttrs (map one names);
in
{
  inherit machines mkSystem mkVmSystem;
}
