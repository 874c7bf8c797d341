"""tests/standin/prepare: its arithmetic, its one-line failures, the line for pytest."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "standin" / "prepare"


@pytest.fixture
def prepare() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("standin_prepare", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.nix
def test_store_paths_are_those_that_nix_computes(prepare: ModuleType) -> None:
    sha256 = "a86e2049672f52354c4536a089203b6c82639420424d31c91cf31a181fd4d8f1"
    for name in ("bash.deb", "libstdc++6.deb"):
        done = subprocess.run(
            ["nix-store", "--print-fixed-path", "sha256", sha256, name],
            env={**os.environ, "NIX_CONFIG": "build-users-group ="},
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        assert prepare.store_path(name, sha256) == done.stdout.strip()


def test_a_closure_follows_alternatives_and_virtual_packages(prepare: ModuleType) -> None:
    records = {
        "a": {"Depends": "b (>= 1), mail-agent | nothing", "Pre-Depends": "c:any"},
        "b": {"Depends": "a"},
        "c": {},
        "postman": {"Provides": "mail-agent (= 2), letters"},
        "unrelated": {"Provides": "other"},
    }
    assert prepare.closure(["a"], records) == {"a", "b", "c", "postman"}


def test_the_cache_follows_every_file_of_the_stand_in(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepare.SOURCE, tmp_path / "nixpkgs")
    monkeypatch.setattr(prepare, "SOURCE", tmp_path / "nixpkgs")
    before = prepare.content_hash()
    (tmp_path / "nixpkgs" / "new.nix").write_text("{ }")
    added = prepare.content_hash()
    (tmp_path / "nixpkgs" / "new.nix").write_text("{ x = 1; }")
    assert len({before, added, prepare.content_hash()}) == 3


def test_missing_programs_are_named_in_one_line_without_root(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(
        prepare, "PROGRAMS", {"no-such-program-x": "package-x", "no-such-program-a": "package-a"}
    )
    monkeypatch.setattr(prepare, "FILES", {})

    assert prepare.main([]) == 1

    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "not installed: package-a package-x " in output.err


def test_a_cache_that_could_not_be_passed_on_is_refused(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/with a blank")
    monkeypatch.setattr(prepare, "PROGRAMS", {})

    assert prepare.main([]) == 1
    assert "has a blank in it" in capsys.readouterr().err


def test_the_last_line_is_plain_words_for_pytest(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "prepare", lambda: Path("/cache/nixpkgs"))

    assert prepare.main([]) == 0

    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == [
        "--nixvm-override-input", "nixpkgs", "path:/cache/nixpkgs",
        "--nixvm-nix-option", "sandbox", "false",
        "--nixvm-nix-option", "substitute", "false",
    ]  # fmt: skip
    assert not set(line) & set("'\"\\$*?[]")


def test_what_was_downloaded_is_compared_with_what_apt_announced(
    prepare: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "evil.deb").write_bytes(b"not what you asked for")
    deb = {"url": (tmp_path / "evil.deb").as_uri(), "sha256": "0" * 64}

    with pytest.raises(prepare.Failure, match="is not what apt announced"):
        prepare.download(("evil", deb), tmp_path)


@pytest.mark.nix
def test_the_inputs_of_a_flake_are_given_what_stands_for_them(
    prepare: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare, "prepare", lambda: Path("/cache/nixpkgs"))
    flake = tmp_path / "a ${flake}"
    flake.mkdir()

    assert prepare.main([str(flake)]) == 1
    assert "no flake.nix in " in capsys.readouterr().err

    (flake / "flake.nix").write_text(
        """{
          inputs.nixpkgs.url = "github:NixOS/nixpkgs";
          inputs.home-manager.inputs.nixpkgs.follows = "nixpkgs";
          inputs.other = { };
          outputs = _: throw "not asked";
        }"""
    )
    assert prepare.main([str(flake)]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:7] == [
        "--nixvm-override-input", "nixpkgs", "path:/cache/nixpkgs",
        "--nixvm-override-input", "home-manager", f"path:{SCRIPT.parent / 'home-manager'}",
        "--nixvm-nix-option",
    ]  # fmt: skip

    (flake / "flake.nix").write_text("{ outputs = _: { }; }")
    assert prepare.main([str(flake)]) == 0
    assert "home-manager" not in capsys.readouterr().out


def test_a_mistaken_call_is_told_how_to_call(
    prepare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--help"], ["a", "b"]):
        assert prepare.main(arguments) == 2
        assert capsys.readouterr().err == "usage: tests/standin/prepare [FLAKE]\n"
