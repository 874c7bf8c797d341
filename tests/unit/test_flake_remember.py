"""An unchanged flake is not evaluated again, a changed one always is. Real nix, real git."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from _flake import OPTIONS, Seen, Workshop, evaluations, git, machine, needs_nix, write_flake

from pytest_nixvm.flake import Nix, evaluation, fingerprint, remember

pytestmark = needs_nix


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def looks_again(shop: Workshop, text: str | Path, **more: object) -> bool:
    """Whether a new session evaluates the flake."""
    seen = Seen()
    shop.flake(text, progress=seen, **more).machines()
    return evaluations(seen) > 0


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def same_size_same_mtime(flake: Path) -> None:
    file = flake / "system.nix"
    status = file.stat()
    edit(file, '"nixos"', '"nixes"')
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file's content": lambda flake: edit(flake / "flake.nix", "dev-vm", "dev-vn"),
    "content of the same size and mtime": same_size_same_mtime,
    "the executable bit": lambda flake: (flake / "system.nix").chmod(0o755),
    "a file that becomes tracked": lambda flake: (
        (flake / "new.nix").write_text("1"),
        git(flake, "add", "-N", "new.nix"),
    ),
    "a file that goes": lambda flake: (flake / "data").unlink(),
    "a link's target": lambda flake: (
        (flake / "link").unlink(),
        (flake / "link").symlink_to("flake.nix"),
    ),
    "a new commit of the same files": lambda flake: git(
        flake, "commit", "-q", "--allow-empty", "-m", "next"
    ),
    "what is staged": lambda flake: (
        (flake / "data").write_text("staged"),
        git(flake, "add", "data"),
        (flake / "data").write_text("one"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_a_git_tree_is_seen(shop: Workshop, change: str) -> None:
    flake = shop.tmp / "config"
    flake.mkdir()
    (flake / "data").write_text("one")
    (flake / "link").symlink_to("system.nix")
    write_flake(flake, machine("dev-vm", "dev-vm"))
    assert looks_again(shop, flake)
    assert not looks_again(shop, flake)
    CHANGES[change](flake)
    assert looks_again(shop, flake)
    assert not looks_again(shop, flake)


def test_what_git_does_not_track_is_no_change(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"))
    assert looks_again(shop, flake)
    (flake / "notes.txt").write_text("hello")
    (flake / "flake.nix").touch()
    assert not looks_again(shop, flake)


def test_an_uncommitted_change_of_a_committed_file_is_seen_and_so_is_its_end(
    shop: Workshop,
) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"))
    looks_again(shop, flake)
    edit(flake / "flake.nix", "dev-vm", "dev-vn")
    assert looks_again(shop, flake)
    git(flake, "checkout", "-q", "flake.nix")
    assert looks_again(shop, flake)


PATH_CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda flake: edit(flake / "flake.nix", "dev-vm", "dev-vn"),
    "a new file": lambda flake: (flake / "inner/new").write_text(""),
    "an mtime, which is lastModified": lambda flake: os.utime(
        flake / "flake.nix", (time.time() + 10, time.time() + 10)
    ),
    "a mode": lambda flake: (flake / "flake.nix").chmod(0o700),
}


@pytest.mark.parametrize("change", PATH_CHANGES)
def test_a_change_in_a_directory_is_seen(shop: Workshop, change: str) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"), tracked=False)
    (flake / "inner").mkdir()
    assert looks_again(shop, flake)
    assert not looks_again(shop, flake)
    PATH_CHANGES[change](flake)
    assert looks_again(shop, flake)


def test_a_branch_is_followed_and_a_revision_stays(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"))
    revision = git(flake, "rev-parse", "HEAD")
    branch = f"git+file://{flake}?ref=main"
    fixed = f"git+file://{flake}?ref=main&rev={revision}"
    assert looks_again(shop, branch)
    assert looks_again(shop, fixed)
    (flake / "flake.nix").write_text("not committed, not seen")
    assert not looks_again(shop, branch)
    git(flake, "checkout", "-q", "flake.nix")
    git(flake, "commit", "-q", "--allow-empty", "-m", "next")
    assert looks_again(shop, branch)
    assert not looks_again(shop, fixed)


def with_input(shop: Workshop, url: str) -> Path:
    """Make a flake with one input, and no lock file."""
    config = shop.tmp / "config"
    config.mkdir()
    body = machine("vm", "vm").replace("nixosSystem {", "lib.lib.nixosSystem {")
    (config / "flake.nix").write_text(
        f'{{ inputs.lib.url = "{url}"; outputs = {{ self, lib }}: {{ {body} }}; }}'
    )
    git(config, "init", "-q", "-b", "main")
    git(config, "add", ".")
    git(config, "commit", "-q", "-m", "first")
    return config


def test_an_override_is_watched(shop: Workshop) -> None:
    lib = write_flake(shop.tmp / "lib", "lib.nixosSystem = nixosSystem;")
    other = write_flake(shop.tmp / "other", "lib.nixosSystem = nixosSystem;", tracked=False)
    config = with_input(shop, "github:NixOS/nixpkgs")
    assert looks_again(shop, config, override_inputs=[("lib", str(lib))])
    assert not looks_again(shop, config, override_inputs=[("lib", str(lib))])
    assert looks_again(shop, config, override_inputs=[("lib", str(other))])
    for tree in (lib, other):
        edit(tree / "system.nix", '"nixos"', '"nixes"')
        assert looks_again(shop, config, override_inputs=[("lib", str(tree))])
        assert not looks_again(shop, config, override_inputs=[("lib", str(tree))])


def test_an_input_that_no_lock_file_names_is_watched_if_it_is_here(shop: Workshop) -> None:
    lib = write_flake(shop.tmp / "lib", "lib.nixosSystem = nixosSystem;", tracked=False)
    config = with_input(shop, f"path:{lib}")
    assert looks_again(shop, config)
    assert not looks_again(shop, config)
    edit(lib / "system.nix", '"nixos"', '"nixes"')
    assert looks_again(shop, config)


def test_an_input_that_nix_looks_up_afresh_is_never_remembered(shop: Workshop) -> None:
    lib = write_flake(shop.tmp / "lib", "lib.nixosSystem = nixosSystem;")
    config = with_input(shop, "flake:somewhere")
    registry = shop.tmp / "registry.json"
    entry = {"from": {"type": "indirect", "id": "somewhere"}}
    registry.write_text(
        json.dumps(
            {"version": 2, "flakes": [entry | {"to": {"type": "git", "url": f"file://{lib}"}}]}
        )
    )
    nix = Nix.find(options=[*OPTIONS, ("flake-registry", str(registry))])
    assert looks_again(shop, config, nix=nix)
    assert looks_again(shop, config, nix=nix)


def test_a_remote_flake_is_looked_up_each_time_and_evaluated_when_it_moved(
    shop: Workshop,
) -> None:
    flake = write_flake(shop.tmp / "site/config", machine("dev-vm", "dev-vm"))
    handler = functools.partial(QuietHandler, directory=str(flake.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reference = f"git+http://127.0.0.1:{server.server_port}/config/.git?ref=main"
    # Nix asks a server again only after an hour, unless it is told otherwise.
    nix = Nix.find(options=[*OPTIONS, ("tarball-ttl", "0")])
    try:
        git(flake, "update-server-info")
        assert looks_again(shop, reference, nix=nix)
        assert not looks_again(shop, reference, nix=nix)
        edit(flake / "flake.nix", "dev-vm", "dev-vn")
        git(flake, "commit", "-q", "-a", "-m", "next")
        git(flake, "update-server-info")
        assert looks_again(shop, reference, nix=nix)
        revision = git(flake, "rev-parse", "HEAD")
        fixed = f"{reference}&rev={revision}"
    finally:
        server.shutdown()
        server.server_close()
    # The same content, by its revision: nobody has to be asked for that.
    assert not looks_again(shop, fixed, nix=nix)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def test_a_changed_lock_file_is_seen(shop: Workshop) -> None:
    lib = write_flake(shop.tmp / "lib", "lib.nixosSystem = nixosSystem;")
    config = with_input(shop, f"git+file://{lib}")
    lock = ["nix", "--extra-experimental-features", "nix-command flakes", "flake", "lock"]
    subprocess.run([*lock, str(config)], check=True, capture_output=True)
    git(config, "add", "flake.lock")
    assert looks_again(shop, config)
    assert not looks_again(shop, config)
    # A locked input does not move when its branch does …
    edit(lib / "system.nix", '"nixos"', '"nixes"')
    git(lib, "commit", "-q", "-a", "-m", "next")
    assert not looks_again(shop, config)
    # … until the lock does.
    (config / "flake.lock").unlink()
    subprocess.run([*lock, str(config)], check=True, capture_output=True)
    assert looks_again(shop, config)
    assert not looks_again(shop, config)


def test_another_nix_plugin_or_option_is_seen(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"))
    nix = Nix.find(options=OPTIONS)
    assert looks_again(shop, flake, nix=nix)
    assert not looks_again(shop, flake, nix=nix)
    assert looks_again(shop, flake, nix=replace(nix, version="2.99"))
    assert looks_again(shop, flake, nix=Nix.find(options=[*OPTIONS, ("cores", "1")]))
    with monkeypatch.context() as patch:
        patch.setenv("NIX_CONFIG", "cores = 1")
        assert looks_again(shop, flake, nix=Nix.find(options=OPTIONS))
    with monkeypatch.context() as patch:
        conf = tmp_path / "nix.conf"
        conf.write_text("max-jobs = 1\n")
        patch.setenv("NIX_USER_CONF_FILES", str(conf))
        assert looks_again(shop, flake, nix=Nix.find(options=OPTIONS))
        conf.write_text("max-jobs = 2\n")
        assert looks_again(shop, flake, nix=Nix.find(options=OPTIONS))
    with monkeypatch.context() as patch:
        modules = tmp_path / "modules"
        modules.mkdir()
        for path in remember.MODULES.iterdir():
            (modules / path.name).write_text(path.read_text() + "# another release\n")
        patch.setattr(remember, "MODULES", modules)
        remember._plugin.cache_clear()
        assert looks_again(shop, flake, nix=nix)
    remember._plugin.cache_clear()
    assert not looks_again(shop, flake, nix=nix)


def test_an_impure_evaluation_is_not_remembered(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"))
    nix = Nix.find(options=[*OPTIONS, ("pure-eval", "false")])
    assert looks_again(shop, flake, nix=nix)
    assert looks_again(shop, flake, nix=nix)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"trees": 1}', "\0\0", "null"])
def test_a_damaged_record_is_no_record(shop: Workshop, damage: str) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"))
    looks_again(shop, flake)
    for record in (shop.cache / "evaluations").glob("*.json"):
        assert record.stat().st_mode & 0o077 == 0
        record.write_text(damage)
    assert looks_again(shop, flake)
    assert not looks_again(shop, flake)


def test_what_changes_while_nix_reads_is_not_remembered(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"))
    evaluate = evaluation.Evaluator._evaluate

    def slow(*arguments: object) -> object:
        answer = evaluate(*arguments)  # type: ignore[arg-type]
        edit(flake / "flake.nix", "dev-vm", "dev-vm-")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluator, "_evaluate", slow)
        assert looks_again(shop, flake)
    assert looks_again(shop, flake)


def test_a_large_tree_is_read_again_only_after_a_change(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_MANY_FILES", 3)
    flake = write_flake(shop.tmp / "config", machine("dev-vm", "dev-vm"))
    (flake / "data").write_text("one")
    git(flake, "add", "data")
    reads: list[int] = []
    read = fingerprint._read
    monkeypatch.setattr(fingerprint, "_read", lambda e: (reads.append(1), read(e))[1])
    cache = shop.tmp / "trees"
    first = fingerprint.fingerprint(f"git+file://{flake}", cache)
    assert first is not None
    # Just written: a second change in the same tick could not be told from the first.
    assert fingerprint.fingerprint(f"git+file://{flake}", cache) == first
    assert len(reads) == 2
    monkeypatch.setattr(fingerprint.time, "time", lambda real=time.time: real() + 60)
    for expected in (3, 3):
        assert fingerprint.fingerprint(f"git+file://{flake}", cache) == first
        assert len(reads) == expected
    same_size_same_mtime(flake)
    assert fingerprint.fingerprint(f"git+file://{flake}", cache) not in (first, None)
    assert len(reads) == 4


def test_old_records_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remember, "_KEEP", 3)
    memory = remember.Memory(tmp_path, "about")
    for number in range(6):
        memory.record(f"question {number}", {"x": "y"}, {})
        os.utime(tmp_path / f"{memory.name(f'question {number}')}.json", (number, number))
    kept = {path.stem for path in tmp_path.glob("*.json")}
    assert len(kept) == 3
    assert memory.name("question 5") in kept
