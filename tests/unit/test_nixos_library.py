"""The Nix library's functions: systems out of directories, people, images, a flake's outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _nixos_library import SYSTEMS, EvaluationFailed, evaluate

from pytest_nixvm.flake.images import FORMATS

pytestmark = pytest.mark.nix

Value = Callable[[str], Any]

SERVER = """
{ userConfig, lib, ... }: {
  system.stateVersion = "24.11";
  environment.etc.user.text = if userConfig == null then "nobody" else userConfig.username;
}
"""
LAPTOP = """
{ lib, greeting, ... }: {
  imports = [ ./hardware-configuration.nix ];
  networking.hostName = "toms-laptop";
  system.stateVersion = "25.11";
  environment.etc.greeting.text = greeting;
}
"""
HARDWARE = '{ lib, ... }: { nixpkgs.hostPlatform = lib.mkDefault "aarch64-linux"; }'
HOME = "{ userConfig, ... }: { home.file.hello.text = userConfig.username; }"


@pytest.fixture(scope="session", params=SYSTEMS)
def nix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Value:
    place = tmp_path_factory.mktemp("nixpkgs")
    return lambda expression: evaluate(request.param, place, expression)


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("machines")
    for path, text in {
        "server/configuration.nix": SERVER,
        "laptop/configuration.nix": LAPTOP,
        "laptop/hardware-configuration.nix": HARDWARE,
        "dev-vm/configuration.nix": SERVER,
        "home-vm/configuration.nix": SERVER,
        "home-vm/home.nix": HOME,
        "empty/readme": "",
    }.items():
        (place / path).parent.mkdir(exist_ok=True)
        (place / path).write_text(text)
    return place


@pytest.fixture
def make(nix: Value, machines: Path) -> Callable[..., Any]:
    """make(function, name, more, what): an attribute of the system that the function returns."""

    def value(function: str, name: str, more: str, what: str) -> Any:
        return nix(
            f"(library.{function} {{ inherit nixpkgs; name = {name!r}; directory = "
            f"{machines}/{name}; {more} }}).{what}".replace("'", '"')
        )

    return value


def said(call: Callable[..., Any], *arguments: str) -> str:
    with pytest.raises(EvaluationFailed) as caught:
        call(*arguments)
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("error: ")]
    return line


# --- systems ------------------------------------------------------------------------------------


def test_a_system_of_a_directory(make: Callable[..., Any]) -> None:
    assert make("mkSystem", "server", "", "config.networking.hostName") == "server"
    assert make("mkSystem", "server", "", "config.environment.etc.user.text") == "nobody"
    more = 'user = { username = "tom"; };'
    assert make("mkSystem", "server", more, "config.environment.etc.user.text") == "tom"
    assert make("mkSystem", "server", more, "config.users.users.tom.isNormalUser") is True
    assert make("mkSystem", "server", "", "options.vm or null") is None


def test_its_own_files_say_what_it_is(make: Callable[..., Any]) -> None:
    more = 'specialArgs.greeting = "hi"; system = "x86_64-linux";'
    assert make("mkSystem", "laptop", more, "config.networking.hostName") == "toms-laptop"
    assert make("mkSystem", "laptop", more, "pkgs.stdenv.hostPlatform.system") == "aarch64-linux"
    assert make("mkSystem", "laptop", more, "config.environment.etc.greeting.text") == "hi"


def test_a_vm_has_the_module_and_somebody_who_uses_it(make: Callable[..., Any]) -> None:
    assert make("mkVmSystem", "dev-vm", "", "config.vm.memorySize") == "2G"
    assert make("mkVmSystem", "dev-vm", "", "config.environment.etc.user.text") == "vm"
    found = make("mkVmSystem", "dev-vm", "", "config.users.users.vm")
    assert found["extraGroups"] == ["wheel"]
    # No password opens the account, least of all one that everybody knows.
    assert [found[name] for name in found if name.lower().endswith("password")] == [None] * len(
        [name for name in found if name.lower().endswith("password")]
    )


def test_a_vm_has_modules_and_settings_of_its_own(make: Callable[..., Any]) -> None:
    more = 'modules = [ { vm.memorySize = "4G"; } flake.nixosModules.vm ];'
    what = "config.virtualisation.vmVariant.virtualisation.memorySize"
    assert make("mkVmSystem", "dev-vm", more, what) == 4096
    more = "modules = [ { vm.enable = false; } ];"
    assert make("mkVmSystem", "dev-vm", more, what) == 1024


def test_home_manager_where_there_is_a_home(make: Callable[..., Any]) -> None:
    more = 'inherit home-manager; user = { username = "tom"; };'
    found = make("mkVmSystem", "home-vm", more, "config.home-manager.users.tom.home")
    assert found["file"]["hello"]["text"] == "tom"
    assert found["stateVersion"] == "24.11"
    assert make("mkVmSystem", "dev-vm", more, "options.home-manager or null") is None


def test_a_home_needs_home_manager_and_somebody(make: Callable[..., Any]) -> None:
    text = said(make, "mkVmSystem", "home-vm", "", "config.system.name")
    assert "Home Manager is missing" in text
    assert "inherit home-manager;" in text
    more = "inherit home-manager;"
    assert "give mkSystem a `user`" in said(make, "mkSystem", "home-vm", more, "config.system.name")


def test_machines_are_named_after_their_directories(nix: Value, machines: Path) -> None:
    def several(names: str, function: str = "mkVmSystem") -> str:
        return (
            f"builtins.mapAttrs (_: m: m.config.networking.hostName) (library.machines {{ names = "
            f"{names}; directory = {machines}; "
            f"make = given: library.{function} (given // {{ inherit nixpkgs; }}); }})"
        )

    assert nix(several('[ "server" "dev-vm" ]')) == {"server": "server", "dev-vm": "dev-vm"}
    assert nix(several("[ ]")) == {}
    assert "The machine empty has no" in said(nix, several('[ "empty" ]'))
    assert "git add it" in said(nix, several('[ "missing" ]'))
    assert "The machine server is named twice" in said(nix, several('[ "server" "server" ]'))
    assert '"my vm" can' in said(nix, several('[ "my vm" ]'))
    assert "`names` is a list" in said(nix, several("{ server = 1; }"))


# --- people -------------------------------------------------------------------------------------


def test_what_a_configuration_says_of_somebody_wins(make: Callable[..., Any]) -> None:
    more = """
      user = { username = "tom"; extraGroups = [ "wheel" ]; authorizedKeys = [ "ssh-x y" ];
               shell = pkgs: pkgs.bash; hashedPassword = "x"; description = "Tom"; };
      users = [ { username = "tom"; extraGroups = [ "wheel" ]; authorizedKeys = [ "ssh-x y" ]; }
                { username = "ann"; } ];
      modules = [ { users.users.tom = { extraGroups = [ "docker" ]; hashedPassword = "mine"; }; } ];
    """
    found = make("mkSystem", "server", more, "config.users.users")
    assert found["tom"]["extraGroups"] == ["docker"]
    assert found["tom"]["hashedPassword"] == "mine"
    assert found["tom"]["openssh"]["authorizedKeys"]["keys"] == ["ssh-x y"]
    assert found["ann"]["isNormalUser"] is True


def test_an_account_has_its_shell_and_its_password(make: Callable[..., Any]) -> None:
    """NixOS has defaults of its own for both, of mkDefault's strength."""
    more = 'users = [ { username = "tom"; shell = pkgs: pkgs.bash; hashedPassword = "x"; } ];'
    found = make("mkSystem", "server", more, "config.users.users.tom")
    assert (found["shell"], found["hashedPassword"]) == ("/run/current-system/sw/bin/bash", "x")
    more += """modules = [ ({ lib, ... }: { users.users.tom = {
      shell = "/bin/fish"; hashedPassword = lib.mkDefault "y"; }; }) ];"""
    found = make("mkSystem", "server", more, "config.users.users.tom")
    assert (found["shell"], found["hashedPassword"]) == ("/bin/fish", "y")


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ('{ name = "tom"; }', "at least `username`"),
        ('"tom"', "at least `username`"),
        ('{ username = "Tom"; }', "lower case"),
        ('{ username = "tom"; password = "x"; }', "has `password`; known are: username"),
    ],
)
def test_who_is_nobody(make: Callable[..., Any], user: str, why: str) -> None:
    text = said(make, "mkSystem", "server", f"users = [ {user} ];", "config.users.users.tom")
    assert why in text


# --- images -------------------------------------------------------------------------------------


def test_an_image_by_the_name_of_its_format(nix: Value) -> None:
    same = "(library.image vm {0}).drvPath == vm.config.system.build.images.{1}.drvPath"
    both = " && ".join(
        same.format(*names) for names in [('"ova"', "virtualbox"), ('"raw-efi"', "raw-efi")]
    )
    assert nix(f"let vm = machine {{ }}; in {both}") is True
    text = said(nix, 'library.image (machine { }) "vhd"')
    assert 'no image of machine in the format "vhd"; there are: iso, ova, qcow2, ' in text
    assert text.count("iso") == 1
    old = '{ config = { networking.hostName = "old"; system.build = { }; }; }'
    assert "older than 25.05" in said(nix, f'library.image {old} "iso"')
    own = "{ config.system.build = { image = null; images = { }; }; }"
    assert "this machine is an image itself" in said(nix, f'library.image {own} "iso"')


def test_a_size_is_a_number_and_its_unit(nix: Value) -> None:
    assert nix('map library.mebibytes [ "512M" "20G" "1T" ]') == [512, 20480, 1048576]
    for text in ('"20"', '"G"', '"-1G"', '"1.5G"', "20", '"20GiB"'):
        assert "is no size" in said(nix, f"library.mebibytes {text}")


# --- a flake's outputs --------------------------------------------------------------------------

HOSTS = """
  hosts = {
    dev-vm = machine { };
    arm-vm = machine { nixpkgs.hostPlatform = lib.mkForce "aarch64-linux"; };
    laptop = nixosSystem { modules = [ base ]; };
  };
"""


def test_images_are_packages_of_the_vms(nix: Value) -> None:
    found = nix(f"let {HOSTS} in builtins.mapAttrs (_: builtins.attrNames) (library.images hosts)")
    assert found == {
        "x86_64-linux": ["dev-vm-iso", "dev-vm-ova", "dev-vm-qcow2", "dev-vm-raw", "dev-vm-vmdk"],
        # Without a BIOS, and without VirtualBox, which nixpkgs does not even evaluate there.
        "aarch64-linux": ["arm-vm-iso", "arm-vm-qcow2-efi", "arm-vm-raw-efi", "arm-vm-vmdk"],
    }


def test_a_format_that_nixpkgs_has_not_is_left_out(nix: Value) -> None:
    call = 'library.imagesOf { configurations = hosts; formats = [ "iso" "vhd" ]; }'
    found = nix(f"let {HOSTS} in builtins.mapAttrs (_: builtins.attrNames) ({call})")
    assert found == {"x86_64-linux": ["dev-vm-iso", "laptop-iso"], "aarch64-linux": ["arm-vm-iso"]}


def test_apps_and_checks(nix: Value) -> None:
    found = nix(f"let {HOSTS} in (library.apps hosts).x86_64-linux")
    assert list(found) == ["dev-vm"]
    assert found["dev-vm"]["type"] == "app"
    assert found["dev-vm"]["program"].endswith("/bin/run-machine-vm")
    found = nix(f"let {HOSTS} in builtins.mapAttrs (_: builtins.attrNames) (library.checks hosts)")
    assert found == {"x86_64-linux": ["dev-vm", "laptop"], "aarch64-linux": ["arm-vm"]}


def test_formats_have_the_same_names_in_nix_and_in_the_command(nix: Value) -> None:
    assert nix("library.formats") == {name: each.variant for name, each in FORMATS.items()}
