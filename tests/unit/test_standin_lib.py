"""The stand-in for nixpkgs says what nixpkgs says: values, priorities, errors. Evaluation only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NIXPKGS = Path(__file__).parent.parent / "standin" / "nixpkgs"
TIMEOUT = 60  # seconds for one evaluation; it takes a tenth of one

pytestmark = pytest.mark.nix


class EvaluationFailed(Exception):
    pass


Evaluate = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in as `prepare` lays it out, with a lock of packages that nobody can fetch."""
    target = tmp_path_factory.mktemp("standin") / "nixpkgs"
    shutil.copytree(NIXPKGS, target)
    nowhere = {"url": "http://nowhere.invalid/package.deb", "sha256": "0" * 64}
    debs = dict.fromkeys(("linux", "busybox-static"), nowhere)
    lock = {"debs": debs, "kernel": "linux", "base": [], "packages": {}}
    (target / "lock.json").write_text(json.dumps(lock))
    return target


@pytest.fixture(scope="session")
def evaluate(standin: Path) -> Evaluate:
    """evaluate(modules, expression): the expression may use c (nixosSystem's result) and lib."""

    def run(modules: str, expression: str) -> Any:
        text = f"""
          let
            nixpkgs = (import {standin}/flake.nix).outputs {{ self = {{ }}; }};
            inherit (nixpkgs) lib;
            c = lib.nixosSystem {{
              modules = [ {{ nixpkgs.hostPlatform = "x86_64-linux"; }} {modules} ];
            }};
          in {expression}
        """
        done = subprocess.run(
            ["nix-instantiate", "--eval", "--strict", "--json", "--expr", text],
            env={**os.environ, "NIX_CONFIG": "build-users-group ="},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        if done.returncode:
            raise EvaluationFailed(done.stderr)
        return json.loads(done.stdout)

    return run


def option(type_: str) -> str:
    return (
        f"({{ lib, ... }}: {{ options.x = lib.mkOption {{ type = with lib.types; {type_}; }}; }})"
    )


@pytest.mark.parametrize(
    ("definitions", "value"),
    [
        ("{ x = 1; }", 1),
        ("({ lib, ... }: { x = lib.mkDefault 1; }) { x = 2; }", 2),
        ("({ lib, ... }: { x = lib.mkForce 1; }) { x = 2; }", 1),
        ("({ lib, ... }: { x = lib.mkForce 1; }) ({ lib, ... }: { x = lib.mkVMOverride 3; })", 3),
        ("({ lib, ... }: { x = lib.mkMerge [ (lib.mkIf false 1) (lib.mkIf true 2) ]; })", 2),
        ("({ lib, config, ... }: lib.mkIf (config.networking.hostName == 'nixos') { x = 7; })", 7),
    ],
)
def test_priorities_and_conditions(evaluate: Evaluate, definitions: str, value: int) -> None:
    assert evaluate(option("int") + definitions.replace("'", '"'), "c.config.x") == value


def test_lists_keep_the_order_of_before_and_after(evaluate: Evaluate) -> None:
    modules = """
      ({ lib, ... }: { x = lib.mkAfter [ 3 ]; })
      { x = [ 2 ]; }
      ({ lib, ... }: { x = lib.mkBefore [ 1 ]; })
    """
    assert evaluate(option("listOf int") + modules, "c.config.x") == [1, 2, 3]


def test_submodules_know_their_name_and_merge(evaluate: Evaluate) -> None:
    modules = """
      ({ lib, ... }: {
        options.vms = lib.mkOption {
          type = lib.types.attrsOf (lib.types.submodule ({ name, config, ... }: {
            options.title = lib.mkOption { type = lib.types.str; default = name; };
            options.size = lib.mkOption { type = lib.types.ints.positive; };
            options.double = lib.mkOption { type = lib.types.int; default = config.size * 2; };
          }));
        };
      })
      ({ lib, ... }: { vms.a.size = lib.mkDefault 1; })
      { vms.a.size = 4; vms.b = { size = 2; title = "second"; }; }
    """
    assert evaluate(modules, "c.config.vms") == {
        "a": {"title": "a", "size": 4, "double": 8},
        "b": {"title": "second", "size": 2, "double": 4},
    }


def test_free_form_settings_keep_their_declared_options(evaluate: Evaluate) -> None:
    modules = '{ services.openssh.settings = { MaxAuthTries = 3; PermitRootLogin = "no"; }; }'
    settings = evaluate(modules, "c.config.services.openssh.settings")
    assert (settings["MaxAuthTries"], settings["PermitRootLogin"], settings["X11Forwarding"]) == (
        3,
        "no",
        False,
    )


@pytest.mark.parametrize(
    ("type_", "definitions", "message"),
    [
        ("int", '{ x = "20G"; }', "A definition for option `x' is not of type `signed integer'."),
        ("ints.positive", "{ x = 0; }", "is not of type `positive integer, meaning >0'"),
        (
            "port",
            "{ x = 70000; }",
            "is not of type `16 bit unsigned integer; between 0 and 65535 (both inclusive)'",
        ),
        ("bool", '{ x = "yes"; }', "is not of type `boolean'"),
        ("path", '{ x = "relative"; }', "is not of type `absolute path'"),
        ("nullOr str", "{ x = 1; }", "is not of type `null or string'"),
        (
            "listOf str",
            "{ x = [ 1 ]; }",
            "option `x.[definition 1-entry 1]' is not of type `string'",
        ),
        ("attrsOf int", "{ x.y = true; }", "option `x.y' is not of type `signed integer'"),
        ('enum [ "a" "b" ]', '{ x = "c"; }', 'is not of type `one of "a", "b"\''),
        ("either int bool", '{ x = "c"; }', "is not of type `signed integer or boolean'"),
        (
            'strMatching "[0-9]+G"',
            '{ x = "20M"; }',
            "is not of type `string matching the pattern [0-9]+G'",
        ),
        ("int", "{ x = 1; } { x = 2; }", "The option `x' has conflicting definition values:"),
        (
            "int",
            "{ }",
            "The option `x' was accessed but has no value defined. Try setting the option.",
        ),
        ("submodule { }", "{ x.nothing = 1; }", "The option `x.nothing' does not exist."),
    ],
)
def test_a_wrong_definition_is_named(
    evaluate: Evaluate, type_: str, definitions: str, message: str
) -> None:
    with pytest.raises(EvaluationFailed) as raised:
        evaluate(option(type_) + definitions, "c.config.x")
    assert message in str(raised.value)


def test_an_error_tells_the_file_and_the_value(evaluate: Evaluate, tmp_path: Path) -> None:
    module = tmp_path / "host.nix"
    module.write_text('{ virtualisation.vmVariant.virtualisation.diskSize = "20G"; }')
    with pytest.raises(EvaluationFailed) as raised:
        evaluate(str(module), "c.config.virtualisation.vmVariant.virtualisation.diskSize")
    assert (
        '`virtualisation.vmVariant.virtualisation.diskSize\' is not of type `value "auto" (singular'
        " enum) or positive integer, meaning >0'" in str(raised.value)
    )
    assert f'- In `{module}\': "20G"' in str(raised.value)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ('{ networking.hostname = "x"; }', "The option `networking.hostname' does not exist."),
        (
            "{ virtualisation.memorySize = 1; }",
            "The option `virtualisation.memorySize' does not exist.",
        ),
        (
            '{ networking.hostName = "under score!"; }',
            "is not of type `string matching the pattern",
        ),
        ("{ options = { }; services = { }; }", "has an unsupported attribute `services'"),
        (
            "{ imports = [ ({ nobody, ... }: { system.name = nobody; }) ]; }",
            "asks for the argument `nobody'",
        ),
    ],
)
def test_configurations_that_nixpkgs_refuses(
    evaluate: Evaluate, modules: str, message: str
) -> None:
    with pytest.raises(EvaluationFailed) as raised:
        evaluate(modules, "c.config.networking.hostName + c.config.system.name")
    assert message in str(raised.value)


def test_a_failed_assertion_stops_the_toplevel_and_the_vm(evaluate: Evaluate) -> None:
    modules = '{ assertions = [ { assertion = false; message = "no cake"; } ]; }'
    for attribute in ("toplevel", "vm"):
        with pytest.raises(EvaluationFailed) as raised:
            evaluate(modules, f"c.config.system.build.{attribute}.drvPath")
        assert "Failed assertions:" in str(raised.value)
        assert "- no cake" in str(raised.value)


def test_a_user_without_group_or_kind_is_refused(evaluate: Evaluate) -> None:
    with pytest.raises(EvaluationFailed) as raised:
        evaluate("{ users.users.eve = { }; }", "c.config.system.build.vm.drvPath")
    assert "users.users.eve.isSystemUser and users.users.eve.isNormalUser must be set" in str(
        raised.value
    )
    assert "users.users.eve.group is unset" in str(raised.value)


def test_a_missing_package_is_explained(evaluate: Evaluate) -> None:
    with pytest.raises(EvaluationFailed) as raised:
        evaluate("", "c.pkgs.firefox.name")
    assert "has no package `firefox'" in str(raised.value)


def test_disabled_modules_are_not_loaded(evaluate: Evaluate, tmp_path: Path) -> None:
    module = tmp_path / "unwanted.nix"
    module.write_text('{ networking.hostName = "unwanted"; }')
    modules = f"{module} {{ disabledModules = [ {module} ]; }}"
    assert evaluate(modules, "c.config.networking.hostName") == "nixos"


VM = "{ virtualisation.memorySize = lib.mkForce 512; }"


@pytest.mark.parametrize(
    ("modules", "direct"),
    [
        ("{ virtualisation.vmVariant.virtualisation.cores = 3; }", False),
        ("""({ modulesPath, ... }: {
          imports = [ "${modulesPath}/virtualisation/qemu-vm.nix" ]; virtualisation.cores = 3;
        })""", True),
    ],
)  # fmt: skip
def test_the_vm_can_be_extended_either_way(evaluate: Evaluate, modules: str, direct: bool) -> None:
    """What the plugin does to a configuration, which keeps what it says itself."""
    extension = f"({{ lib, ... }}: {VM})"
    if not direct:
        extension = f"{{ virtualisation.vmVariant = {extension}; }}"
    expression = f"""
      let
        e = (c.extendModules {{ modules = [ {extension} ]; }}).config;
        v = if c.options.virtualisation ? useNixStoreImage then e else e.virtualisation.vmVariant;
      in [ v.virtualisation.memorySize v.virtualisation.cores ]
    """
    assert evaluate(modules, expression) == [512, 3]
    assert evaluate(modules, "c.options.virtualisation ? useNixStoreImage") is direct


NO_SHARES = """({ lib, ... }: {
  virtualisation.sharedDirectories = lib.mkForce { };
  virtualisation.useNixStoreImage = true;
  virtualisation.writableStore = true;
})"""


@pytest.mark.parametrize("direct", [False, True], ids=["vmVariant", "top level"])
def test_a_machine_without_shares_takes_its_store_from_an_image(
    evaluate: Evaluate, direct: bool
) -> None:
    modules = f"{{ virtualisation.vmVariant = {NO_SHARES}; }}"
    if direct:
        path = '"${modulesPath}/virtualisation/qemu-vm.nix"'
        modules = f"({{ modulesPath, ... }}: {{ imports = [ {path} {NO_SHARES} ]; }})"
    vm = "c.config.system.build.vm"
    assert str(evaluate(modules, f"{vm}.drvPath")).endswith("-nixos-vm.drv")
    before, _, command = evaluate(modules, f"{vm}.start").partition("# Start QEMU.")
    assert '"$TMPDIR/store.img"' in before
    assert 'file="$TMPDIR"/store.img' in command
    assert "-virtfs" not in command
    config = "c.config" if direct else "c.config.virtualisation.vmVariant"
    mounts = evaluate(modules, f"lib.mapAttrs (_: fs: fs.fsType) {config}.fileSystems")
    assert mounts["/nix/.ro-store"] == "erofs"
    assert mounts["/nix/store"] == "overlay"
    assert "9p" not in mounts.values()


def test_the_kernel_is_unpacked_unless_a_machine_wants_it_packed(evaluate: Evaluate) -> None:
    kernel = "c.config.system.build.toplevel.kernelFile"
    root = '{ fileSystems."/".device = "/dev/vda"; }'
    assert evaluate(root, kernel) == "image"
    assert evaluate(f"{root} {{ standin.unpackedKernel = false; }}", kernel) == "bzImage"


def test_functions_of_lib(evaluate: Evaluate) -> None:
    cases = {
        'lib.splitString "." "a.b.c"': ["a", "b", "c"],
        'lib.toInt "08"': 8,
        'lib.hasInfix "b" "abc"': True,
        'lib.removeSuffix ".nix" "a.nix"': "a",
        'lib.escapeShellArg "it\'s"': "'it'\\''s'",
        "lib.recursiveUpdate { a.b = 1; a.c = 2; } { a.b = 3; }": {"a": {"b": 3, "c": 2}},
        'lib.mapAttrs\' (n: v: lib.nameValuePair (n + v) n) { a = "x"; }': {"ax": "a"},
        "lib.unique [ 1 2 1 ]": [1, 2],
        "lib.range 2 4": [2, 3, 4],
        "lib.pipe 1 [ (x: x + 1) toString ]": "2",
        "lib.flatten [ 1 [ 2 [ 3 ] ] ]": [1, 2, 3],
        "lib.partition (x: x > 1) [ 1 2 ]": {"right": [2], "wrong": [1]},
        'lib.attrByPath [ "a" "b" ] 0 { a.b = 4; }': 4,
        "lib.foldlAttrs (acc: n: v: acc + v) 0 { a = 1; b = 2; }": 3,
        'lib.trim "  a b\\n"': "a b",
        'lib.versionAtLeast "25.11" "25.05"': True,
    }
    assert evaluate("", f"[ {' '.join(f'({text})' for text in cases)} ]") == list(cases.values())


def test_what_an_installed_computer_says_of_itself_is_accepted(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    module = tmp_path / "hardware-configuration.nix"
    module.write_text(
        """{ config, lib, pkgs, modulesPath, ... }: {
          imports = [ (modulesPath + "/installer/scan/not-detected.nix") ];
          boot.initrd.availableKernelModules = [ "xhci_pci" "nvme" ];
          boot.initrd.luks.devices.root.device = "/dev/disk/by-uuid/0a";
          boot.kernelPackages = pkgs.linuxPackages_latest;
          boot.loader.systemd-boot.enable = true;
          fileSystems."/" = { device = "/dev/disk/by-uuid/0b"; fsType = "ext4"; };
          swapDevices = [ { device = "/dev/disk/by-uuid/0c"; } ];
          hardware.cpu.intel.updateMicrocode =
            lib.mkDefault config.hardware.enableRedistributableFirmware;
          hardware.graphics.enable = true;
          networking.networkmanager = { enable = true; wifi.powersave = true; };
          networking.firewall.extraInputRules = "tcp dport 9 accept";
          services.pipewire = { enable = true; pulse.enable = true; };
          services.tlp.enable = true;
          systemd.tmpfiles.settings.mine."/srv/x".d.mode = "0750";
          virtualisation.virtualbox.guest.enable = true;
          nix.settings.experimental-features = [ "nix-command" "flakes" ];
        }"""
    )
    assert evaluate(
        str(module),
        """[
          c.config.hardware.cpu.intel.updateMicrocode
          c.config.virtualisation.virtualbox.guest.enable
          c.config.virtualisation.vmware.guest.enable
          c.config.environment.etc."tmpfiles.d/mine.conf".text
          c.config.standin.hasNix
        ]""",
    ) == [False, True, False, "d /srv/x 0750 - - - \n", False]


def test_a_home_has_files_of_each_kind_and_what_nixos_knows(evaluate: Evaluate) -> None:
    modules = f"""{NIXPKGS.parent}/home-manager/nixos.nix {{
      users.users.alice = {{ isNormalUser = true; home = "/people/alice"; }};
      home-manager.extraSpecialArgs.word = "hi";
      home-manager.users.alice = {{ config, pkgs, word, osConfig, ... }}: {{
        home.stateVersion = "25.11";
        home.file.notes.text = "${{word}} in ${{config.home.homeDirectory}}";
        xdg.configFile."a/b".text = osConfig.networking.hostName;
        home.packages = [ pkgs.bash ];
        programs.starship.enable = true;
        programs.git = {{
          enable = true;
          settings.user.name = "Alice";
          extraConfig.pull.rebase = true;
        }};
      }};
    }}"""
    home = "c.config.home-manager.users.alice.home"
    assert evaluate(
        modules,
        f"""[
          {home}.file.notes.text
          {home}.file.".config/a/b".text
          {home}.file.".config/git/config".text
          (c.config.systemd.services ? home-manager-alice)
          (map (p: p.pname or p.name) c.config.users.users.alice.packages)
        ]""",
    ) == [
        "hi in /people/alice",
        "nixos",
        '[pull]\n\trebase = true\n[user]\n\tname = "Alice"\n',
        True,
        ["bash"],
    ]
    with pytest.raises(EvaluationFailed, match=r"home\.fil' does not exist"):
        evaluate(modules + "{ home-manager.users.alice.home.fil = 1; }", f"{home}.username")
