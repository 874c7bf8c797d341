# Secrets that sops-nix or agenix would decrypt. A VM has no key for them, and should have none: so
# their modules' scripts are replaced by one that makes up a value for each secret when the machine
# boots, and puts it where the configuration expects it, with its owner, group and mode. No value
# is ever in the Nix store. What the modules' own programs do, decrypting, is not tested.
#
# `more` are secrets of the hook `pytest_nixvm_secrets`, as `find` gives them.
let
  inherit (builtins)
    attrValues concatLists concatMap concatStringsSep elem filter isAttrs isList map
    replaceStrings tryEval unsafeDiscardStringContext;

  attempt = default: value:
    let tried = tryEval (builtins.deepSeq value value); in if tried.success then tried.value else default;
  list = value: if value == null then [ ] else if isList value then value else [ value ];
  values = set: if isAttrs set then attrValues set else [ ];
  # A path in the store that a secret's name was taken from must not become a dependency.
  text = value: unsafeDiscardStringContext (toString value);
  optional = condition: value: if condition then [ value ] else [ ];

  # Both modules call root 0.
  named = owner: if text owner == "0" then "root" else text owner;
  orId = name: id: if name != null then text name else if id == null then "0" else text id;

  # Where the value really is, and `path`, which is a link to it where that is another place.
  entry = provider: s: { path, file ? path, early ? false, owner, group, mode }: {
    name = text s.name;
    inherit provider early;
    path = text path;
    file = text file;
    owner = named owner;
    group = named group;
    mode = text mode;
    restartUnits = map text (s.restartUnits or (s.restart_units or [ ]));
    reloadUnits = map text (s.reloadUnits or (s.reload_units or [ ]));
  };

  # https://github.com/Mic92/sops-nix, modules/sops/default.nix
  sops = config: map
    (s:
      let early = s.neededForUsers or false; in
      entry "sops" s {
        inherit early;
        path = s.path or "/run/secrets/${s.name}";
        file = if early then "/run/secrets-for-users/${s.name}" else "/run/secrets/${s.name}";
        owner = orId (s.owner or null) (s.uid or 0);
        group = orId (s.group or null) (s.gid or 0);
        mode = s.mode or "0400";
      })
    (values (config.sops.secrets or { }));

  # https://github.com/ryantm/agenix, modules/age.nix. All are there before the users are.
  age = config: map
    (s:
      let
        default = "${config.age.secretsDir or "/run/agenix"}/${s.name}";
        path = s.path or default;
      in
      entry "age" s {
        early = true;
        inherit path;
        file = if s.symlink or true then default else path;
        owner = s.owner or "0";
        group = s.group or "0";
        mode = s.mode or "0400";
      })
    (values (config.age.secrets or { }));

  hook = map (s: entry "hook" s {
    inherit (s) path;
    owner = s.owner or "root";
    group = s.group or "root";
    mode = s.mode or "0400";
  });

  # What a value has to look like, told by who reads it.
  #
  # hash: a user's password. The form of a hash is right (sha512crypt), but it is of nothing: nobody
  # logs in with a password, and yet the account is not locked, as "!" would be, which keeps an sshd
  # without PAM from accepting keys too.
  # none: a key of sshd's own. Left out, so that sshd makes one where it expects it.
  kind = config:
    let
      users = values (config.users.users or { });
      hashes = concatMap
        (u: list (attempt null (u.hashedPasswordFile or null)) ++ list (attempt null (u.passwordFile or null)))
        users;
      hostKeys = map (k: k.path or null) (list (config.services.openssh.hostKeys or [ ]));
      tunnels = values (config.networking.wireguard.interfaces or { }) ++ values (config.networking.wg-quick.interfaces or { });
      wireguard = concatMap
        (t: list (t.privateKeyFile or null) ++ map (p: p.presharedKeyFile or null) (list (t.peers or [ ])))
        tunnels
        ++ concatMap
        (n: list (n.wireguardConfig.PrivateKeyFile or null))
        (values (config.systemd.network.netdevs or { }));
      sets = {
        hash = attempt [ ] (map text hashes);
        none = attempt [ ] (map text hostKeys);
        wireguard = attempt [ ] (map text (filter (f: f != null) wireguard));
      };
      among = set: s: elem s.path set || elem s.file set;
    in
    s:
    if among sets.hash s then "hash" else if among sets.none s then "none"
    else if among sets.wireguard s then "base64" else "hex";

  # Files that sops-nix makes of a template, with values in it. `content` has only placeholders.
  templates = config: map
    (t: {
      path = text t.path;
      file = text "/run/secrets/rendered/${t.name}";
      owner = orId (t.owner or null) (t.uid or 0);
      group = orId (t.group or null) (t.gid or 0);
      mode = text (t.mode or "0400");
      restartUnits = map text (t.restartUnits or [ ]);
      reloadUnits = map text (t.reloadUnits or [ ]);
      source = t.file;  # the template itself: in the store, and it has to be in the machine's
    })
    (values (config.sops.templates or { }));

  placeholders = config: map
    (s: { inherit (s) name; text = text (config.sops.placeholder.${s.name} or ""); })
    (filter (s: config.sops.placeholder ? ${s.name}) (sops config));

  find = config: more:
    let kindOf = kind config; in
    map (s: s // { kind = kindOf s; })
      (concatMap (each: attempt [ ] each) [ (sops config) (age config) ] ++ hook more);

  quote = value: "'${replaceStrings [ "'" ] [ "'\\''" ] value}'";
  # A name may have slashes in it; declared.py has the same.
  stored = name: replaceStrings [ "%" "/" ] [ "%25" "%2F" ] name;

  # `owned`: whether the users are there by now.
  install = owned: s:
    let
      words = map quote [ (stored s.name) s.kind s.path s.file s.mode ]
        ++ (if owned then map quote [ s.owner s.group ] else [ "0" "0" ]);
    in
    if s.kind == "none" then [ ]
    else [ "install_secret ${concatStringsSep " " words} ${changes s}" ];
  changes = s: quote (concatStringsSep " " s.restartUnits) + " " + quote (concatStringsSep " " s.reloadUnits);
  render = names: t:
    map (p: "placeholder ${quote (stored p.name)} ${quote p.text}") names
    ++ [ "render_template ${quote "${t.source}"} ${concatStringsSep " " (map quote [ t.path t.file t.mode t.owner t.group ])} ${changes t}" ];

  script = group: lines: ''
    # Throwaway values for declared secrets, by pytest-nixvm.
    (
    group=${group}
    ${builtins.readFile ./secrets.sh}
    ${concatStringsSep "\n" lines}
    finish
    )
  '';

  reason = "a VM has no key to decrypt them: each secret gets a throwaway value, made when it boots";
  shown = "… throwaway values";
  replace = option: value: { inherit option value reason shown; };
  # On a system whose users are made by a unit, secrets are installed by one.
  unit = name: value: [
    (replace [ "systemd" "services" name "serviceConfig" "ExecStart" ] "/run/current-system/sw/bin/true")
    (replace [ "systemd" "services" name "preStart" ] value)
  ];
  activation = name: replace [ "system" "activationScripts" name "text" ];
  has = set: name: isAttrs (set.${name} or null);

  overrides = config: more:
    let
      all = find config more;
      by = provider: filter (s: s.provider == provider) all;
      early = filter (s: s.early) (by "sops");
      late = filter (s: !s.early) (by "sops");
      rendered = attempt [ ] (templates config);
      lines = owned: concatMap (install owned);
      sopsScript = script "sops" (lines true late ++ concatMap (render (attempt [ ] (placeholders config))) rendered);
      earlyScript = script "sops-for-users" (lines false early);
      byUnit = (config.systemd.sysusers.enable or false) == true || (config.services.userborn.enable or false) == true;
      services = config.systemd.services or { };
      # A unit that somebody only orders others by is not one that installs anything.
      installs = name: has services name && (services.${name}.serviceConfig or { }) ? ExecStart;
      hookScript = script "hook" (lines true (by "hook"));
    in
    concatLists [
      (if early == [ ] then [ ]
      else [ (activation "setupSecretsForUsers" earlyScript) ]
        ++ concatLists (optional (installs "sops-install-secrets-for-users") (unit "sops-install-secrets-for-users" earlyScript)))
      (if late == [ ] && rendered == [ ] then [ ]
      else [ (activation "setupSecrets" sopsScript) ]
        ++ concatLists (optional (installs "sops-install-secrets") (unit "sops-install-secrets" sopsScript)))
      (if by "age" == [ ] then [ ]
      else [
        (activation "agenixNewGeneration" "")
        (activation "agenixInstall" (script "age" (lines false (by "age"))))
        (activation "agenixChown" (script "age" (lines true (by "age"))))
      ] ++ concatLists (optional (installs "agenix-install-secrets")
        (unit "agenix-install-secrets" (script "age" (lines true (by "age"))))))
      (if by "hook" == [ ] then [ ]
      else optional (!byUnit) {
        option = [ "system" "activationScripts" ];
        value.nixvmSecrets = { text = hookScript; deps = [ "users" "groups" ]; };
        merge = true;
        shown = "… nixvmSecrets";
        reason = "secrets that pytest_nixvm_secrets names get throwaway values, made when it boots";
      } ++ optional byUnit {
        option = [ "systemd" "services" ];
        value.nixvm-secrets = {
          description = "Throwaway values for secrets";
          wantedBy = [ "sysinit.target" ];
          before = [ "sysinit.target" ];
          after = [ "systemd-sysusers.service" "userborn.service" ];
          unitConfig.DefaultDependencies = false;
          serviceConfig = { Type = "oneshot"; RemainAfterExit = true; };
          script = hookScript;
        };
        merge = true;
        shown = "… nixvm-secrets";
        reason = "secrets that pytest_nixvm_secrets names get throwaway values, made when it boots";
      })
    ];
in
{
  inherit find overrides;
  templates = config: attempt [ ] (map (t: t.path) (templates config));
}
