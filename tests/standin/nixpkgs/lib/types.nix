# Types: what a definition must look like (check), and what several of them give (merge).
lib:
let
  inherit (builtins) all concatLists concatMap concatStringsSep elem filter head isAttrs isBool isFloat isFunction isInt
    isList isString length mapAttrs match substring toJSON zipAttrsWith;
  inherit (lib) showOption showDefs mergeDefinitions last;

  advice = "\nUse `lib.mkForce value' or `lib.mkDefault value' to change the priority on any of these definitions.";
  conflict = loc: defs:
    throw "The option `${showOption loc}' has conflicting definition values:${showDefs defs}${advice}";
  mergeEqual = loc: defs: if all (d: d.value == (head defs).value) defs then (head defs).value else conflict loc defs;
  mergeOne = loc: defs:
    if length defs == 1 then (head defs).value
    else throw ("The option `${showOption loc}' is defined multiple times while it's expected to be unique.\n\n"
      + "Definition values:${showDefs defs}${advice}");
  values = map (d: d.value);

  mk = { name, description ? name, check ? (_: true), merge ? mergeEqual, ... }@t: t // {
    _type = "option-type";
    inherit description check merge;
    typeMerge = t.typeMerge or (other: if other.name == name && other.description == description then mk t else null);
  };
  # A type around another one: two declarations merge if what is inside does.
  around = make: name: inner: other:
    if other.name != name then null
    else let t = inner.typeMerge other.nested; in if t == null then null else make t;

  mergeAny = loc: defs:
    if length defs == 1 && !isAttrs (head defs).value then (head defs).value
    else if all (d: isList d.value) defs then concatLists (values defs)
    else if all (d: isAttrs d.value && !lib.isDerivation d.value) defs then
      mapAttrs (n: ds: (mergeDefinitions (loc ++ [ n ]) types.anything ds).value)
        (zipAttrsWith (_: ds: ds) (concatMap (d: map (mapAttrs (_: value: {
          inherit (d) file;
          inherit value;
        })) (lib.pushDown d.value)) defs))
    else if all (d: isFunction d.value) defs
      then x: mergeAny (loc ++ [ "<function body>" ]) (map (d: d // { value = d.value x; }) defs)
    else mergeEqual loc defs;

  intWhere = name: description: test: mk { inherit name description; check = v: isInt v && test v; };
  between = low: high: intWhere "intBetween" "integer between ${toString low} and ${toString high} (both inclusive)" (v: v >= low && v <= high);
  sized = bits: signed:
    let range = if signed then {
      low = -(lib.pow 2 (bits - 1));
      high = lib.pow 2 (bits - 1) - 1;
    } else { low = 0; high = lib.pow 2 bits - 1; };
    in intWhere "${if signed then "s" else "u"}int${toString bits}"
      "${toString bits} bit ${if signed then "" else "un"}signed integer; between ${toString range.low} and ${toString range.high} (both inclusive)"
      (v: v >= range.low && v <= range.high);
  text = name: description: test: mk { inherit name description; check = v: isString v && test v; };
  separated = separator: name: description: mk {
    inherit name description;
    check = isString;
    merge = loc: defs: concatStringsSep separator (values defs);
  };
  attrs = lazy: elem:
    let name = if lazy then "lazyAttrsOf" else "attrsOf"; in mk {
      inherit name;
      description = "${lib.optionalString lazy "lazy "}attribute set of ${elem.description}";
      nested = elem;
      check = v: isAttrs v && !(lib.isDerivation v);
      merge = loc: defs:
        let merged = mapAttrs (n: mergeDefinitions (loc ++ [ n ]) elem)
          (zipAttrsWith (_: ds: ds) (concatMap (d: map (mapAttrs (_: value: {
            inherit (d) file;
            inherit value;
          })) (lib.pushDown d.value)) defs));
        in mapAttrs (_: m: m.value) (if lazy then merged else lib.filterAttrs (_: m: m.isDefined) merged);
      typeMerge = around (attrs lazy) name elem;
    };

  types = {
    unspecified = mk { name = "unspecified"; description = "unspecified value"; merge = mergeAny; };
    anything = mk { name = "anything"; merge = mergeAny; };
    raw = mk { name = "raw"; description = "raw value"; merge = mergeOne; };
    optionType = mk { name = "optionType"; check = v: v._type or "" == "option-type"; };
    bool = mk { name = "bool"; description = "boolean"; check = isBool; };
    int = mk { name = "int"; description = "signed integer"; check = isInt; };
    float = mk { name = "float"; description = "floating point number"; check = isFloat; };
    number = mk {
      name = "number";
      description = "signed integer or floating point number";
      check = v: isInt v || isFloat v;
    };
    ints = {
      inherit between;
      positive = intWhere "positiveInt" "positive integer, meaning >0" (v: v > 0);
      unsigned = intWhere "unsignedInt" "unsigned integer, meaning >=0" (v: v >= 0);
      u8 = sized 8 false; u16 = sized 16 false; u32 = sized 32 false;
      s8 = sized 8 true; s16 = sized 16 true; s32 = sized 32 true;
    };
    port = sized 16 false;
    str = text "str" "string" (_: true);
    singleLineStr = text "singleLineStr" "(optionally newline-terminated) single-line string" (v: match "[^\n\r]*\n?" v != null);
    nonEmptyStr = text "nonEmptyStr" "non-empty string" (v: match "[[:space:]]*" v == null);
    strMatching = pattern: text "strMatching ${toJSON pattern}" "string matching the pattern ${pattern}" (v: match pattern v != null);
    passwdEntry = entry: entry // {
      description = "${entry.description}, not containing newlines or colons";
      check = v: entry.check v && match ".*[\n:].*" v == null;
    };
    lines = separated "\n" "lines" "strings concatenated with \"\\n\"";
    commas = separated "," "commas" "strings concatenated with \",\"";
    envVar = separated ":" "envVar" "strings concatenated with \":\"";
    separatedString = sep: separated sep "separatedString" "strings concatenated with ${toJSON sep}";
    path = mk {
      name = "path";
      description = "absolute path";
      check = v: lib.isStringLike v && substring 0 1 (toString v) == "/";
    };
    pathInStore = mk {
      name = "pathInStore";
      description = "path in the Nix store";
      check = v: lib.isStringLike v && lib.hasPrefix builtins.storeDir (toString v);
    };
    package = mk { name = "package"; check = v: lib.isDerivation v || lib.isStorePath v; merge = mergeOne; };
    shellPackage = types.package // { description = "package for a shell"; };
    attrs = mk {
      name = "attrs";
      description = "attribute set";
      check = isAttrs;
      merge = loc: defs: builtins.foldl' (a: d: a // d.value) { } defs;
    };
    enum = choices: mk {
      name = "enum";
      description = if length choices == 1 then "value ${toJSON (head choices)} (singular enum)"
        else "one of ${lib.concatMapStringsSep ", " toJSON choices}";
      check = v: elem v choices;
      inherit choices;
      typeMerge = other: if other.name == "enum" then types.enum (lib.unique (choices ++ other.choices)) else null;
    };
    nullOr = elem: mk {
      name = "nullOr";
      description = "null or ${elem.description}";
      nested = elem;
      check = v: v == null || elem.check v;
      merge = loc: defs:
        if all (d: d.value == null) defs then null
        else if lib.any (d: d.value == null) defs then conflict loc defs
        else elem.merge loc defs;
      typeMerge = around types.nullOr "nullOr" elem;
    };
    listOf = elem: mk {
      name = "listOf";
      description = "list of ${elem.description}";
      nested = elem;
      check = isList;
      merge = loc: defs: values (filter (m: m.isDefined) (concatLists (lib.imap1 (n: d: lib.imap1 (m: value:
        mergeDefinitions (loc ++ [ "[definition ${toString n}-entry ${toString m}]" ]) elem [ { inherit (d) file; inherit value; } ]) d.value) defs)));
      typeMerge = around types.listOf "listOf" elem;
    };
    nonEmptyListOf = elem: types.listOf elem // {
      description = "non-empty list of ${elem.description}";
      check = v: isList v && v != [ ];
    };
    attrsOf = attrs false;
    lazyAttrsOf = attrs true;
    uniq = elem: elem // { merge = mergeOne; };
    unique = _: types.uniq;
    either = a: b: mk {
      name = "either";
      description = "${a.description} or ${b.description}";
      check = v: a.check v || b.check v;
      merge = loc: defs:
        if all (d: a.check d.value) defs then a.merge loc defs
        else if all (d: b.check d.value) defs then b.merge loc defs
        else mergeOne loc defs;
    };
    oneOf = ts: builtins.foldl' types.either (head ts) (lib.tail ts);
    coercedTo = from: f: to: mk {
      name = "coercedTo";
      description = "${to.description} or ${from.description} convertible to it";
      check = v: to.check v || from.check v && to.check (f v);
      merge = loc: defs: to.merge loc (map (d: if to.check d.value then d else d // { value = f d.value; }) defs);
    };
    functionTo = elem: mk {
      name = "functionTo";
      description = "function that evaluates to a(n) ${elem.description}";
      check = isFunction;
      merge = loc: defs: x: (mergeDefinitions (loc ++ [ "<function body>" ]) elem (map (d: d // { value = d.value x; }) defs)).value;
    };
    deferredModule = mk {
      name = "deferredModule"; description = "module";
      check = v: isAttrs v || isFunction v || types.path.check v;
      merge = loc: defs: { imports = map (d: { _file = d.file; imports = [ d.value ]; }) defs; };
    };

    submodule = modules: types.submoduleWith { modules = lib.toList modules; shorthandOnlyDefinesConfig = true; };
    submoduleWith = { modules, specialArgs ? { }, shorthandOnlyDefinesConfig ? false, ... }@given: mk {
      name = "submodule";
      inherit given;
      check = v: isAttrs v || isFunction v || types.path.check v;
      merge = loc: defs: (lib.evalModules {
        inherit specialArgs;
        prefix = loc;
        modules = [ { _module.args.name = lib.mkOptionDefault (last loc); } ] ++ modules ++ map (d:
          if isAttrs d.value && shorthandOnlyDefinesConfig then { _file = d.file; config = d.value; }
          else { _file = d.file; imports = [ d.value ]; }) defs;
      }).config;
      typeMerge = other:
        if other.name == "submodule" then types.submoduleWith (given // {
          modules = modules ++ other.given.modules;
        }) else null;
    };
    # The type of an evaluated configuration: definitions are more modules for it (virtualisation.vmVariant).
    configuration = { extendModules }: mk {
      name = "configuration"; description = "submodule";
      check = v: isAttrs v || isFunction v || types.path.check v;
      merge = loc: defs: (extendModules {
        prefix = loc;
        modules = map (d: { _file = d.file; imports = [ d.value ]; }) defs;
      }).config;
    };
  };
in types
