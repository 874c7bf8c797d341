"""Images by real nix, of machines of the stand-in's module system."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from _flake import OPTIONS, Seen, Workshop, evaluations, git, needs_nix

from pytest_nixvm.catalogue import Catalogue
from pytest_nixvm.cli import main
from pytest_nixvm.cli.run import hold_image
from pytest_nixvm.disks import KeptDisk
from pytest_nixvm.errors import (
    BuildError,
    FlakeError,
    MissingProgramError,
    NothingToTestError,
    UserError,
)
from pytest_nixvm.flake import image_builds
from pytest_nixvm.flake.build import VmBuild
from pytest_nixvm.flake.images import ImageMachine
from pytest_nixvm.settings import Settings

pytestmark = needs_nix

LIB = Path(os.environ.get("NIXVM_NIXPKGS_LIB") or Path(__file__).parents[1] / "standin/nixpkgs/lib")

# As nixpkgs has it in nixos/modules/image/images.nix: each image is of the configuration, extended.
SYSTEM = r"""
{ modules, images ? true }:
let
  lib = import ./lib;
  inherit (lib) mkOption types;
  build = name: command: derivation {
    inherit name;
    system = "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-ec" "PATH=/run/current-system/sw/bin:/usr/bin:/bin\n${command}" ];
  };
  anything = default: mkOption { type = types.anything; inherit default; };
  text = default: mkOption { type = types.lines; inherit default; };
  system = { config, ... }: {
    options = {
      networking.hostName = mkOption { type = types.str; };
      networking.interfaces = anything { };
      networking.firewall.interfaces = anything { };
      boot.kernelParams = mkOption { type = types.listOf types.str; default = [ ]; };
      services.udev.extraRules = text "";
      services.qemuGuest.enable = mkOption { type = types.bool; default = false; };
      system.activationScripts = anything { };
      system.build = mkOption { type = types.lazyAttrsOf types.raw; default = { }; };
      system.name = mkOption { type = types.str; default = config.networking.hostName; };
    };
    config.system.build.toplevel = build "nixos-system-${config.networking.hostName}" ''
      mkdir $out
      cat > $out/what <<'END'
      agent ${if config.services.qemuGuest.enable then "on" else "off"} \
      ${toString config.boot.kernelParams}
      ${config.services.udev.extraRules}${builtins.toJSON config.system.activationScripts}
      END
    '';
  };
  disk = name: command: { config, ... }: {
    options.image.filePath = mkOption { type = types.str; default = name; };
    config.system.build.image = build "image" ''
      mkdir $out; cp ${config.system.build.toplevel}/what what; ${command}
    '';
  };
  variants = {
    qemu = disk "nixos.qcow2" "qemu-img convert -O qcow2 what $out/nixos.qcow2";
    virtualbox = disk "nixos.ova" ''
      qemu-img convert -O vmdk -o subformat=streamOptimized what disk.vmdk
      tar -cf $out/nixos.ova disk.vmdk
    '';
    azure = disk "disk.vhd" "cp what $out/disk.vhd";
    strange = disk "nothing" "";
  };
  imaging = { config, extendModules, ... }: {
    options.image.modules = anything { };
    config.system.build.images = builtins.mapAttrs
      (_: module: let inherit (extendModules { modules = [ module ]; }) config; in
        config.system.build.image
        // { passthru = { inherit config; inherit (config.image) filePath; }; })
      (if config.system.build ? image then { } else variants // config.image.modules);
  };
in lib.evalModules { modules = [ system ] ++ (if images then [ imaging ] else [ ]) ++ modules; }
"""

READY = 'services.qemuGuest.enable = true; boot.kernelParams = [ "console=ttyS0" ];'


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    if shutil.which("qemu-img") is None or shutil.which("qemu-system-x86_64") is None:
        pytest.skip("QEMU is not installed")
    return Workshop(tmp_path)


def write_machine(shop: Workshop, settings: str = "", *, images: bool = True) -> Path:
    """Write a flake with one machine, `vm`, and a package beside it."""
    flake = shop.tmp / "config"
    shutil.copytree(LIB, flake / "lib")
    (flake / "system.nix").write_text(SYSTEM)
    (flake / "flake.nix").write_text(
        "{ outputs = { self }: { nixosConfigurations.vm = import ./system.nix { "
        f"images = {str(images).lower()}; modules = [ ({{ lib, ... }}: {{ networking.hostName = "
        f'"{shop.host}"; {settings} }}) ]; }};'
        "  packages.x86_64-linux.thing = derivation "
        '{ name = "thing"; system = "x86_64-linux"; builder = "/bin/sh"; }; }; }'
    )
    git(flake, "init", "-q", "-b", "main")
    git(flake, "add", ".")
    return flake


def own(flake: Path, variant: str) -> str:
    """What its owner gets for an image, without us."""
    nix = ("nix", "--extra-experimental-features", "nix-command flakes", "eval", "--raw")
    what = f"{flake}#nixosConfigurations.vm.config.system.build.images.{variant}.outPath"
    return subprocess.run([*nix, what], check=True, capture_output=True, text=True).stdout


def system_in(build: VmBuild) -> str:
    """Return what the system in an image is."""
    assert build.toplevel is not None
    return (build.toplevel / "what").read_text()


# --- images as they are -----------------------------------------------------------------------


def test_an_image_is_what_its_owner_builds(shop: Workshop) -> None:
    path = write_machine(shop)
    made = shop.flake(path).image("vm", "virtualBoxOVA")
    assert (made.name, made.format, made.overrides) == ("vm", "ova", ())
    assert str(made.output) == own(path, "virtualbox")
    assert made.file == made.output / "nixos.ova"
    assert made.output in {root.readlink() for root in (shop.cache / "roots").iterdir()}
    assert made.toplevel is not None
    assert "agent off" in (made.toplevel / "what").read_text()
    assert made.seconds > 0
    seen = Seen()
    again = shop.flake(path, progress=seen).image("vm", "ova")
    assert (again.file, again.seconds, evaluations(seen)) == (made.file, 0.0, 0)


def test_nixpkgs_other_formats_can_be_built_too(shop: Workshop) -> None:
    flake = shop.flake(write_machine(shop))
    assert flake.images("vm") == ["qcow2", "ova", "azure", "strange"]
    assert flake.image("vm", "azure").file.name == "disk.vhd"
    with pytest.raises(FlakeError, match="nothing is not there"):
        flake.image("vm", "strange")


def test_an_unknown_format_names_those_that_there_are(shop: Workshop) -> None:
    flake = shop.flake(write_machine(shop))
    with pytest.raises(FlakeError) as raised:
        flake.image("vm", "iso")
    assert "There is no image of nixosConfigurations.vm" in str(raised.value)
    assert "'iso'" in str(raised.value)
    assert str(raised.value).endswith("There are: qcow2, ova, azure, strange.")
    with pytest.raises(FlakeError, match="Did you mean azure"):
        flake.image("vm", "azurr")


def test_without_images_the_reason_is_told(shop: Workshop) -> None:
    path = write_machine(shop, images=False)
    with pytest.raises(FlakeError, match=r"older than 25\.05"):
        shop.flake(path).image("vm", "qcow2")
    with pytest.raises(FlakeError, match="is no NixOS configuration"):
        shop.flake(f"{path}#thing").image("thing", "qcow2")


def test_a_machine_that_is_an_image_itself_has_no_others(shop: Workshop) -> None:
    path = write_machine(shop, "system.build.image = null;")
    with pytest.raises(FlakeError, match="is an image itself"):
        shop.flake(path).images("vm")
    with pytest.raises(FlakeError) as raised:
        shop.flake(path).image("vm", "qcow2")
    assert "nixosConfigurations.vm" in str(raised.value)
    assert "is an image itself" in str(raised.value)
    assert "older" not in str(raised.value)


# --- machines that boot from one ------------------------------------------------------------------


def test_a_machine_boots_from_an_image_with_what_lets_the_tests_in(shop: Workshop) -> None:
    path = write_machine(shop)
    build = shop.flake(path).build("vm@qcow2")
    assert (build.name, build.image, build.boot_loader) == ("vm@qcow2", "qcow2", True)
    assert [o.option for o in build.overrides] == [
        "services.qemuGuest.enable",
        "boot.kernelParams",
    ]
    assert "agent on" in system_in(build)
    assert "console=ttyAMA0,115200n8 console=ttyS0,115200n8" in system_in(build)
    script = build.start_script.read_text()
    assert f"{build.output}/nixos.qcow2" in script
    assert build.start_script.name == f"run-{shop.host}-vm"
    assert str(build.output) != own(path, "qemu")
    seen = Seen()
    again = shop.flake(path, progress=seen).build("vm@qcow2")
    assert (again.start_script, again.built, seen.titles) == (build.start_script, 0.0, [])


def test_the_image_of_a_machine_that_is_ready_for_it_is_its_owner_s(shop: Workshop) -> None:
    path = write_machine(shop, READY)
    build = shop.flake(path).build("vm@qcow2")
    assert build.overrides == ()
    assert str(build.output) == own(path, "qemu")


def test_static_addresses_and_secrets_are_as_in_its_vm(shop: Workshop) -> None:
    static = (
        'networking.interfaces.enp3s0.ipv4.addresses = [ { address = "10.0.0.5"; '
        "prefixLength = 24; } ];"
    )
    build = shop.flake(write_machine(shop, static + READY)).build("vm@qcow2")
    assert [o.option for o in build.overrides] == ["services.udev.extraRules"]
    assert 'NAME="enp3s0"' in system_in(build)
    assert "10.0.0." in build.network_options


def test_one_that_is_to_be_frozen_has_no_disk_that_qemu_can_not_freeze(shop: Workshop) -> None:
    flake = shop.flake(write_machine(shop))
    booted, frozen = flake.build("vm@ova"), flake.build("vm@ova", freezable=True)
    assert booted.output == frozen.output
    assert "convert" not in booted.start_script.read_text()
    assert "convert -f vmdk -O qcow2" in frozen.start_script.read_text()
    plain, clone = flake.build("vm@qcow2"), flake.build("vm@qcow2", freezable=True)
    assert plain.start_script == clone.start_script


MEDIUM = """
image.modules.iso = {{
  options.image.filePath = lib.mkOption {{ default = "iso/nixos.{suffix}"; }};
  options.isoImage.makeBiosBootable = lib.mkOption {{ default = {bios}; }};
  config.system.build.image = derivation {{
    name = "image"; system = "{system}"; builder = "/bin/sh";
    args = [ "-ec" "PATH=/usr/bin:/bin; mkdir -p $out/iso; touch $out/iso/nixos.{suffix}" ];
  }};
}};
"""


def medium(
    suffix: str = "iso", *, bios: bool = True, system: str = "x86_64-linux", more: str = ""
) -> str:
    """An image like that of nixpkgs' iso-image.nix."""
    return more + MEDIUM.format(suffix=suffix, bios=str(bios).lower(), system=system)


@pytest.mark.parametrize("bios", [True, False])
def test_a_medium_that_no_bios_boots_is_booted_with_efi(shop: Workshop, bios: bool) -> None:
    machines: list[ImageMachine] = []

    def script(machine: ImageMachine) -> str:
        machines.append(machine)
        return "#!/bin/sh"

    path = write_machine(shop, medium(bios=bios))
    build = shop.flake(path, image_script=script).build("vm@iso")
    assert [machine.efi for machine in machines] == [not bios] * 2
    assert [machine.image for machine in machines] == [None, build.output / "iso/nixos.iso"]


def test_what_lacks_here_is_told_before_an_image_is_built(shop: Workshop) -> None:
    def script(machine: ImageMachine) -> str:
        raise MissingProgramError(f"{machine.name} boots with EFI")

    seen = Seen()
    flake = shop.flake(write_machine(shop, medium()), image_script=script, progress=seen)
    with pytest.raises(MissingProgramError, match="vm@iso boots"):
        flake.build("vm@iso")
    assert not any(title.startswith("Building") for title in seen.titles)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (medium("iso.zst"), r"is compressed \(nixos\.iso\.zst\).*isoImage\.compressImage"),
        (medium(system="aarch64-linux"), "only images for x86_64-linux are booted"),
    ],
)
def test_an_image_that_can_not_be_booted_is_not_built_for_that(
    shop: Workshop, settings: str, message: str
) -> None:
    path = write_machine(shop, settings)
    seen = Seen()
    with pytest.raises(FlakeError, match=message):
        shop.flake(path, progress=seen).build("vm@iso")
    assert not any(title.startswith("Building") for title in seen.titles)


def test_an_image_that_can_not_be_built_is_tried_once(shop: Workshop) -> None:
    tried = shop.tmp / "tried"
    settings = medium().replace("mkdir -p", f"echo x >>{tried}; exit 1; mkdir -p")
    catalogue = Catalogue(
        Settings.make(
            flake=str(write_machine(shop, settings)), cache=str(shop.cache), nix_option=OPTIONS
        ),
        output=shop.tmp / "output",
    )
    with pytest.raises(BuildError):
        catalogue.build("vm@iso", freezable=True)
    assert tried.read_text() == "x\n"


def test_a_reference_names_an_image(shop: Workshop) -> None:
    path = write_machine(shop)
    (info,) = shop.flake(f"{path}#vm@ova").machines()
    assert (info.name, info.attribute, info.image) == ("vm@ova", "nixosConfigurations.vm", "ova")
    assert shop.flake(f"{path}#nixosConfigurations.vm@qcow2").machines()[0].image == "qcow2"
    for text, message in {
        "wm@ova": "has no wm. Its machines are: vm",
        "vm@oav": "'oav' that could be booted. Did you mean ova",
        'nixosConfigurations."vm@ova"': 'has no nixosConfigurations."vm@ova"',
    }.items():
        with pytest.raises(FlakeError, match=message):
            shop.flake(f"{path}#{text}").machines()


@pytest.mark.parametrize(
    ("name", "message"),
    [("vm@qcow", "There are: qcow2, raw"), ("wm@qcow2", "no machine wm@qcow2.*It has: vm")],
)
def test_a_mistake_in_a_name_is_one_message(shop: Workshop, name: str, message: str) -> None:
    with pytest.raises(FlakeError, match=message):
        shop.flake(write_machine(shop)).build(name)


def test_a_bare_derivation_has_no_images(shop: Workshop) -> None:
    flake = shop.flake(f"{write_machine(shop)}#thing@qcow2")
    with pytest.raises(FlakeError, match="is no NixOS configuration"):
        flake.build("thing@qcow2")


def test_what_an_image_does_not_test_is_said_without_its_system_too(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As when it came from a binary cache, or nix has collected what nothing needs any more.
    monkeypatch.setattr(image_builds, "_existing", lambda path: None)
    settings = Settings.make(
        flake=str(write_machine(shop)), cache=str(shop.cache), nix_option=OPTIONS
    )
    catalogue = Catalogue(settings, output=shop.tmp / "output")
    assert catalogue.build("vm@qcow2", freezable=True).toplevel is None
    said = [str(each) for each in catalogue.fidelity("vm@qcow2")]
    assert any("the image's boot loader" in each for each in said)


def test_the_image_below_a_kept_disk_stays(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(shop.tmp / "state"))
    path = write_machine(shop)
    flake = shop.flake(path)
    first = flake.build("vm@qcow2")
    with KeptDisk("vm@qcow2", "here") as disk:
        hold_image(disk, first, flake.nix, fresh=False)
        assert disk.root.readlink() == first.output
        image = first.output / "nixos.qcow2"
        over = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, disk.path)
        subprocess.run(over, check=True)
        (path / "system.nix").write_text(SYSTEM.replace("agent", "the agent"))
        flake = shop.flake(path)
        second = flake.build("vm@qcow2")
        assert second.output != first.output
        hold_image(disk, second, flake.nix, fresh=False)
        assert disk.root.readlink() == first.output
        hold_image(disk, second, flake.nix, fresh=True)
        disk.remove()
        assert disk.root.readlink() == second.output


def test_a_change_is_not_tested_on_an_image(shop: Workshop) -> None:
    flake = shop.flake(write_machine(shop))
    with pytest.raises(NothingToTestError, match="tested on vm itself"):
        flake.toplevel("vm@qcow2", switching=True)
    assert issubclass(NothingToTestError, UserError)
    assert flake.real_toplevel("vm@qcow2") == flake.real_toplevel("vm")


# --- the command ----------------------------------------------------------------------------------


class Command:
    def __init__(self, shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
        self.shop, self.capsys = shop, capsys
        self.flake = write_machine(shop)

    def __call__(self, *words: str) -> tuple[int, str, str]:
        options = [word for option in OPTIONS for word in ("--nix-option", *option)]
        where = ["--flake", str(self.flake), "--cache", str(self.shop.cache)]
        status = main([*words, *where, *options])
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err


@pytest.fixture
def nixvm(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(shop, capsys)


def test_build_prints_the_image(nixvm: Command, tmp_path: Path) -> None:
    link = tmp_path / "result"
    status, out, err = nixvm("image", "build", "vm", "--out-link", str(link))
    assert status == 0, err
    assert Path(out.strip()).name == "nixos.qcow2"
    assert link.resolve() == Path(out.strip()).parent
    assert "differs" not in err
    status, out, _ = nixvm("image", "build", "vm@ova", "--json")
    (made,) = json.loads(out)
    assert (status, made["name"], made["kind"], made["overrides"]) == (0, "vm", "ova", [])
    assert nixvm("build", "vm", "--image", "ova")[1].strip() == made["path"]
    assert nixvm("image", "build", "vm@ova", "--format", "virtualbox")[1].strip() == made["path"]
    # A format need not be one that is booted.
    assert nixvm("image", "build", "vm@azure")[1].strip().endswith("/disk.vhd")


def test_formats_are_those_that_there_are(nixvm: Command) -> None:
    everywhere = nixvm("image", "formats")[1].split()
    assert {"qcow2", "raw", "iso", "ova", "vmdk", "qcow2-efi", "raw-efi"} <= set(everywhere)
    found = json.loads(nixvm("image", "formats", "vm", "--json")[1])
    assert [(each["format"], each["boots"]) for each in found] == [
        ("qcow2", True),
        ("ova", True),
        ("azure", False),
        ("strange", False),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vm", "--format", "iso"], "There are: qcow2, ova"),
        (["vm@ova", "--format", "qcow2"], "more than one format"),
        (["wm"], "has no machine 'wm'. Its machines: vm"),
        (["vm@floppy"], "There are: qcow2, ova, azure"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_one_message(nixvm: Command, words: list[str], message: str) -> None:
    status, out, err = nixvm("image", "build", *words)
    assert (status, out) == (2, "")
    (said,) = [line for line in err.splitlines() if not line.startswith(("nixvm: ✓", "nixvm: Ev"))]
    assert message in said


def test_a_name_with_a_format_and_another_format_are_a_mistake_for_build_too(
    nixvm: Command,
) -> None:
    status, out, err = nixvm("build", "vm@ova", "--image", "qcow2")
    assert (status, out) == (2, "")
    assert "more than one format" in err
    out = nixvm("build", "vm@ova", "--image", "virtualbox")[1]
    assert out == nixvm("build", "vm", "--image", "ova")[1]
