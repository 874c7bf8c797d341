# The part of nixpkgs' lib that ordinary configurations use.
let
  b = builtins;
  lib = rec {
    inherit (b) all any attrNames attrValues catAttrs concatLists concatMap concatStringsSep deepSeq elem elemAt filter foldl'
      fromJSON functionArgs genList getAttr groupBy hasAttr head isAttrs isBool isFloat isFunction isInt isList isPath isString
      length lessThan listToAttrs mapAttrs match partition pathExists readFile removeAttrs replaceStrings seq sort split
      stringLength substring tail toJSON toString trace tryEval typeOf zipAttrsWith;

    # definitions and options
    mkOverride = priority: content: { _type = "override"; inherit priority content; };
    mkVMOverride = mkOverride 10;
    mkForce = mkOverride 50;
    mkImageMediaOverride = mkOverride 60;
    mkDefault = mkOverride 1000;
    mkOptionDefault = mkOverride 1500;
    mkOrder = priority: content: { _type = "order"; inherit priority content; };
    mkBefore = mkOrder 500;
    mkAfter = mkOrder 1500;
    mkIf = condition: content: { _type = "if"; inherit condition content; };
    mkMerge = contents: { _type = "merge"; inherit contents; };
    mkAssert = assertion: message: content: mkIf (if assertion then true else throw "\nFailed assertion: ${message}") content;
    mkOption = o: { _type = "option"; } // o;
    mkEnableOption = name: mkOption {
      type = types.bool;
      default = false;
      example = true;
      description = "Whether to enable ${toString name}.";
    };
    mkPackageOption = pkgs: name: { default ? name, nullable ? false, ... }: mkOption {
      type = if nullable then types.nullOr types.package else types.package;
      default = if default == null then null else getAttrFromPath (toList default) pkgs;
    };
    literalExpression = text: { _type = "literalExpression"; inherit text; };
    literalMD = literalExpression;
    mdDoc = x: x;
    inherit (import ./modules.nix lib) evalModules mergeDefinitions pushDown showOption showDefs isOption;
    types = import ./types.nix lib;

    # attribute sets
    nameValuePair = name: value: { inherit name value; };
    mapAttrsToList = f: s: map (n: f n s.${n}) (attrNames s);
    attrsToList = mapAttrsToList nameValuePair;
    mapAttrs' = f: s: listToAttrs (mapAttrsToList f s);
    genAttrs = names: f: listToAttrs (map (n: nameValuePair n (f n)) names);
    genAttrs' = xs: f: listToAttrs (map f xs);
    filterAttrs = f: s: removeAttrs s (filter (n: !f n s.${n}) (attrNames s));
    concatMapAttrs = f: s: mergeAttrsList (mapAttrsToList f s);
    mergeAttrsList = foldl' mergeAttrs { };
    mergeAttrs = a: c: a // c;
    foldlAttrs = f: init: s: foldl' (acc: n: f acc n s.${n}) init (attrNames s);
    optionalAttrs = c: s: if c then s else { };
    attrByPath = path: default: s:
      if path == [ ] then s else if s ? ${head path} then attrByPath (tail path) default s.${head path} else default;
    hasAttrByPath = path: s: path == [ ] || isAttrs s && s ? ${head path} && hasAttrByPath (tail path) s.${head path};
    getAttrFromPath = path: s: attrByPath path (throw "cannot find attribute `${concatStringsSep "." path}'") s;
    setAttrByPath = path: value: if path == [ ] then value else { ${head path} = setAttrByPath (tail path) value; };
    recursiveUpdate = recursiveUpdateWith (l: r: isAttrs l && isAttrs r && !isDerivation r);
    recursiveUpdateWith = descend: l: r: l
      // mapAttrs (n: v: if l ? ${n} && descend l.${n} v then recursiveUpdateWith descend l.${n} v else v) r;
    # Like recursiveUpdate, but an option's own value is taken whole: only the tree of options is descended.
    recursiveUpdateOptions = options: l: r: l // mapAttrs (n: v:
      if l ? ${n} && !(isOption options.${n}) then recursiveUpdateOptions options.${n} l.${n} v else v) r;
    mapAttrsRecursive = mapAttrsRecursiveCond (_: true);
    mapAttrsRecursiveCond = cond: f: let go = path: mapAttrs (n: v: if isAttrs v && cond v then go (path ++ [ n ]) v else f (path ++ [ n ]) v); in go [ ];
    collect = pred: v: if pred v then [ v ] else if isAttrs v then concatMap (collect pred) (attrValues v) else [ ];
    zipAttrs = zipAttrsWith (_: vs: vs);
    isDerivation = v: isAttrs v && v.type or null == "derivation";
    getBin = p: p.bin or p;
    getExe = p: getExe' p (p.meta.mainProgram or p.pname or p.name);
    getExe' = p: n: "${getBin p}/bin/${n}";
    makeBinPath = concatMapStringsSep ":" (p: "${getBin p}/bin");

    # lists
    optional = c: x: if c then [ x ] else [ ];
    optionals = c: xs: if c then xs else [ ];
    singleton = x: [ x ];
    toList = x: if isList x then x else [ x ];
    flatten = x: if isList x then concatMap flatten x else [ x ];
    unique = foldl' (acc: x: if elem x acc then acc else acc ++ [ x ]) [ ];
    last = xs: elemAt xs (length xs - 1);
    init = xs: take (length xs - 1) xs;
    take = n: xs: genList (elemAt xs) (min n (length xs));
    drop = n: xs: genList (i: elemAt xs (i + n)) (max 0 (length xs - n));
    reverseList = xs: let n = length xs; in genList (i: elemAt xs (n - i - 1)) n;
    range = from: to: if from > to then [ ] else genList (i: from + i) (to - from + 1);
    imap0 = f: xs: genList (i: f i (elemAt xs i)) (length xs);
    imap1 = f: imap0 (i: f (i + 1));
    foldr = f: z: xs: if xs == [ ] then z else f (head xs) (foldr f z (tail xs));
    fold = foldr;
    findFirst = pred: default: xs: let found = filter pred xs; in if found == [ ] then default else head found;
    count = pred: xs: length (filter pred xs);
    remove = x: filter (y: y != x);
    subtractLists = xs: filter (y: !elem y xs);
    intersectLists = xs: filter (y: elem y xs);
    zipListsWith = f: xs: ys: genList (i: f (elemAt xs i) (elemAt ys i)) (min (length xs) (length ys));
    zipLists = zipListsWith (fst: snd: { inherit fst snd; });
    cartesianProduct = foldlAttrs (acc: n: vs: concatMap (a: map (v: a // { ${n} = v; }) vs) acc) [ { } ];
    forEach = xs: f: map f xs;
    crossLists = f: foldl' (fs: args: concatMap (g: map g args) fs) [ f ];
    naturalSort = sort lessThan;
    sortOn = f: sort (x: y: f x < f y);
    compareLists = cmp: x: y: if x == y then 0 else if x < y then -1 else 1;
    sum = foldl' (x: y: x + y) 0;

    # strings
    optionalString = c: s: if c then s else "";
    concatStrings = concatStringsSep "";
    concatMapStrings = f: xs: concatStrings (map f xs);
    concatMapStringsSep = sep: f: xs: concatStringsSep sep (map f xs);
    concatImapStringsSep = sep: f: xs: concatStringsSep sep (imap1 f xs);
    concatLines = concatMapStrings (s: s + "\n");
    hasPrefix = prefix: s: substring 0 (stringLength prefix) s == prefix;
    hasSuffix = suffix: s: let n = stringLength s - stringLength suffix; in n >= 0 && substring n (-1) s == suffix;
    hasInfix = infix: s: length (splitString infix s) > 1;
    removePrefix = prefix: s: if hasPrefix prefix s then substring (stringLength prefix) (-1) s else s;
    removeSuffix = suffix: s: if hasSuffix suffix s then substring 0 (stringLength s - stringLength suffix) s else s;
    splitString = sep: s: map b.unsafeDiscardStringContext (filter isString (split (escapeRegex sep) (toString s)));
    escape = chars: replaceStrings chars (map (c: "\\${c}") chars);
    escapeRegex = escape (stringToCharacters "\\[{()^$?*+|.");
    stringToCharacters = s: genList (i: substring i 1 s) (stringLength s);
    lowerChars = stringToCharacters "abcdefghijklmnopqrstuvwxyz";
    upperChars = stringToCharacters "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
    toUpper = replaceStrings lowerChars upperChars;
    toLower = replaceStrings upperChars lowerChars;
    toInt = s: let m = match "[[:space:]]*(-?0*[0-9]+)[[:space:]]*" s; n = if m == null then null
      else fromJSON (fixZeros (head m)); in
      if isInt n then n else throw "lib.toInt: could not convert ${toJSON s} to int.";
    fixZeros = s: let m = match "(-?)0*([0-9]+)" s; in concatStrings m;
    toIntBase10 = toInt;
    fixedWidthString = width: filler: s: if stringLength s >= width then s
      else fixedWidthString width filler (filler + s);
    fixedWidthNumber = width: n: fixedWidthString width "0" (toString n);
    escapeShellArg = arg: let s = toString arg; in
      if match "[[:alnum:],._+:@%/-]+" s != null then s else "'${replaceStrings [ "'" ] [ "'\\''" ] s}'";
    escapeShellArgs = concatMapStringsSep " " escapeShellArg;
    trim = s: let m = match "[[:space:]]*(.*[^[:space:]])[[:space:]]*" s; in if m == null then "" else head m;
    boolToString = v: if v then "true" else "false";
    versionOlder = v1: v2: b.compareVersions v2 v1 == 1;
    versionAtLeast = v1: v2: !versionOlder v1 v2;
    isStringLike = v: isString v || isPath v || isAttrs v && (v ? outPath || v ? __toString);
    isStorePath = v: isStringLike v && hasPrefix "${b.storeDir}/" (toString v)
      && match "[^/]+" (b.unsafeDiscardStringContext (removePrefix "${b.storeDir}/" (toString v))) != null;
    getName = v: if isString v then (b.parseDrvName v).name else v.pname or (b.parseDrvName v.name).name;
    getVersion = v: if isString v then (b.parseDrvName v).version else v.version or (b.parseDrvName v.name).version;

    # the rest
    id = x: x;
    const = x: _: x;
    flip = f: x: y: f y x;
    pipe = foldl' (x: f: f x);
    fix = f: let x = f x; in x;
    min = x: y: if x < y then x else y;
    max = x: y: if x > y then x else y;
    pow = base: n: if n == 0 then 1 else base * pow base (n - 1);
    mod = base: n: base - n * (base / n);
    toFunction = v: if isFunction v then v else _: v;
    importJSON = path: fromJSON (readFile path);
    importTOML = path: b.fromTOML (readFile path);
    fileContents = file: removeSuffix "\n" (readFile file);
    cleanSource = src: src;
    warn = msg: b.trace "evaluation warning: ${msg}";
    warnIf = c: msg: if c then warn msg else id;
    warnIfNot = c: warnIf (!c);
    throwIf = c: msg: if c then throw msg else id;
    throwIfNot = c: throwIf (!c);
    assertMsg = c: msg: c || throw msg;
    filesystem.listFilesRecursive = dir: flatten (mapAttrsToList (n: type:
      if type == "directory" then filesystem.listFilesRecursive (dir + "/${n}") else dir + "/${n}") (b.readDir dir));
    generators = {
      toJSON = _: toJSON;
      mkKeyValueDefault = _: sep: k: v: "${k}${sep}${if isBool v then boolToString v else toString v}";
      toKeyValue = { mkKeyValue ? generators.mkKeyValueDefault { } "=", ... }: s: concatLines (mapAttrsToList mkKeyValue s);
      toINI = { mkKeyValue ? generators.mkKeyValueDefault { } "=", ... }: s:
        concatStringsSep "\n" (mapAttrsToList (n: v: "[${n}]\n${generators.toKeyValue { inherit mkKeyValue; } v}") s);
    };
    systems = {
      flakeExposed = [ "x86_64-linux" "aarch64-linux" "x86_64-darwin" "aarch64-darwin" ];
      doubles.all = systems.flakeExposed;
      elaborate = system: import ./platform.nix (system.system or system);
    };
    platforms = { linux = [ "x86_64-linux" "aarch64-linux" ]; darwin = [ "x86_64-darwin" "aarch64-darwin" ]; all = platforms.linux ++ platforms.darwin; };
    licenses = genAttrs [ "mit" "asl20" "gpl2Plus" "gpl3Plus" "bsd2" "bsd3" "unfree" ] (shortName: { inherit shortName; });
    maintainers = { };
    version = "25.11.standin";
    trivial = { release = "25.11"; version = lib.version; inherit importJSON; };
    strings = lib; lists = lib; attrsets = lib; options = lib; modules = lib; meta = lib; fixedPoints = lib;
    extend = f: lib // f lib lib;
  };
in lib
