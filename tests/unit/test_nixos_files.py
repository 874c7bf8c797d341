"""All Nix files of the project: they parse, every name is bound, and every bound name is used."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from _nix_names import unused

ROOT = Path(__file__).parents[2]
FOLDERS = ("pytest_nixvm", "example_tests", "tests", "benchmarks", "tools")
FILES = sorted(
    [*ROOT.glob("*.nix"), *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.nix"))]
)


@pytest.mark.nix
def test_each_parses_and_has_no_unbound_name() -> None:
    assert FILES
    done = subprocess.run(
        ["nix-instantiate", "--parse", *FILES],
        env={**os.environ, "NIX_CONFIG": "build-users-group ="},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_each_uses_what_it_binds(file: Path) -> None:
    assert unused(file.read_text()) == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{ a, b ? a, ... }: b", []),
        ("{ a, b, ... }: b", ["a"]),
        ("{ a, ... }@args: a", ["args"]),
        ("let a = 1; b = 2; in b", ["a"]),
        ("let inherit (x) a b; in x.a + b", ["a"]),
        ("let a = 1; in ''${toString a} b''", []),
        ("let a = 1; in ''a ''${a} '''' a''", ["a"]),
        ('let a = 1; in "a \\${a} \\" $${a}"', ["a"]),
        ("let a = 1; in # a\n /* a */ ./a/b.nix", ["a"]),
        ("let a = let b = 1; in 2; c = { d = 1; }; in a + c.d", ["b"]),
        ("{ lib, pkgs }: { x = { y, ... }: y; }", ["lib", "pkgs"]),
        ("_: { a = { _unused, ... }: 1; }", []),
    ],
)
def test_what_is_used(text: str, names: list[str]) -> None:
    assert unused(text) == names
