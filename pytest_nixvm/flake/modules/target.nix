# What the plugin asks of a flake. Every answer is plain data, to be printed as JSON.
{ target }:
let
  inherit (builtins) attrNames concatMap elemAt filter genList head isAttrs length mapAttrs tail;

  overrides = import ./overrides.nix;

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

  # The first of `paths` that exists, null if none does.
  firstOf = paths:
    if paths == [ ] then null
    else if has (head paths) target then head paths
    else firstOf (tail paths);

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
  # `virtualisation.vmVariant`, and what is set there merges with what the user set there.
  # The configuration is extended only if something has to differ, so the usual machine is, bit
  # for bit, what `nix build .#nixosConfigurations.NAME.config.system.build.vm` builds.
  virtualMachine = freezable: nixos:
    let
      virtualisation = nixos.options.virtualisation or { };
      direct = virtualisation ? useNixStoreImage;
      variant = !direct && virtualisation ? vmVariant;
      config = if variant then nixos.config.virtualisation.vmVariant else nixos.config;
      changeable = (direct || variant) && nixos ? extendModules;
      wanted = overrides.always ++ (if freezable then overrides.freezable else [ ]);
      needed =
        if !changeable then [ ]
        else filter
          (o: has o.option config && get o.option config != o.value && (o.only or (_: true)) config)
          wanted;
      # Stronger than mkForce (50) and mkVMOverride (10): a tie would be a conflict.
      force = content: { _type = "override"; priority = 1; inherit content; };
      nest = path: value:
        if path == [ ] then value else { ${head path} = nest (tail path) value; };
      module = option: value: let set = nest option (force value); in
        if direct then set else { virtualisation.vmVariant = set; };
      changes = map (o: module o.option o.value) needed;
      kept = map (option: module option (get option config))
        (filter (option: has option config) (concatMap (o: o.keep or [ ]) needed));
      extended =
        if needed == [ ] then nixos else nixos.extendModules { modules = changes ++ kept; };
      build = extended.config.system.build or { };
    in
    {
      overrides = map (o: { inherit (o) option value reason; }) needed;
      freezable = freezable && changeable;
    } // (if isDerivation (build.vm or null) then derivation build.vm else { noVm = true; });
in
{
  # Where the flake's files are in the store: to translate the paths in Nix's messages.
  source = target.outPath;

  names = {
    nixos = attrNames (target.nixosConfigurations or { });
    darwin = attrNames (target.darwinConfigurations or { });
    outputs = attrNames (target.outputs or target);
  };

  # name → platform, of every NixOS configuration. A host that throws has null and does not hide
  # the others; an error that Nix can't catch (a type error, say) fails the whole listing, then
  # the plugin asks `system` host by host.
  systems = mapAttrs
    (_: nixos: let try = builtins.tryEval (systemOf nixos); in if try.success then try.value else null)
    (target.nixosConfigurations or { });
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
  plan = { freezable }: path:
    let value = get path target; kind = kindOf value; in
    { inherit kind; overrides = [ ]; freezable = false; }
    // (if kind == "derivation" then derivation value
        else if kind == "nixos" then virtualMachine freezable value
        else { });
}
