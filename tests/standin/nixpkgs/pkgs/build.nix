# How things are built: with the host's programs, outside of any sandbox. Debian packages come from `prepare`'s lock.
{ lib, system, lock }:
rec {
  # The last command is the shell's own. Else the shell becomes its last program, which may close its output some time
  # before it ends (all of coreutils do), and nix kills a builder whose output is closed.
  ended = script: "${script}\nexit 0\n";
  run = name: env: script: derivation ({
    inherit name system;
    builder = "/bin/bash";
    args = [ "-euc" (ended script) ];
    PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    preferLocalBuild = true;
    allowSubstitutes = false;
  } // env);
  # The same as somebody who may chown: for images.
  runAsRoot = name: env: script: run name ({
    builder = "/usr/bin/fakeroot";
    args = [ "/bin/bash" "-euc" (ended script) ];
  } // env) script;

  # A downloaded package. `prepare` has put it into the store already; nix fetches it again after a garbage collection.
  deb = name: derivation {
    name = "${name}.deb";
    system = "builtin";
    builder = "builtin:fetchurl";
    inherit (lock.debs.${name}) url;
    urls = [ lock.debs.${name}.url ];
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = lock.debs.${name}.sha256;
    preferLocalBuild = true;
    executable = false;
    unpack = false;
    impureEnvVars = [ "http_proxy" "https_proxy" "no_proxy" ];
  };

  writeTextFile = { name, text, executable ? false, destination ? "", meta ? { }, ... }:
    run name { inherit text; passAsFile = [ "text" ]; } ''
      target="$out${destination}"; mkdir -p "''${target%/*}"; cp "$textPath" "$target"
      ${lib.optionalString executable "chmod 755 \"$target\""}
    '' // { inherit meta; };
  writeText = name: text: writeTextFile { inherit name text; };
  writeTextDir = path: text: writeTextFile { name = baseNameOf path; destination = "/${path}"; inherit text; };
  writeScript = name: text: writeTextFile { inherit name text; executable = true; };
  writeScriptBin = name: text: writeTextFile {
    inherit name text;
    executable = true;
    destination = "/bin/${name}";
    meta.mainProgram = name;
  };
  runCommand = name: env: script: run name env ''export out; ${script}'';
  runCommandLocal = runCommand;
  # What paths need (store-paths), and what a nix that is given them wants to know of it (registration, for --load-db).
  closureInfo = { rootPaths }: run "closure-info" {
    __structuredAttrs = true;
    exportReferencesGraph.closure = rootPaths;
  } ''
    . "$NIX_BUILD_TOP/.attrs.sh"
    python3 ${./closure-info.py} "$NIX_BUILD_TOP/.attrs.json" "''${outputs[out]}"
  '';
  # Of files with one name that of the first package stays.
  symlinkJoin = { name, paths, postBuild ? "", ... }: run name { paths = map toString (lib.reverseList paths); } ''
    mkdir -p $out; for p in $paths; do cp -rs --no-preserve=mode --remove-destination "$p/." $out/; done
    rm -f $out/nix-support/standin-layer # that is said of a package itself
    ${postBuild}
  '';
  linkFarm = name: entries: run name { } ("mkdir -p $out; cd $out\n" + lib.concatMapStrings (e: ''
    mkdir -p "$(dirname ${lib.escapeShellArg e.name})"; ln -s ${e.path} ${lib.escapeShellArg e.name}
  '') (if lib.isList entries then entries else lib.mapAttrsToList (name: path: { inherit name path; }) entries));
}
