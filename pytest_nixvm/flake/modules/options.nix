# The options that modules in the flake's own source define, each with what they say, as text:
# { "users.users.alice.extraGroups" = "[ \"wheel\" ]"; … }. To tell two generations apart in the
# user's own words: what nixpkgs adds to it is not here.
{ options, source }:
let
  inherit (builtins) attrNames concatMap concatStringsSep deepSeq filter hashString
    isAttrs isBool isFloat isFunction isInt isList isPath isString length match
    split stringLength substring toJSON tryEval unsafeDiscardStringContext zipAttrsWith;

  tag = value: if isAttrs value then value._type or null else null;

  # A module without a file is one that was written into flake.nix itself.
  isOwn = file:
    let text = toString file; in
    text == "<unknown-file>" || substring 0 (stringLength source) text == source;

  # [ { path, option } ] of every option. `_module` is the module system's own; the VM variants
  # are whole configurations.
  leaves = path: set: concatMap
    (name:
      let value = tryEval set.${name}; here = path ++ [ name ]; in
      if !value.success || name == "_module" then [ ]
      else if tag value.value == "option" then [ { path = here; option = value.value; } ]
      else if isAttrs value.value then leaves here value.value
      else [ ])
    (attrNames set);

  # mkIf, mkMerge, mkForce, mkOrder around a value: what is left of them.
  discharge = value:
    if tag value == "if" then (if value.condition then discharge value.content else [ ])
    else if tag value == "merge" then concatMap discharge value.contents
    else if tag value == "override" || tag value == "order" then discharge value.content
    else [ value ];

  isPackage = value: value.type or null == "derivation";

  # What stands in a path of the store changes with everything; its name is what is meant.
  unhashed = text: concatStringsSep "" (map (part: if isList part then "/nix/store/…-" else part)
    (split "/nix/store/[0-9a-z]{32}-" text));
  string = text:
    let plain = unhashed (unsafeDiscardStringContext text); in
    if stringLength plain <= 1000 then toJSON plain
    else "${toJSON (substring 0 80 plain)} … (${toString (stringLength plain)} characters, digest ${
      substring 0 8 (hashString "sha256" plain)})";

  show = depth: value:
    if isString value then string value
    else if value == null then "null"
    else if isBool value || isInt value || isFloat value then toJSON value
    else if isPath value then toString (baseNameOf value)
    else if isFunction value || depth > 6 then "…"
    else if isList value then
      if value == [ ] then "[ ]"
      else "[ ${concatStringsSep " " (map (show (depth + 1)) (concatMap discharge value))} ]"
    else if isPackage value then value.name or "a package"
    else if value ? outPath then "…"
    else if attrNames value == [ ] then "{ }"
    else "{ ${concatStringsSep " " (map (name: "${name} = ${
      concatStringsSep ", " (map (show (depth + 1)) (discharge value.${name}))};") (attrNames value))} }";

  guarded = value:
    let text = tryEval (let shown = show 0 value; in deepSeq shown shown); in
    if text.success then text.value else "…";

  # [ { name; text; } ]: an attribute set is told member by member.
  tell = path: value:
    let members = tryEval (isAttrs value && tag value == null && !(isPackage value)
      && !(value ? outPath) && attrNames value != [ ] && length path < 8); in
    if members.success && members.value
    then concatMap (name: concatMap (tell (path ++ [ name ])) (dischargeOf value.${name})) (attrNames value)
    else [ { name = showPath path; text = hide path (guarded value); } ];
  dischargeOf = value:
    let found = tryEval (discharge value); in if found.success then found.value else [ ];

  # Passwords and their hashes don't belong into reports: only that they differ.
  hide = path: text:
    let
      name = builtins.elemAt path (length path - 1);
      secret = match ".*([Pp]assword|[Pp]assphrase|[Ss]ecret|[Tt]oken|[Pp]rivateKey|[Pp]sk)" name != null;
    in
    if secret && text != "null" && text != "…"
    then "(not shown, digest ${substring 0 4 (hashString "sha256" text)})" else text;

  showPath = path: concatStringsSep "."
    (map (name: if match "[a-zA-Z_][a-zA-Z0-9_'-]*" name != null then name else toJSON name) path);

  definitions = option:
    let
      found = tryEval (
        let own = filter (d: isOwn d.file) (option.definitionsWithLocations or [ ]); in
        if option.internal or false then [ ] else builtins.seq (length own) own);
    in
    if found.success then map (d: d.value) found.value else [ ];

  told = concatMap
    (leaf: concatMap (tell leaf.path) (concatMap dischargeOf (definitions leaf.option)))
    (leaves [ ] options);
in
zipAttrsWith (_: concatStringsSep ", ") (map (t: { ${t.name} = t.text; }) told)
