"""`nixvm completion`: real shells read it, and machines are completed without nix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from _flake import OPTIONS, machine, needs_nix, write_flake

from pytest_nixvm.cli import main
from pytest_nixvm.cli.completion import remembered_names


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell, capsys):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert f"_NIXVM_COMPLETE={shell}_complete" in out
    program = shutil.which(shell)
    if program is not None:
        done = subprocess.run([program, "-n"], input=out, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_shell_of_the_log_in_is_the_default(capsys, monkeypatch):
    monkeypatch.setenv("SHELL", "/run/current-system/sw/bin/fish")
    assert main(["completion"]) == 0
    assert "fish_complete" in capsys.readouterr().out
    monkeypatch.setenv("SHELL", "/bin/sh")
    assert main(["completion"]) == 2
    assert "For which shell: bash, zsh, fish?" in capsys.readouterr().err
    assert main(["completion", "csh"]) == 2
    assert "csh" in capsys.readouterr().err


def complete(words: str, cwd, *, raw: bool = False, **environment: str) -> list[str]:
    """Press the tab key behind `words`, in a process whose PATH has no nix."""
    done = subprocess.run(
        [sys.executable, "-c", "from pytest_nixvm.cli import main; main()"],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=30,
        env={
            **os.environ,
            "PATH": "/nonexistent",
            "_NIXVM_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
            **environment,
        },
    )
    assert done.stderr == ""
    return [line if raw else line.partition(",")[2] for line in done.stdout.split()]


def test_commands_are_completed(tmp_path):
    assert complete("nixvm bui", tmp_path) == ["build"]
    assert {"bash", "fish", "zsh"} == set(complete("nixvm completion ", tmp_path))


@pytest.mark.parametrize(
    "words", ["list --flake su", "ssh --flake su", "run x --share su", "init su"]
)
def test_directories_are_completed_by_the_shell(tmp_path, words):
    done = complete(f"nixvm {words}", tmp_path, raw=True)
    assert done == ["dir,su"]


@needs_nix
def test_machines_are_completed_from_what_is_remembered(tmp_path, capsys):
    flake = write_flake(tmp_path / "config", machine("web", "web") + machine("dev-vm", "dev-vm"))
    cache = {"NIXVM_CACHE": str(tmp_path / "cache")}
    assert complete("nixvm build ", flake, **cache) == []  # never looked at
    more = [word for option in OPTIONS for word in ("--nix-option", *option)]
    assert main(["list", "--flake", str(flake), "--cache", cache["NIXVM_CACHE"], *more]) == 0

    assert complete("nixvm build ", flake, **cache) == ["dev-vm", "web"]
    assert complete("nixvm build we", flake, **cache) == ["web"]
    assert complete("nixvm deploy we", flake, **cache) == ["web"]
    assert complete("nixvm build web ", flake, **cache) == ["dev-vm"]
    assert complete("nixvm build ", tmp_path, **cache, NIXVM_FLAKE="config") == ["dev-vm", "web"]
    assert complete(f"nixvm build --flake {flake} d", tmp_path, **cache) == ["dev-vm"]
    assert complete("nixvm build --flake /nowhere ", flake, **cache) == []

    for record in (tmp_path / "cache" / "evaluations").glob("*.json"):
        record.write_bytes(record.read_bytes()[:40])
    assert complete("nixvm build ", flake, **cache) == []


def test_nothing_remembered_is_no_error(tmp_path):
    assert remembered_names(".", tmp_path / "none") == ()
    assert remembered_names("github:o/r", tmp_path) == ()
