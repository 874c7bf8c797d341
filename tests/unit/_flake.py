"""Real nix on tiny flakes: what the tests of pytest_nixvm.flake share.

`SYSTEM` stands for nixpkgs' nixosSystem as far as the flake side looks at it: modules, priorities,
`options`, `config`, `extendModules`, `virtualisation.vmVariant`, and trivial derivations.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pytest_nixvm.flake import Flake, FlakeReference, Nix
from pytest_nixvm.image_machine import start_script

needs_nix = pytest.mark.nix

# No sandbox: the builders below use the machine's own shell. No network is asked.
OPTIONS = (("sandbox", "false"), ("substitute", "false"))

SYSTEM = r"""
{ modules, system ? "x86_64-linux", direct ? false, ... }@args:
let
  inherit (builtins) attrNames foldl' isAttrs isFunction mapAttrs;
  weight = v: if isAttrs v && v._type or "" == "override" then v.priority else 100;
  content = v: if isAttrs v && v._type or "" == "override" then v.content else v;
  plain = v: isAttrs v && !(v ? _type) && v.type or "" != "derivation";
  merge = a: b:
    if plain a && plain b then a // mapAttrs (n: v: if a ? ${n} then merge a.${n} v else v) b
    else if weight b <= weight a then b else a;
  strip = v: if plain v then mapAttrs (_: strip) v else content v;
  force = content: { _type = "override"; priority = 50; inherit content; };
  build = name: command: derivation {
    inherit name system;
    builder = "/bin/sh";
    args = [ "-ec" "PATH=/run/current-system/sw/bin:/usr/bin:/bin\n${command}" ];
  };
  evaluate = inVm: modules:
    let
      cfg = config.virtualisation;
      share = source: target: { inherit source target; };
      defaults = { networking.hostName = "nixos"; test.build = ""; test.vm = true;
                   services.qemuGuest.enable = inVm;
                   virtualisation = if !inVm then { } else {
                     useNixStoreImage = false;
                     useHostCerts = false;
                     useBootLoader = false;
                     mountHostNixStore = !cfg.useNixStoreImage && !cfg.useBootLoader;
                     writableStore = cfg.mountHostNixStore;
                     sharedDirectories = { xchg = share "xchg" "/tmp/xchg"; } // (
                       if cfg.mountHostNixStore
                       then { nix-store = share "/nix/store" "/nix/.ro-store"; } else { });
                   }; };
      call = m: if isFunction m then m { inherit config force; } else m;
      merged = foldl' merge defaults (map call modules);
      variant = modules ++ [ { virtualisation = { }; } (merged.virtualisation.vmVariant or { }) ];
      config = strip (removeAttrs merged [ "virtualisation" ]) // {
        virtualisation = (if inVm then strip merged.virtualisation else { }) // {
          vmVariant = evaluate true variant;
        };
        system = strip (merged.system or { }) // {
          build = { inherit toplevel; } // (
            if !config.test.vm then { }
            else if inVm then { inherit vm; }
            else { inherit (config.virtualisation.vmVariant.system.build) vm; });
        };
      };
      toplevel = build "nixos-system-${config.networking.hostName}" ''
        ${config.test.build}
        mkdir $out
        echo agent ${if config.services.qemuGuest.enable then "on" else "off"} > $out/what'';
      vm = build "nixos-vm" ''
        mkdir -p $out/bin; ln -s ${toplevel} $out/system
        echo exec qemu ${toString (attrNames cfg.sharedDirectories)} \
          ${if cfg.useNixStoreImage then "store.img" else ""} \
          ${if cfg.writableStore then "rw-store" else ""} \
          > $out/bin/run-${config.networking.hostName}-vm'';
    in config;
in {
  config = evaluate direct modules;
  options.virtualisation = if direct then { useNixStoreImage = { }; } else { vmVariant = { }; };
  pkgs.stdenv.hostPlatform.system = system;
  extendModules = { modules }: import ./system.nix (args // { modules = args.modules ++ modules; });
}
"""

FLAKE = """{{ outputs = {{ self }}: let nixosSystem = import ./system.nix; in {{ {body} }}; }}"""

MACHINE = """
nixosConfigurations."{name}" = nixosSystem {{
  modules = [ {{ networking.hostName = "{host}"; }} {more} ];
}};
"""


def git(directory: Path, *arguments: str) -> str:
    """Run git as somebody with a name."""
    identity = {"NAME": "A", "EMAIL": "a@example.org"}
    env = {f"GIT_{who}_{k}": v for who in ("AUTHOR", "COMMITTER") for k, v in identity.items()}
    done = subprocess.run(
        ["git", "-C", directory, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    return done.stdout.strip()


def write_flake(directory: Path, body: str, *, tracked: bool = True) -> Path:
    """Write a flake with `body` as its outputs, in a git repository if `tracked`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "flake.nix").write_text(FLAKE.format(body=body))
    (directory / "system.nix").write_text(SYSTEM)
    if tracked:
        git(directory, "init", "-q", "-b", "main")
        git(directory, "add", ".")
        git(directory, "commit", "-q", "-m", "first")
    return directory


def machine(name: str, host: str, more: str = "") -> str:
    return MACHINE.format(name=name, host=host, more=more)


@dataclass
class Seen:
    """A Progress that keeps what it was told."""

    titles: list[str] = field(default_factory=list)
    details: list[tuple[str, int | None, int | None]] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def step(self, title: str) -> Seen:
        self.titles.append(title)
        return self

    def update(self, detail: str, done: int | None = None, total: int | None = None) -> None:
        self.details.append((detail, done, total))

    def finish(self, detail: str = "") -> None:
        self.ends.append("finished")

    def fail(self, detail: str = "") -> None:
        self.ends.append("failed")


@dataclass
class Workshop:
    """Makes Flake objects as separate sessions would: nothing shared but the cache."""

    tmp: Path
    options: tuple[tuple[str, str], ...] = OPTIONS
    # Not in any store yet, so what depends on it is really built.
    host: str = field(default_factory=lambda: f"host{uuid.uuid4().hex[:8]}")

    @property
    def cache(self) -> Path:
        return self.tmp / "cache"

    @property
    def logs(self) -> Path:
        return self.tmp / "logs"

    def flake(self, text: str | Path, **more: object) -> Flake:
        options: dict[str, object] = {
            "cache": self.cache,
            "logs": self.logs,
            "image_script": start_script,
            **more,
        }
        if "nix" not in options:
            options["nix"] = Nix.find(options=self.options)
        reference = options.pop("reference", None) or FlakeReference.parse(str(text), self.tmp)
        return Flake(reference, **options)  # type: ignore[arg-type]


def evaluations(seen: Seen) -> int:
    return sum(title.startswith("Evaluating") for title in seen.titles)
