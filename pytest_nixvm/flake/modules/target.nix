# What the plugin asks of a flake. Every answer is plain data, to be printed as JSON.
{ target }:
let
  inherit (builtins) attrNames concatMap elem elemAt filter genList head isAttrs length mapAttrs tail
    typeOf unsafeDiscardStringContext;

  overrides = import ./overrides.nix;
  interface = import ./interface.nix;
  secret = import ./secrets.nix;

  # The platform a NixOS configuration is for. Evaluates little more than its `nixpkgs` options;
  # null where the configuration does not say.
  systemOf = nixos:
    nixos.pkgs.stdenv.hostPlatform.system
      or nixos.config.nixpkgs.hostPlatform.system
      or nixos.config.nixpkgs.system
      or nixos.pkgs.system
      or null;

  isDerivation = value: isAttrs value && value.type or null == "derivation";
  isNixos = value: isAttrs value && value ? config && isAttrs value.config && value.config ? system;

  # A path is a list of names. Only its last value stays unevaluated.
  has = path: value:
    path == [ ] || (isAttrs value && value ? ${head path} && has (tail path) value.${head path});
  get = path: value: if path == [ ] then value else get (tail path) value.${head path};

  # Whether it is an option, or in one.
  declares = path: options:
    isAttrs options && (options._type or null == "option"
      || path != [ ] && options ? ${head path} && declares (tail path) options.${head path});

  # The first of `paths` that exists, null if none does.
  firstOf = paths:
    if paths == [ ] then null
    else if has (head paths) target then head paths
    else firstOf (tail paths);

  # The flake's machines of a kind.
  machines = output:
    let found = target.${output} or { }; in
    if isAttrs found then found else throw "its ${output} are no set of machines, but a ${typeOf found}";

  kindOf = value:
    if isDerivation value then "derivation" else if isNixos value then "nixos" else "other";

  # Not `outPath` as a name: a set that has one is printed as that string.
  derivation = value: {
    derivation = value.drvPath;
    output = value.outPath;
    outputName = value.outputName or "out";
    system = value.system or null;
    mainProgram = value.meta.mainProgram or null;
  };

  # The injection rule. `virtualisation.useNixStoreImage` is declared by qemu-vm.nix: where the
  # configuration imports that itself, its options are at the top; elsewhere they exist only in
  # `virtualisation.vmVariant`, and what is set there merges with what the user set there. The VM
  # with a boot loader is a variant of its own (nixpkgs' build-vm.nix).
  shapeOf = bootLoader: nixos:
    let
      virtualisation = nixos.options.virtualisation or { };
      variant = name: {
        inherit name;
        configOf = nixos: nixos.config.virtualisation.${name};
        module = content: { virtualisation.${name} = content; };
      };
    in
    if !(nixos ? extendModules) then null
    else if virtualisation ? useNixStoreImage
    then { name = null; configOf = nixos: nixos.config; module = content: content; }
    else if bootLoader && virtualisation ? vmVariantWithBootLoader
    then variant "vmVariantWithBootLoader"
    else if virtualisation ? vmVariant then variant "vmVariant"
    else null;

  # Stronger than mkForce (50) and mkVMOverride (10): a tie would be a conflict.
  force = content: { _type = "override"; priority = 1; inherit content; };
  suggest = content: { _type = "override"; priority = 1000; inherit content; };
  nest = path: value: if path == [ ] then value else { ${head path} = nest (tail path) value; };

  # The configuration with a boot loader in its VM, and what that took: an entry as in
  # overrides.nix is what the user sees of it.
  withBootLoader = shape: nixos:
    let
      config = shape.configOf nixos;
      loader = config.boot.loader or { };
      variants = nixos.options.virtualisation;
      # A priority that is the option's own default's: the user has said nothing about it.
      unset = option: option.highestPrio or 1500 >= 1500;
    in
    if shape.name == "vmVariantWithBootLoader" then
      # nixpkgs gives that variant nothing of vmVariant. Both are the user's VM, so what is said of
      # the one holds for the other, unless the user has said something of it.
      if unset variants.vmVariantWithBootLoader && !(unset variants.vmVariant)
        && variants.vmVariant ? definitions then {
        modules = [ (shape.module { imports = variants.vmVariant.definitions; }) ];
        entries = [ {
          option = [ "virtualisation" "vmVariantWithBootLoader" ];
          shown = "what virtualisation.vmVariant is";
          reason = "so that with its boot loader it is the machine that it is without";
        } ];
      } else { modules = [ ]; entries = [ ]; }
    else if has [ "virtualisation" "useBootLoader" ] config && !config.virtualisation.useBootLoader then {
      modules = [
        (shape.module { virtualisation.useBootLoader = force true; })
      ] ++ (if !(has [ "virtualisation" "useEFIBoot" ] config) then [ ] else [
        # As nixpkgs' vmVariantWithBootLoader has it.
        (shape.module {
          virtualisation.useEFIBoot =
            suggest (loader.systemd-boot.enable or false || loader.efi.canTouchEfiVariables or false);
        })
      ]);
      entries = [ {
        option = [ "virtualisation" "useBootLoader" ];
        value = true;
        reason = "so that it boots through its own boot loader";
      } ];
    }
    else { modules = [ ]; entries = [ ]; };

  # A path in the store, as a value that a derivation can depend on. Its context says so:
  # builtins.storePath, which would do the same, is forbidden in pure evaluation. The path has to
  # be in the store already; nix looks.
  storePath = path: builtins.appendContext path { ${path} = { path = true; }; };

  # Those of the entries (see overrides.nix) `wanted` that change something in `config`, and the modules that do it, where
  # `place` puts them.
  adapt = { config, options, wanted, place }:
    let
      # What merges adds to a value: that there is something to add, its own file has found out.
      differs = o:
        if o.merge or false then declares o.option options
        else has o.option config && get o.option config != o.value;
      needed = filter (o: differs o && (o.only or (_: true)) config) wanted;
      changes = map
        (o: place (nest o.option (if o.merge or false then o.value else force o.value)))
        needed;
      kept = map (option: place (nest option (force (get option config))))
        (filter (option: has option config) (concatMap (o: o.keep or [ ]) needed));
    in
    { inherit needed; modules = changes ++ kept; };
  shown = o: { inherit (o) option reason; } // (if o ? shown then { inherit (o) shown; } else { inherit (o) value; });

  # The configuration is extended only if something has to differ, so the usual machine is, bit
  # for bit, what `nix build .#nixosConfigurations.NAME.config.system.build.vm` builds.
  virtualMachine = { freezable, bootLoader, carries, secrets, switching }: given:
    let
      shape = shapeOf bootLoader given;
      changeable = shape != null;
      loader = if bootLoader && changeable then withBootLoader shape given else { modules = [ ]; entries = [ ]; };
      nixos = extend given loader.modules;
      config = if changeable then shape.configOf nixos else nixos.config;
      wanted = overrides.always
        ++ (if freezable then overrides.freezable else [ ])
        ++ (if config.virtualisation.useBootLoader or false || bootLoader then overrides.bootLoader
            else if switching then overrides.direct else [ ])
        ++ interface.overrides config
        ++ secret.overrides config secrets;
      adapted = adapt {
        inherit config;
        inherit (given) options;
        wanted = if changeable then wanted else [ ];
        place = shape.module;
      };
      # What else is in its store changes nothing in the system: that is no override.
      carried = if has [ "virtualisation" "additionalPaths" ] config then carries else [ ];
      more = if carried == [ ] then [ ]
        else [ (shape.module { virtualisation.additionalPaths = map storePath carried; }) ];
      extended = extend nixos (adapted.modules ++ more);
      built = if changeable then shape.configOf extended else extended.config;
      build = built.system.build or { };
      # The user's own path to it, where nothing differs: system.build.vm is a mkDefault.
      vm =
        if shape.name or null == "vmVariantWithBootLoader"
        then extended.config.system.build.vmWithBootLoader or build.vm or null
        else extended.config.system.build.vm or null;
    in
    {
      overrides = map shown (loader.entries ++ adapted.needed);
      freezable = freezable && changeable;
      bootLoader = built.virtualisation.useBootLoader or false;
      carries = if changeable then carried else [ ];
      network = if changeable then interface.find config else null;
      secrets = if changeable then secret.find config secrets else [ ];
      # Without a variant that could be looked into, the system at hand is the real machine's.
      toplevel =
        if changeable && isDerivation (build.toplevel or null) then derivation build.toplevel else null;
    } // (if isDerivation vm then derivation vm else { noVm = true; });

  extend = nixos: modules: if modules == [ ] then nixos else nixos.extendModules { inherit modules; };

  declaredOf = variant: path:
    let
      nixos = get path target;
      shape = shapeOf false nixos;
    in
    if kindOf nixos != "nixos" then { } # a bare derivation, about which nothing is known
    else import ./declared.nix {
      real = nixos.config;
      vm =
        if variant != null then imageConfig variant nixos
        else if shape == null then nixos.config
        else shape.configOf nixos;
    };

  # Images, by nixpkgs' names for them (its module image/images.nix). Each is of a configuration of its own, which comes
  # with it.
  imagesOf = nixos: nixos.config.system.build.images or { };
  formatsOf = value:
    let isMachine = kindOf value == "nixos"; in
    {
      images = if isMachine then attrNames (imagesOf value) else null;
      # Such a machine is an image itself (it imports iso-image.nix, say), and nixpkgs has no others of it.
      own = isMachine && value.config.system.build ? image;
    };
  imageConfig = variant: nixos: (imagesOf nixos).${variant}.passthru.config or nixos.config;

  # An image as its owner builds it; `adapted`, it has what lets the tests in. `qemu` and `hardware` are those of the
  # machine's VM.
  imageOf = { variant, adapted, secrets }: given:
    let
      config = imageConfig variant given;
      found = adapt {
        inherit config;
        inherit (given) options;
        wanted = if !adapted || !(given ? extendModules) then [ ]
          else overrides.always ++ overrides.image ++ interface.overrides config ++ secret.overrides config secrets;
        place = content: content;
      };
      nixos = extend given found.modules;
      image = (imagesOf nixos).${variant};
      built = imageConfig variant nixos;
      shape = shapeOf false given;
      vm = if shape == null then { } else (shape.configOf given).virtualisation or { };
      qemu = vm.qemu.package or null;
    in
    derivation image // {
      overrides = map shown found.needed;
      filePath = image.passthru.filePath or (built.image.filePath or null);
      toplevel = unsafeDiscardStringContext built.system.build.toplevel.outPath;
      # disk-image.nix and iso-image.nix have options for it.
      efi = built.image.efiSupport or (variant == "vmware" || !(built.isoImage.makeBiosBootable or true));
      network = interface.find config;
      secrets = if adapted then secret.find config secrets else [ ];
    } // (if !adapted then { } else {
      qemu = if isDerivation qemu then derivation qemu else null;
      hardware = {
        name = given.config.system.name or "nixos";
        memory = vm.memorySize or null;
        cores = vm.cores or null;
        diskSize = vm.diskSize or null;
        graphics = vm.graphics or true;
        qemu = if qemu == null then null else unsafeDiscardStringContext (toString qemu);
      };
    });
in
{
  # Where the flake's files are in the store: to translate the paths in Nix's messages.
  source = target.outPath;

  names = {
    nixos = attrNames (machines "nixosConfigurations");
    darwin = attrNames (machines "darwinConfigurations");
    outputs = attrNames (target.outputs or target);
  };

  # name → platform, of every NixOS configuration. A host that throws has null and does not hide
  # the others; an error that Nix can't catch (a type error, say) fails the whole listing, then
  # the plugin asks `system` host by host.
  systems = mapAttrs
    (_: nixos: let try = builtins.tryEval (systemOf nixos); in if try.success then try.value else null)
    (machines "nixosConfigurations");
  system = name: systemOf target.nixosConfigurations.${name};

  # What is at the first path that exists; `siblings` helps to say what was meant if none does.
  describe = paths:
    let
      path = firstOf paths;
      value = get path target;
      kind = kindOf value;
      siblings = path:
        let parent = genList (elemAt path) (length path - 1); in
        if parent == [ ] then map (name: [ name ]) (attrNames (target.outputs or target))
        else if has parent target && isAttrs (get parent target)
        then map (name: parent ++ [ name ]) (attrNames (get parent target))
        else [ ];
    in
    if path == null then { found = false; siblings = concatMap siblings paths; }
    else {
      found = true;
      inherit path kind;
      system =
        if kind == "nixos" then systemOf value
        else if kind == "derivation" then value.system or null
        else null;
    };

  # What has to be built for it. About a bare derivation nothing can be changed.
  plan = how: path:
    let value = get path target; kind = kindOf value; in
    {
      inherit kind;
      overrides = [ ];
      freezable = false;
      bootLoader = false;
      carries = [ ];
      network = null;
      secrets = [ ];
      toplevel = null;
    } // (if kind == "derivation" then derivation value
          else if kind == "nixos" then virtualMachine how value
          else { });

  # The formats that there are images in.
  images = path: formatsOf (get path target);

  image = how: path:
    let value = get path target; formats = formatsOf value; in
    if formats.images == null || !(elem how.variant formats.images) then formats // { noImage = true; }
    else imageOf how value;

  # The system that the real machine runs, as it is: none of ours in it. Nothing is built.
  toplevelOf = path:
    let toplevel = (get path target).config.system.build.toplevel or null; in
    { output = if toplevel == null then null else unsafeDiscardStringContext toplevel.outPath; };

  # The same, to be built.
  real = path: derivation (get path target).config.system.build.toplevel;

  # What the configuration says of the machine, its VM's (or an image's) and the real one's.
  declared = declaredOf null;
  declaredImage = declaredOf;

  # What the flake's own modules define.
  options = path: import ./options.nix {
    inherit (get path target) options;
    source = target.sourceInfo.outPath or target.outPath;
  };
}
