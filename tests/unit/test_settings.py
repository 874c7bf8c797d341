"""Options: the command line wins over the ini file, and a wrong value is named with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_nixvm.errors import SettingsError
from pytest_nixvm.settings import Generations, MachineRequest, Settings, anchored


def read(command_line=None, ini=None, ini_directory=Path("/ini")):
    return Settings.read((command_line or {}).get, (ini or {}).get, ini_directory)


def test_defaults():
    settings = Settings.make()

    assert (settings.flake, settings.memory, settings.cores) == (None, None, None)
    assert (settings.isolation, settings.accel, settings.network) == ("test", "auto", "isolated")
    assert settings.cache.name == "pytest-nixvm"
    assert settings.cache_size == 20 * 2**30


def test_the_command_line_wins():
    settings = read({"nixvm_memory": "512"}, {"nixvm_memory": "1024", "nixvm_cores": "3"})

    assert (settings.memory, settings.cores) == (512, 3)


def test_the_cache_s_size_is_given_in_gib():
    assert read({"nixvm_cache_size": "3"}).cache_size == 3 * 2**30
    assert read(None, {"nixvm_cache_size": "1"}).cache_size == 2**30


def test_pairs_on_the_command_line_and_in_the_ini_file():
    settings = read(
        {"nixvm_nix_option": [["sandbox", "false"]]},
        {"nixvm_override_input": ["nixpkgs github:NixOS/nixpkgs", "home path:/h"]},
    )

    assert settings.nix_option == (("sandbox", "false"),)
    assert settings.override_input == (("nixpkgs", "github:NixOS/nixpkgs"), ("home", "path:/h"))


def test_an_empty_nix_option_can_be_set_in_the_ini_file():
    assert read(None, {"nixvm_nix_option": ["substituters"]}).nix_option == (("substituters", ""),)


def test_relative_references_start_where_they_were_written(tmp_path, monkeypatch):
    (tmp_path / "shell").mkdir()
    (tmp_path / "ini" / "nix").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "shell")

    assert read({"nixvm_flake": ".#vm"}).flake == f"{tmp_path}/shell#vm"
    assert read({"nixvm_flake": "path:.?dir=x"}).flake == f"path:{tmp_path}/shell?dir=x"
    assert read(None, {"nixvm_flake": "nix"}, tmp_path / "ini").flake == f"{tmp_path}/ini/nix"
    assert read(None, {"nixvm_flake": ".."}, tmp_path / "ini").flake == f"{tmp_path}"
    assert read(None, {"nixvm_output": "out"}, tmp_path / "ini").output == tmp_path / "ini/out"
    assert anchored("github:o/r#vm", tmp_path) == "github:o/r#vm"
    assert anchored("nixpkgs", tmp_path) == "nixpkgs"


@pytest.mark.parametrize(
    ("ini", "value", "says"),
    [
        ("nixvm_isolation", "tests", "'tests' is not one of test, module, session"),
        ("nixvm_accel", "xen", "'xen' is not one of auto, kvm, tcg"),
        ("nixvm_network", "bridge", "'bridge' is not one of isolated, nat"),
        ("nixvm_memory", "4G", "'4G' is not a whole number above 0"),
        ("nixvm_memory", "0", "'0' is not a whole number above 0"),
        ("nixvm_cache_size", "10G", "'10G' is not a whole number above 0"),
        ("nixvm_cache_size", "0", "'0' is not a whole number above 0"),
        ("nixvm_cores", "-1", "'-1' is not a whole number above 0"),
        ("nixvm_boot_timeout", "soon", "'soon' is not a number of seconds"),
        ("nixvm_boot_timeout", "nan", "'nan' is not a number of seconds"),
        ("nixvm_override_input", ["nixpkgs"], "should be a name and a value"),
        ("nixvm_offline", "perhaps", "should be true or false"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(ini, value, says):
    option = "--" + ini.replace("_", "-")
    with pytest.raises(SettingsError, match=says) as caught:
        read({ini: value})
    assert str(caught.value).startswith(option)
    with pytest.raises(SettingsError, match=says) as caught:
        read(None, {ini: value})
    assert str(caught.value).startswith(f"{ini} (ini)")


def test_a_setting_that_does_not_exist():
    with pytest.raises(SettingsError, match="no setting 'flak'"):
        Settings.make(flak=".")


def test_a_marker_overrides_the_settings():
    settings = Settings.make(memory="512", network="nat")

    request = MachineRequest.read({"memory": 2048, "user": "alice"}, settings, "test_it.py::test")

    assert (request.memory, request.network, request.user) == (2048, "nat", "alice")


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"memroy": 1}, "test_it.py::test: the nixvm marker knows no argument 'memroy'"),
        ({"memory": "lots"}, "test_it.py::test: the nixvm marker's memory: 'lots' is not a whole"),
        ({"isolation": "none"}, "the nixvm marker's isolation: 'none' is not one of"),
        ({"user": 0}, "user must be a user's name, not 0"),
    ],
)
def test_a_marker_s_mistake_names_the_test(keywords, says):
    with pytest.raises(SettingsError, match=says):
        MachineRequest.read(keywords, Settings.make(), "test_it.py::test")


def test_a_revision_is_no_directory_unless_that_has_a_flake(tmp_path, monkeypatch):
    """A branch is often called as a directory is: `config`, `nix`, `dev`."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "flake.nix").touch()
    monkeypatch.chdir("/")

    def ini(value: str) -> str | None:
        return read(None, {"nixvm_from": value}, tmp_path).from_

    assert ini("dev") == "dev"
    assert ini("HEAD~1#web") == "HEAD~1#web"
    assert ini("old#web") == f"{tmp_path}/old#web"
    assert ini("./dev") == f"{tmp_path}/dev"
    assert ini("git+file:.?ref=main") == f"git+file:{tmp_path}?ref=main"
    assert ini("git+file:///srv/config?ref=main") == "git+file:///srv/config?ref=main"
    assert ini("github:me/config/0123abc") == "github:me/config/0123abc"
    assert ini("") is None
    assert read(None, {"nixvm_changed": "dev"}, tmp_path).changed == "dev"


def test_flags_and_lists_in_the_ini_file():
    settings = read(
        None,
        {"nixvm_check": "true", "nixvm_boot_loader": "no", "nixvm_check_off": ["web: ports: so"]},
    )
    assert (settings.check, settings.boot_loader) == (True, False)
    assert settings.check_off == ("web: ports: so",)
    assert Settings.make(from_="HEAD~1").from_ == "HEAD~1"
    assert Settings.make(**{"from": "HEAD~1"}).from_ == "HEAD~1"


def test_the_marker_s_boot_loader_wins_over_the_setting():
    def request(settings: Settings, **keywords: object) -> MachineRequest:
        return MachineRequest.read(keywords, settings, "test_it.py::test")

    assert request(Settings.make()).boot_loader is False
    assert request(Settings.make(boot_loader=True)).boot_loader is True
    assert request(Settings.make(), boot_loader=True).boot_loader is True
    assert request(Settings.make(boot_loader=True), boot_loader=False).boot_loader is False
    with pytest.raises(SettingsError, match="boot_loader must be True or False, not 'yes'"):
        request(Settings.make(), boot_loader="yes")


def test_generations_are_the_same_in_whatever_order_the_candidates_are_given():
    assert Generations.of("HEAD~1", ".", "next") == Generations.of("HEAD~1", "next", ".", ".")
    assert Generations.of("HEAD~1", ".") != Generations.of("HEAD~2", ".")
    assert len({Generations.of("a", "b", "c"), Generations.of("a", "c", "b")}) == 1
