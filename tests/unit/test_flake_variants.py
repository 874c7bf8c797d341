"""What a machine's VM carries, and its boot loader: real nix, and the stand-in's module system."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from _flake import Seen, Workshop, evaluations, git, needs_nix

from pytest_nixvm.errors import EvaluationError, FlakeError, NotAVirtualMachineError
from pytest_nixvm.flake.build import Secret, VmBuild

pytestmark = needs_nix

LIB = Path(__file__).parents[1] / "standin/nixpkgs/lib"

# As nixpkgs has it, as far as a variant is concerned: qemu-vm.nix, build-vm.nix, and options that
# the plugin's own modules ask for.
SYSTEM = r"""
{ modules, direct ? false }:
let
  lib = import ./lib;
  inherit (lib) mkOption types;
  build = name: command: derivation {
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-ec" "PATH=/run/current-system/sw/bin:/usr/bin:/bin\n${command}" ];
  };
  flag = default: mkOption { type = types.bool; inherit default; };
  anything = default: mkOption { type = types.anything; inherit default; };
  text = default: mkOption { type = types.lines; inherit default; };
  system = { config, ... }: {
    _file = "nixpkgs/system.nix";
    options = {
      networking.hostName = mkOption { type = types.str; };
      networking.interfaces = anything { };
      networking.firewall.interfaces = anything { };
      boot.loader.systemd-boot.enable = flag false;
      services.udev.extraRules = text "";
      services.qemuGuest.enable = flag true;
      system.activationScripts = anything { };
      system.build = mkOption { type = types.lazyAttrsOf types.raw; default = { }; };
      users.users = mkOption {
        type = types.attrsOf (types.submodule {
          options = {
            shell = anything "/bin/sh";
            initialPassword = mkOption { type = types.str; default = ""; };
            extraGroups = mkOption { type = types.listOf types.str; default = [ ]; };
          };
        });
        default = { };
      };
      environment.systemPackages = mkOption { type = types.listOf types.raw; default = [ ]; };
    };
    config.environment.systemPackages = [ (build "ours-1.0" "touch $out") ];
    config.system.build.toplevel = build "nixos-system-${config.networking.hostName}" ''
      mkdir $out
      cat > $out/what <<'END'
      ${config.services.udev.extraRules}${builtins.toJSON config.system.activationScripts}
      END
    '';
  };
  qemuVm = { config, ... }: let cfg = config.virtualisation; in {
    _file = "nixpkgs/qemu-vm.nix";
    options.virtualisation = {
      useNixStoreImage = flag false;
      useBootLoader = flag false;
      useEFIBoot = flag false;
      memorySize = mkOption { type = types.int; default = 1024; };
      additionalPaths = mkOption { type = types.listOf types.path; default = [ ]; };
      sharedDirectories = anything { };
    };
    config.virtualisation.additionalPaths = [ config.system.build.toplevel ];
    config.system.build.vm = build "nixos-vm" ''
      mkdir -p $out/bin; ln -s ${config.system.build.toplevel} $out/system
      echo ${toString cfg.additionalPaths} > $out/paths
      echo exec qemu -m ${toString cfg.memorySize} \
        ${if cfg.useBootLoader then "disk" else "kernel"} \
        ${if cfg.useEFIBoot then "efi" else "bios"} \
        > $out/bin/run-${config.networking.hostName}-vm'';
  };
  buildVm = { config, extendModules, ... }:
    let
      variant = extendModules { modules = [ qemuVm ]; };
      loader = variant.extendModules {
        modules = [ { virtualisation.useBootLoader = true; } ];
      };
    in {
      _file = "nixpkgs/build-vm.nix";
      options.virtualisation = {
        vmVariant = mkOption { inherit (variant) type; default = { }; };
        vmVariantWithBootLoader = mkOption { inherit (loader) type; default = { }; };
      };
      config.system.build = {
        vm = lib.mkDefault config.virtualisation.vmVariant.system.build.vm;
        vmWithBootLoader =
          lib.mkDefault config.virtualisation.vmVariantWithBootLoader.system.build.vm;
      };
    };
in lib.evalModules {
  modules = [ system buildVm ] ++ (if direct then [ qemuVm ] else [ ]) ++ modules;
}
"""


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def write_machine(
    shop: Workshop,
    settings: str = "",
    *,
    direct: bool = False,
    name: str = "config",
    more: str = "",
) -> Path:
    """Write a flake with one machine, `vm`: `settings` are in ./machine.nix."""
    flake = shop.tmp / name
    shutil.copytree(LIB, flake / "lib")
    (flake / "system.nix").write_text(SYSTEM)
    (flake / "machine.nix").write_text(
        f'{{ lib, ... }}: {{ networking.hostName = lib.mkDefault "{shop.host}"; {settings} }}'
    )
    (flake / "flake.nix").write_text(
        "{ outputs = { self }: { nixosConfigurations.vm = import ./system.nix { modules = "
        f"[ ./machine.nix ]; direct = {str(direct).lower()}; }}; {more} }}; }}"
    )
    git(flake, "init", "-q", "-b", "main")
    git(flake, "add", ".")
    git(flake, "commit", "-q", "-m", "first")
    return flake


def attribute(flake: Path, name: str) -> str:
    """What its owner gets for an attribute of the machine, without us."""
    nix = ("nix", "--extra-experimental-features", "nix-command flakes", "eval", "--raw")
    what = f"{flake}#nixosConfigurations.vm.config.{name}.outPath"
    return subprocess.run([*nix, what], check=True, capture_output=True, text=True).stdout


def roots(shop: Workshop) -> set[Path]:
    return {root.readlink() for root in (shop.cache / "roots").iterdir()}


both_shapes = pytest.mark.parametrize("direct", [False, True], ids=["vmVariant", "top level"])


# --- what it carries ------------------------------------------------------------------------------


@both_shapes
def test_a_machine_carries_another_generation_and_is_the_same_system(
    shop: Workshop, direct: bool
) -> None:
    base = shop.flake(write_machine(shop, direct=direct))
    changed = 'services.udev.extraRules = "changed";'
    candidate = shop.flake(write_machine(shop, changed, direct=direct, name="candidate"))
    toplevel = candidate.toplevel("vm")
    assert "changed" in (toplevel / "what").read_text()
    alone = base.build("vm")
    carrying = base.build("vm", carries=[toplevel])
    assert carrying.toplevel == alone.toplevel == base.toplevel("vm")
    assert carrying.output != alone.output
    assert carrying.carries == (toplevel,)
    assert carrying.overrides == alone.overrides == ()
    paths = {str(toplevel), str(alone.toplevel)}
    assert set((carrying.output / "paths").read_text().split()) == paths
    references = subprocess.run(
        ["nix-store", "--query", "--requisites", carrying.output],
        check=True,
        capture_output=True,
        text=True,
    )
    assert str(toplevel) in references.stdout.split()


def test_the_order_of_what_is_carried_makes_no_other_machine(shop: Workshop) -> None:
    flake = shop.flake(write_machine(shop))
    first = flake.toplevel("vm")
    second = flake.toplevel("vm", secrets=[Secret("token", "/run/token")])
    seen = Seen()
    again = shop.flake(shop.tmp / "config", progress=seen)
    build = flake.build("vm", carries=[first, second])
    assert again.build("vm", carries=[second, first, second]).output == build.output
    assert evaluations(seen) == 0


def test_what_is_carried_has_to_be_there(shop: Workshop) -> None:
    flake = shop.flake(write_machine(shop))
    missing = Path("/nix/store/00000000000000000000000000000000-nixos-system-gone")
    with pytest.raises(EvaluationError, match="nixos-system-gone"):
        flake.build("vm", carries=[missing])


def test_a_toplevel_is_built_without_a_vm_and_rooted(shop: Workshop) -> None:
    config = write_machine(shop)
    flake = shop.flake(config)
    toplevel = flake.toplevel("vm")
    assert (toplevel / "what").exists()
    assert roots(shop) == {toplevel}
    assert not Path(attribute(config, "system.build.vm")).exists()
    assert flake.build("vm").toplevel == toplevel
    again = shop.flake(config)
    again.nix.__dict__["evaluate"] = again.nix.__dict__["realise"] = None  # any call would fail
    assert again.toplevel("vm") == toplevel


def test_a_toplevel_that_was_collected_is_built_again(shop: Workshop) -> None:
    config = write_machine(shop)
    toplevel = shop.flake(config).toplevel("vm")
    for root in (shop.cache / "roots").iterdir():
        root.unlink()
    subprocess.run(["nix-store", "--delete", toplevel], check=True, capture_output=True)
    assert shop.flake(config).toplevel("vm") == toplevel
    assert (toplevel / "what").exists()


def test_builds_that_carry_something_stand_beside_each_other_but_not_for_ever(
    shop: Workshop,
) -> None:
    flake = shop.flake(write_machine(shop))
    usual = flake.build("vm")
    made = []
    for number in range(10):
        carried = flake.toplevel("vm", secrets=[Secret(f"s{number}", f"/run/s{number}")])
        made.append(flake.build("vm", carries=[carried]).output)
    kept = [output for output in made if output in roots(shop)]
    assert kept == made[2:]
    assert usual.output in roots(shop)


def test_a_bare_derivation_carries_nothing_and_has_the_system_it_links_to(shop: Workshop) -> None:
    more = (
        "packages.x86_64-linux.my-vm = self.nixosConfigurations.vm.config.system.build.vm;"
        "packages.x86_64-linux.empty = self.nixosConfigurations.vm.config.system.build.toplevel;"
    )
    config = write_machine(shop, more=more)
    flake = shop.flake(f"{config}#my-vm")
    vm = flake.build("my-vm", boot_loader=True, carries=[shop.flake(config).toplevel("vm")])
    assert (vm.carries, vm.boot_loader, vm.overrides) == ((), False, ())
    assert flake.toplevel("my-vm") == vm.toplevel
    assert flake.declared("my-vm").users == ()
    with pytest.raises(NotAVirtualMachineError, match="is no NixOS configuration"):
        flake.real_toplevel("my-vm")
    with pytest.raises(FlakeError):
        shop.flake(f"{config}#empty").toplevel("empty")


# --- the boot loader ------------------------------------------------------------------------------


def script(vm: VmBuild) -> list[str]:
    return vm.start_script.read_text().split()


def test_with_a_boot_loader_it_is_what_its_owner_would_build(shop: Workshop) -> None:
    config = write_machine(shop)
    flake = shop.flake(config)
    vm = flake.build("vm", boot_loader=True)
    assert vm.boot_loader
    assert vm.overrides == ()
    assert str(vm.output) == attribute(config, "system.build.vmWithBootLoader")
    assert script(vm) == ["exec", "qemu", "-m", "1024", "disk", "bios"]
    usual = flake.build("vm")
    assert not usual.boot_loader
    assert str(usual.output) == attribute(config, "system.build.vm")
    assert flake.toplevel("vm", boot_loader=True) == vm.toplevel


def test_what_is_said_of_the_vm_holds_with_a_boot_loader_too(shop: Workshop) -> None:
    settings = "virtualisation.vmVariant.virtualisation.memorySize = 512;"
    vm = shop.flake(write_machine(shop, settings)).build("vm", boot_loader=True)
    assert "512" in vm.start_script.read_text()
    (override,) = vm.overrides
    assert override.option == "virtualisation.vmVariantWithBootLoader"
    assert override.value == "what virtualisation.vmVariant is"


def test_what_is_said_of_the_vm_with_a_boot_loader_is_all_that_holds_there(shop: Workshop) -> None:
    settings = """
      virtualisation.vmVariant.virtualisation.memorySize = 512;
      virtualisation.vmVariantWithBootLoader.virtualisation.memorySize = 2048;
    """
    config = write_machine(shop, settings)
    vm = shop.flake(config).build("vm", boot_loader=True)
    assert vm.overrides == ()
    assert str(vm.output) == attribute(config, "system.build.vmWithBootLoader")


@pytest.mark.parametrize("efi", [False, True])
def test_a_machine_that_is_a_vm_gets_a_boot_loader(shop: Workshop, efi: bool) -> None:
    settings = "boot.loader.systemd-boot.enable = true;" if efi else ""
    flake = shop.flake(write_machine(shop, settings, direct=True))
    vm = flake.build("vm", boot_loader=True)
    assert vm.boot_loader
    assert script(vm)[-2:] == ["disk", "efi" if efi else "bios"]
    assert [o.option for o in vm.overrides] == ["virtualisation.useBootLoader"]


@both_shapes
def test_a_vm_with_a_boot_loader_anyway_says_so(shop: Workshop, direct: bool) -> None:
    settings = "virtualisation.useBootLoader = true;"
    if not direct:
        settings = f"virtualisation.vmVariant = {{ {settings} }};"
    vm = shop.flake(write_machine(shop, settings, direct=direct)).build("vm")
    assert vm.boot_loader
    assert vm.overrides == ()


def test_overrides_apply_with_a_boot_loader(shop: Workshop) -> None:
    settings = "services.qemuGuest.enable = lib.mkForce false;"
    vm = shop.flake(write_machine(shop, settings)).build("vm", boot_loader=True)
    assert [o.option for o in vm.overrides] == ["services.qemuGuest.enable"]


# --- names and secrets ----------------------------------------------------------------------------


@both_shapes
@pytest.mark.parametrize("boot_loader", [False, True])
def test_the_interface_is_called_as_the_configuration_has_it(
    shop: Workshop, direct: bool, boot_loader: bool
) -> None:
    settings = """
      services.udev.extraRules = "theirs";
      networking.interfaces.enp3s0.ipv4.addresses = [
        { address = "10.1.2.3"; prefixLength = 24; }
      ];
    """
    vm = shop.flake(write_machine(shop, settings, direct=direct)).build(
        "vm", boot_loader=boot_loader
    )
    assert vm.toplevel is not None
    what = (vm.toplevel / "what").read_text()
    assert "theirs" in what
    assert 'NAME="enp3s0"' in what
    assert "net=10.1.2.0/24" in vm.network_options
    (override,) = (o for o in vm.overrides if o.option == "services.udev.extraRules")
    assert "enp3s0" in override.value
    assert "\n" not in override.value


def test_secrets_of_the_hook_are_installed_and_told(shop: Workshop) -> None:
    wanted = Secret("a ${token}", "/run/keys/it's", owner="alice", mode="0440")
    vm = shop.flake(write_machine(shop)).build("vm", secrets=[wanted])
    assert vm.secrets == (wanted,)
    assert vm.toplevel is not None
    assert "/run/keys/it" in (vm.toplevel / "what").read_text()
    assert any("pytest_nixvm_secrets" in o.reason for o in vm.overrides)


# --- the configuration ----------------------------------------------------------------------------


def test_the_real_machine_has_none_of_ours_and_is_not_built(shop: Workshop) -> None:
    settings = 'virtualisation.vmVariant.networking.hostName = "in-vm";'
    config = write_machine(shop, settings)
    flake = shop.flake(config)
    real = flake.real_toplevel("vm")
    assert real == attribute(config, "system.build.toplevel")
    assert not Path(real).exists()
    assert flake.toplevel("vm").name.endswith("-in-vm")


def test_what_was_built_is_not_current_any_more_when_the_flake_was_edited(shop: Workshop) -> None:
    config = write_machine(shop)
    flake = shop.flake(config)
    assert flake.is_current("vm")
    flake.build("vm", freezable=True)
    flake.toplevel("vm")
    assert flake.used == ["vm"]
    assert flake.is_current("vm")
    settings = config / "machine.nix"
    before = settings.read_text()
    settings.write_text(before + "# a comment\n")
    time.sleep(1.1)  # a digest may be a second old
    assert flake.is_current("vm")
    settings.write_text(before.replace(shop.host, "another"))
    time.sleep(1.1)
    assert not flake.is_current("vm")


def test_what_is_declared_is_the_vms(shop: Workshop) -> None:
    settings = 'virtualisation.vmVariant.networking.hostName = "in-vm";'
    assert shop.flake(write_machine(shop, settings)).declared("vm").host_name == "in-vm"


def test_the_flakes_own_options_are_told_one_by_one(shop: Workshop) -> None:
    settings = """
      users.users = lib.mkMerge [
        { alice.extraGroups = [ "wheel" ] ++ lib.optional true "audio"; }
        (lib.mkIf true { alice.shell = lib.mkForce "/bin/zsh"; alice.initialPassword = "hunter2"; })
        (lib.mkIf false { bob.shell = "/bin/no"; })
      ];
      environment.systemPackages = [
        (derivation { name = "theirs-2.0"; builder = "x"; system = "x"; })
      ];
      networking.firewall.interfaces = { "enp3s0.7" = x: x; };
      networking.interfaces = throw "this one is left out";
      virtualisation.vmVariant = { config, ... }: { };
    """
    options = shop.flake(write_machine(shop, settings)).options("vm")
    password = options.pop("users.users.alice.initialPassword")
    assert password.startswith("(not shown")
    assert "hunter2" not in password
    assert options == {
        "environment.systemPackages": "[ theirs-2.0 ]",
        'networking.firewall.interfaces."enp3s0.7"': "…",
        "networking.hostName": f'"{shop.host}"',
        "users.users.alice.extraGroups": '[ "wheel" "audio" ]',
        "users.users.alice.shell": '"/bin/zsh"',
        "virtualisation.vmVariant": "…",
    }


def test_long_texts_and_store_paths_differ_only_where_they_do(shop: Workshop) -> None:
    long = "x" * 5000
    settings = f"""
      services.udev.extraRules = lib.mkMerge [ "{long}" "tool=${{./machine.nix}}" ];
    """
    rules = shop.flake(write_machine(shop, settings)).options("vm")["services.udev.extraRules"]
    assert "(5000 characters, digest " in rules
    assert rules.endswith(', "tool=/nix/store/…-machine.nix"')
