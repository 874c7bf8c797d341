# The module system: options, definitions, priorities, imports, extendModules. Its messages have nixpkgs' form.
lib:
let
  inherit (builtins) any attrNames concatLists concatMap concatStringsSep filter foldl' functionArgs genericClosure
    head isAttrs isBool isFunction isList isPath isString length mapAttrs match removeAttrs sort tail toJSON toString tryEval
    zipAttrsWith;
  inherit (lib) optional optionals;
  tag = v: if isAttrs v then v._type or null else null;
  isOption = v: tag v == "option";

  showOption = loc:
    concatStringsSep "." (map (p: if match "[a-zA-Z_][a-zA-Z0-9_'-]*|[<\\[].*|\\*" p != null then p else toJSON p) loc);
  pretty = depth: v:
    if isString v || isBool v || builtins.isInt v || builtins.isFloat v then toJSON v
    else if v == null then "null"
    else if isPath v then toString v
    else if isFunction v then "<function>"
    else if lib.isDerivation v then "<derivation ${v.name or "?"}>"
    else if depth > 4 then "…"
    else if isList v then "[ ${concatStringsSep " " (map (pretty (depth + 1)) v)} ]"
    else "{ ${concatStringsSep " " (map (n: "${n} = ${pretty (depth + 1) v.${n}};") (attrNames v))} }";
  showDefs = defs: lib.concatMapStrings (d:
    let shown = tryEval (let s = pretty 0 d.value; in builtins.seq s s);
    in "\n- In `${d.file}'${lib.optionalString shown.success ": ${shown.value}"}") defs;

  # mkMerge and mkIf around one value: the values that apply.
  discharge = v:
    if tag v == "merge" then concatMap discharge v.contents
    else if tag v == "if" then
      if isBool v.condition then optionals v.condition (discharge v.content)
      else throw "`mkIf' called with a non-Boolean condition"
    else [ v ];
  # The same around an attribute set, pushed down to its members: the names are known before a condition is forced.
  pushDown = v:
    if tag v == "merge" then concatMap pushDown v.contents
    else if tag v == "if" then map (mapAttrs (_: lib.mkIf v.condition)) (pushDown v.content)
    else if tag v == "override" then map (mapAttrs (_: lib.mkOverride v.priority)) (pushDown v.content)
    else [ v ];

  priority = d: if tag d.value == "override" then d.value.priority else 100;
  order = d: if tag d.value == "order" then d.value.priority else 1000;
  content = wrapper: d: if tag d.value == wrapper then d // { value = d.value.content; } else d;

  mergeDefinitions = loc: type: raw:
    let
      live = concatMap (d: map (value: { inherit (d) file; inherit value; }) (discharge d.value)) raw;
      highestPrio = foldl' (a: d: lib.min a (priority d)) 9999 live;
      winners = map (content "override") (filter (d: priority d == highestPrio) live);
      defs = if any (d: tag d.value == "order") winners
        then map (content "order") (sort (a: b: order a < order b) winners) else winners;
      wrong = filter (d: !type.check d.value) defs;
    in {
      inherit defs highestPrio;
      isDefined = defs != [ ];
      value =
        if defs == [ ]
          then throw "The option `${showOption loc}' was accessed but has no value defined. Try setting the option."
        else if wrong != [ ] then
          throw "A definition for option `${showOption loc}' is not of type `${type.description}'. Definition values:${showDefs wrong}"
        else type.merge loc defs;
    };

  # One option declared by several modules: their types must merge (submodules add up).
  mergeDeclarations = loc: decls: foldl' (a: d:
    let
      clash = throw "The option `${showOption loc}' in `${d.file}' is already declared in `${a.file}'.";
      type = if a.options ? type && d.options ? type then a.options.type.typeMerge d.options.type
        else a.options.type or null;
    in if type == null || a.options ? default && d.options ? default || a.options ? apply && d.options ? apply
      then clash
    else { inherit (a) file; options = a.options // d.options // { inherit type; }; }) (head decls) (tail decls);

  evalOption = loc: decl: defs:
    let
      opt = decl.options;
      type = opt.type or lib.types.unspecified;
      merged = mergeDefinitions loc type
        (optional (opt ? default) { inherit (decl) file; value = lib.mkOptionDefault opt.default; } ++ defs);
      value =
        if opt.readOnly or false && length defs > 1
        then throw "The option `${showOption loc}' is read-only, but it's set multiple times. Definition values:${showDefs defs}"
        else merged.value;
    in opt // {
      inherit loc type;
      inherit (merged) isDefined highestPrio;
      value = (opt.apply or (x: x)) value;
      definitions = map (d: d.value) merged.defs;
      definitionsWithLocations = merged.defs;
      files = map (d: d.file) merged.defs;
      declarations = [ decl.file ];
    };

  # Declarations and definitions, level by level → { options, config, unmatched }.
  build = loc: decls: defs:
    let
      declsBy = zipAttrsWith (_: vs: vs) (map (d: mapAttrs (_: options: {
        inherit (d) file;
        inherit options;
      }) d.options) decls);
      pushed = concatMap (d: map (value:
        if isAttrs value then mapAttrs (_: value: { inherit (d) file; inherit value; }) value
        else throw "The option `${showOption loc}' in `${d.file}' must be an attribute set, but it is ${pretty 0 value}.") (pushDown d.value)) defs;
      defsBy = zipAttrsWith (_: vs: vs) pushed;
      level = mapAttrs (name: ds:
        let here = loc ++ [ name ]; n = length (filter (d: isOption d.options) ds); ours = defsBy.${name} or [ ]; in
        if n == 0 then build here ds ours
        else if n < length ds
          then throw "The option `${showOption here}' is an option and a set of options at once: ${lib.concatMapStringsSep ", " (d: d.file) ds}"
        else let o = evalOption here (mergeDeclarations here ds) ours; in { options = o; config = o.value; unmatched = [ ]; }) declsBy;
    in {
      options = mapAttrs (_: l: l.options) level;
      config = mapAttrs (_: l: l.config) level;
      unmatched = concatMap (l: l.unmatched) (builtins.attrValues level)
        ++ concatLists (lib.mapAttrsToList (name: map (d: d // { loc = loc ++ [ name ]; })) (removeAttrs defsBy (attrNames declsBy)));
    };

  special = [ "_class" "_file" "key" "disabledModules" "imports" "freeformType" ];
  isFile = m: isPath m || isString m || isAttrs m && m ? outPath;

  evalModules = { modules, prefix ? [ ], specialArgs ? { }, class ? null }:
    let
      internal = {
        _file = "lib/modules.nix";
        key = "lib/modules.nix";
        options._module.args = lib.mkOption { type = lib.types.lazyAttrsOf lib.types.raw; default = { }; };
        options._module.check = lib.mkOption { type = lib.types.bool; default = true; };
      };
      args = { inherit lib config options extendModules specialArgs; } // specialArgs;
      call = file: f:
        let
          extra = name: config._module.args.${name}
            or (throw "The module `${file}' asks for the argument `${name}', which neither specialArgs nor _module.args gives.");
        in f (mapAttrs (name: _: extra name) (functionArgs f) // args);

      # A module as written → { key, file, imports, disabledModules, freeformType, options, config }.
      load = parent: n: m:
        let
          file = if isFile m then toString m else parent.file;
          raw = if isFile m then import m else m;
          v = if isFunction raw || raw ? __functor then call file raw else raw;
          structured = v ? config || v ? options;
          extra = attrNames (removeAttrs v (special ++ [ "config" "options" "meta" ]));
          self = {
            key = if isFile m then toString m else v.key or "${parent.key}:anon-${toString n}";
            file = v._file or file;
            imports = v.imports or [ ];
            disabled = v.disabledModules or [ ];
            freeformType = v.freeformType or null;
            options = v.options or { };
            config =
              if tag v != null then v
              else if !structured then removeAttrs v special
              else if extra == [ ] then v.config or { }
              else throw ("Module `${self.file}' has an unsupported attribute `${head extra}'. This is caused by introducing a "
                + "top-level `config' or `options' attribute. Add configuration attributes immediately on the top level "
                + "instead, or move all of them (namely: ${concatStringsSep " " extra}) into the explicit `config' attribute.");
          };
        in if isAttrs v then self
        else throw "Module `${file}' must be an attribute set or a function that returns one, but it is ${pretty 0 v}.";
      loadAll = parent: lib.imap1 (n: m: let self = load parent n m; in { inherit (self) key; inherit self; });
      closure = keep: genericClosure {
        startSet = filter keep (loadAll {
          key = "<unknown-file>";
          file = "<unknown-file>";
        } ([ internal ] ++ modules));
        operator = m: filter keep (loadAll m.self m.self.imports);
      };
      everything = closure (_: true);
      disabled = map (d: if isString d && match "/.*" d == null then "${specialArgs.modulesPath or ""}/${d}" else toString d)
        (concatMap (m: m.self.disabled) everything);
      loaded = map (m: m.self) (if disabled == [ ] then everything else closure (m: !builtins.elem m.key disabled));

      built = build prefix loaded (map (m: { inherit (m) file; value = m.config; }) loaded);
      freeform = lib.findFirst (t: t != null) null (map (m: m.freeformType) loaded);
      freeformDefs = map (d: {
        inherit (d) file;
        value = lib.setAttrByPath (lib.drop (length prefix) d.loc) d.value;
      }) built.unmatched;
      options = built.options;
      config =
        if freeform == null || built.unmatched == [ ] then built.config
        else lib.recursiveUpdateOptions options (freeform.merge prefix freeformDefs) built.config;
      unknown = head built.unmatched;
      checked = v:
        if freeform != null || built.unmatched == [ ] || !config._module.check then v
        else throw ("The option `${showOption unknown.loc}' does not exist. Definition values:"
          + showDefs (filter (d: d.loc == unknown.loc) built.unmatched));

      extendModules = { modules ? [ ], specialArgs ? { }, prefix ? [ ] }: evalModules {
        modules = self.modules ++ modules;
        specialArgs = self.specialArgs // specialArgs;
        prefix = if prefix == [ ] then self.prefix else prefix;
        inherit class;
      };
      self = { inherit modules specialArgs prefix; };
    in {
      _type = "configuration";
      inherit class extendModules;
      options = checked options;
      config = checked (removeAttrs config [ "_module" ]);
      _module = checked config._module;
      type = lib.types.configuration { inherit extendModules; };
    };
in {
  inherit evalModules mergeDefinitions pushDown showOption showDefs isOption;
}
