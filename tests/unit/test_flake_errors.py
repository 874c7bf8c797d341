"""What bad input gets: one message that says what, where, and what to do. Real nix."""

from __future__ import annotations

import http.server
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from _flake import OPTIONS, Seen, Workshop, git, machine, needs_nix, write_flake

from pytest_nixvm.errors import (
    EvaluationError,
    FlakeError,
    MissingProgramError,
    SettingsError,
    UserError,
)
from pytest_nixvm.flake import Nix

pytestmark = needs_nix


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def refusal(shop: Workshop, text: str | Path, name: str = "vm", **more: object) -> str:
    """Build a machine that can't be built; return the message."""
    with pytest.raises(UserError) as caught:
        shop.flake(text, **more).build(name)
    message = str(caught.value)
    assert "\x1b" not in message
    assert "--show-trace' to show" not in message
    assert "Traceback" not in message
    return message


def write(directory: Path, flake_nix: str, **others: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "flake.nix").write_text(flake_nix)
    for name, text in others.items():
        (directory / f"{name}.nix").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{ description = "x"; }', r"/f is no flake: its flake\.nix has no `outputs`"),
        ("[ ]", r"/f is no flake: its flake\.nix is not an attribute set"),
        ("", r"syntax error.*\n    at /.*/f/flake\.nix:1:1"),
        ("{ outputs = { self }: { }; }", "has no nixosConfigurations. Its outputs are: none"),
        (
            "{ outputs = { self }: { lib = { }; packages = { }; }; }",
            "has no nixosConfigurations. Its outputs are: lib, packages. Name what to test",
        ),
    ],
)
def test_not_a_flake(shop: Workshop, text: str, message: str) -> None:
    assert re.search(message, refusal(shop, write(shop.tmp / "f", text)), re.DOTALL)


def outputs(body: str) -> str:
    return "{ outputs = { self }: { nixosConfigurations.vm = " + body + "; }; }"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import ./x.nix", ["syntax error, unexpected '}'", "at {}/x.nix:2:9:"]),
        (
            "{ config.system.build.vm = let a.b = a.b; in a.b; }",
            ["infinite recursion encountered", "at {}/flake.nix:1:", "defined by itself"],
        ),
        (
            '{ config.system.build.vm = throw "\\nFailed assertions:\\n- set a password"; }',
            ["    Failed assertions:\n    - set a password"],
        ),
        (
            "{ config.system.build.vm = builtins.concatMpa; }",
            ["attribute 'concatMpa' missing", "at {}/flake.nix:1:", "Did you mean concatMap?"],
        ),
        ("import ./gone.nix", ["there is no {}/gone.nix, which the flake refers to"]),
        (
            "{ config.system.build.vm = throw (toString ./x.nix); }",
            ["can't evaluate nixosConfigurations.vm of {}:\n    {}/x.nix"],
        ),
        (
            "{ config.system.build.vm = builtins.readFile /etc/hostname; }",
            ["access to absolute path '/etc/hostname'", "--nixvm-nix-option pure-eval false"],
        ),
    ],
)
def test_evaluation_errors_are_nix_own_words_at_the_users_place(
    shop: Workshop, body: str, expected: list[str]
) -> None:
    flake = write(shop.tmp / "f", outputs(body), x="{\n  a = 1 }\n")
    message = refusal(shop, flake)
    for part in expected:
        assert part.replace("{}", str(flake)) in message
    assert "/nix/store" not in message


def test_a_build_that_the_evaluation_takes_shows_its_log(shop: Workshop) -> None:
    builder = 'builder = "/bin/sh"; args = [ "-c" "echo no such tool; exit 3" ]'
    generated = f'derivation {{ name = "generated"; system = "x86_64-linux"; {builder}; }}'
    flake = write(shop.tmp / "f", outputs(f"{{ config.system.build.vm = import ({generated}); }}"))
    message = refusal(shop, flake)
    assert "takes a build that fails: generated failed with exit code 3." in message
    assert "Its log ends so:\n    no such tool\nThe derivation: /nix/store/" in message


def test_machines_that_are_no_set(shop: Workshop) -> None:
    flake = write(shop.tmp / "f", "{ outputs = { self }: { nixosConfigurations = x: x; }; }")
    message = refusal(shop, flake)
    assert "its nixosConfigurations are no set of machines, but a lambda" in message
    assert "target.nix" not in message


@pytest.mark.parametrize(
    ("lock", "why"),
    [
        ("{\n<<<<<<< HEAD\n=======\n>>>>>>> other\n}", "a merge has left its conflict in it."),
        ('{ "nodes": {', "it is no JSON: "),
    ],
)
def test_a_lock_file_that_can_not_be_read(shop: Workshop, lock: str, why: str) -> None:
    flake = write(shop.tmp / "f", outputs("{ }"))
    (flake / "flake.lock").write_text(lock)
    message = refusal(shop, flake)
    assert f"{flake}/flake.lock can't be read: {why}" in message
    assert "`nix flake lock` makes a new one" in message
    assert len(message.splitlines()) == 2


def test_a_long_message_is_cut_in_the_middle(shop: Workshop) -> None:
    lines = 'builtins.genList (n: "line ${toString n}.") 500'
    body = f'throw (builtins.concatStringsSep "\\n" ({lines}))'
    message = refusal(shop, write(shop.tmp / "f", outputs(body)))
    assert "line 0." in message
    assert "line 499." in message
    assert len(message.splitlines()) < 70


def test_an_evaluation_without_end_is_ended(shop: Workshop) -> None:
    loop = (
        "let numbers = builtins.genList (n: n) 10000; count = depth: if depth == 0 then 0 else "
        "builtins.foldl' (sum: _: sum + count (depth - 1)) 0 numbers; in count 6"
    )
    flake = write(shop.tmp / "f", outputs(f"{{ config.system.build.vm = {loop}; }}"))
    shop.flake(flake).machines()  # remembered, so not under that timeout
    seen = Seen()
    began = time.monotonic()
    message = refusal(shop, flake, evaluation_timeout=2, progress=seen)
    assert 2 <= time.monotonic() - began < 30
    assert "nixosConfigurations.vm of" in message
    assert "did not end within 2 s" in message
    assert seen.ends[-1] == "failed"


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("dev-mv", "has no dev-mv. Did you mean dev-vm? Its machines are: dev-vm, server."),
        ("nixosConfigurations.srver", "Did you mean server? Its machines are: dev-vm, server."),
        ("packages.x86_64-linux.tols", "Did you mean packages.x86_64-linux.tools?"),
        ("zzz", "has no zzz. Its machines are: dev-vm, server."),
    ],
)
def test_no_such_attribute(shop: Workshop, attribute: str, message: str) -> None:
    body = machine("dev-vm", "a") + machine("server", "b") + "packages.x86_64-linux.tools = 1;"
    flake = write_flake(shop.tmp / "f", body, tracked=False)
    assert message in refusal(shop, f"{flake}#{attribute}")


def test_no_such_machine(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "f", machine("dev-vm", "a"), tracked=False)
    assert "has no machine dev-mv. Did you mean dev-vm? It has: dev-vm." in refusal(
        shop, flake, "dev-mv"
    )


def test_names_are_data_not_code(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "f", machine("vm", "a"), tracked=False)
    for name in ("a${throw 1}", 'b\\"; builtins.abort 1', "''${c}"):
        quoted = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
        assert "Its machines are: vm." in refusal(shop, f"{flake}#{quoted}")


class TestUntracked:
    def flake(self, shop: Workshop) -> Path:
        flake = write_flake(
            shop.tmp / "f", "nixosConfigurations.vm = import ./nix/machines/vm.nix;"
        )
        (flake / "nix/machines").mkdir(parents=True)
        (flake / "nix/machines/vm.nix").write_text("{ }")
        return flake

    def test_a_file(self, shop: Workshop) -> None:
        flake = self.flake(shop)
        message = refusal(shop, flake)
        assert f"Nix can't see {flake}/nix/machines/vm.nix: git does not track it" in message
        assert message.endswith(f"git -C {flake} add -N nix/machines/vm.nix")

    def test_a_file_that_gitignore_names(self, shop: Workshop) -> None:
        flake = self.flake(shop)
        (flake / ".gitignore").write_text("nix/\n")
        message = refusal(shop, flake)
        assert ".gitignore names it" in message
        assert f"git -C {flake} add -N -f nix/machines/vm.nix" in message

    def test_flake_nix_itself(self, shop: Workshop) -> None:
        flake = write_flake(shop.tmp / "f/inner", "", tracked=False)
        git(shop.tmp / "f", "init", "-q")
        message = refusal(shop, flake)
        assert f"Nix can't see {flake}/flake.nix: git does not track it" in message
        assert message.endswith(f"git -C {flake.parent} add -N inner/flake.nix")

    def test_a_file_of_an_override(self, shop: Workshop) -> None:
        config = write(
            shop.tmp / "f",
            '{ inputs.lib.url = "github:a/b"; outputs = { self, lib }: '
            "{ nixosConfigurations.vm = lib.vm; }; }",
        )
        lib = write_flake(shop.tmp / "lib", "vm = import ./new.nix;")
        (lib / "new.nix").write_text("{ }")
        message = refusal(shop, config, override_inputs=[("lib", str(lib))])
        assert message.endswith(f"git -C {lib} add -N new.nix")

    def test_after_git_add_it_is_found(self, shop: Workshop) -> None:
        flake = self.flake(shop)
        refusal(shop, flake)
        git(flake, "add", "-N", "nix/machines/vm.nix")
        assert "can't be built as a VM" in refusal(shop, flake) or "neither" in refusal(shop, flake)


@contextmanager
def deaf_server() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@contextmanager
def empty_server() -> Iterator[int]:
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "reference", ["git+https://nowhere.invalid/a/b", "https://nowhere.invalid/b.tar.gz"]
)
def test_a_remote_flake_without_network(shop: Workshop, reference: str) -> None:
    began = time.monotonic()
    message = refusal(shop, reference)
    assert time.monotonic() - began < 15
    assert f"The flake {reference} can't be fetched: no network, or no such host" in message
    assert "--nixvm-flake=/path/to/it" in message


def test_a_remote_flake_that_is_not_there(shop: Workshop) -> None:
    with empty_server() as port:
        message = refusal(shop, f"http://127.0.0.1:{port}/b.tar.gz")
    assert "there is nothing at this address" in message
    assert f"http://127.0.0.1:{port}/b.tar.gz" in message


def test_a_server_that_does_not_answer(shop: Workshop) -> None:
    with deaf_server() as port:
        began = time.monotonic()
        message = refusal(shop, f"http://127.0.0.1:{port}/b.tar.gz", evaluation_timeout=3)
        assert time.monotonic() - began < 10
    assert "did not end within 3 s" in message
    assert f"http://127.0.0.1:{port}/b.tar.gz" in message


def test_an_input_that_cannot_be_fetched_can_be_overridden(shop: Workshop) -> None:
    flake = write(
        shop.tmp / "f",
        '{ inputs.secrets.url = "git+https://nowhere.invalid/me/secrets"; '
        "outputs = { self, secrets }: { }; }",
    )
    message = refusal(shop, flake)
    assert f"The input secrets of {flake} can't be fetched: no network" in message
    assert "--nixvm-override-input secrets /path/to/it" in message


def test_an_override_for_no_input(shop: Workshop) -> None:
    flake = write(
        shop.tmp / "f",
        '{ inputs.nixpkgs.url = "path:./a"; outputs = { self, nixpkgs }: { }; }',
    )
    write(flake / "a", "{ outputs = { self }: { }; }")
    message = refusal(shop, flake, override_inputs=[("nixpkg", str(flake / "a"))])
    assert "--nixvm-override-input nixpkg: " in message
    assert "has no such input. Did you mean nixpkgs? Its inputs are: nixpkgs." in message
    message = refusal(shop, flake, override_inputs=[("nixpkgs", "./nowhere")])
    assert message.startswith("--nixvm-override-input nixpkgs ./nowhere: There is no ")


def test_a_bad_value_for_a_nix_option(shop: Workshop) -> None:
    flake = write_flake(shop.tmp / "f", machine("vm", "a"), tracked=False)
    shop.options = (*OPTIONS, ("cores", "many"))
    with pytest.raises(SettingsError, match="--nixvm-nix-option cores many: nix says: "):
        shop.flake(flake).machines()


def test_an_unknown_nix_option_is_noted() -> None:
    notes = Nix.find(options=[("sandbx", "false")]).notes
    assert any("lists no option sandbx. Did you mean sandbox" in note for note in notes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_write_permission(shop: Workshop) -> None:
    shop.cache.mkdir()
    shop.cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    flake = write_flake(shop.tmp / "f", machine("vm", "a"), tracked=False)
    with pytest.raises(SettingsError, match="Permission denied"):
        shop.flake(flake).machines()


@pytest.mark.parametrize("place", ["/proc/nixvm", "{}/file/below"])
def test_a_cache_that_cannot_be_made(shop: Workshop, place: str) -> None:
    (shop.tmp / "file").write_text("")
    flake = write_flake(shop.tmp / "f", machine("vm", "a"), tracked=False)
    cache = Path(place.format(shop.tmp))
    with pytest.raises(SettingsError) as caught:
        shop.flake(flake, cache=cache).machines()
    assert f"The cache directory {cache} can't be written: " in str(caught.value)
    assert "--nixvm-cache=DIR" in str(caught.value)


def test_no_nix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("pytest_nixvm.flake.nix._PROFILES", ("~/.nix-profile/bin",))
    with pytest.raises(MissingProgramError, match=r"nix was not found.*apt-get install nix-bin"):
        Nix.find()
    profile = tmp_path / ".nix-profile/bin"
    profile.mkdir(parents=True)
    (profile / "nix").write_text("#!/bin/sh\necho 'nix (Nix) 2.31.1'\n")
    (profile / "nix").chmod(0o755)
    assert Nix.find().version == "2.31.1"
    (profile / "nix").write_text("#!/bin/sh\necho 'nix (Nix) 2.3.16'\n")
    with pytest.raises(MissingProgramError, match=r"is Nix 2\.3\.16; .* need 2\.8 or newer"):
        Nix.find()
    (profile / "nix").write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    with pytest.raises(MissingProgramError, match="--version` failed: broken"):
        Nix.find()
    (profile / "nix").write_text("#!/no/such/shell\n")
    with pytest.raises(MissingProgramError, match="can't be started: No such file"):
        Nix.find()


def test_no_git_where_git_is_needed(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    flake = write_flake(shop.tmp / "f", machine("vm", "a"))
    plain = write_flake(shop.tmp / "g", machine("vm", "a"), tracked=False)
    bin_ = shop.tmp / "bin"
    bin_.mkdir()
    nix = Nix.find(options=OPTIONS)
    for name in ("nix", "nix-store"):
        (bin_ / name).symlink_to(nix.program.parent / name)
    monkeypatch.setenv("PATH", str(bin_))
    with pytest.raises(MissingProgramError, match="git was not found in PATH"):
        shop.flake(flake, nix=nix).machines()
    assert shop.flake(plain, nix=nix).machines()


@pytest.mark.parametrize(
    "said",
    [
        "cp: write error: No space left on device",
        "ERROR: cptofs failed. diskSize might be too small for closure.",
    ],
)
def test_no_space_for_a_builder_may_be_the_disk_s_or_an_image_s(shop: Workshop, said: str) -> None:
    body = machine("vm", shop.host, f'{{ test.build = "echo {said}; exit 1"; }}')
    message = refusal(shop, write_flake(shop.tmp / "f", body, tracked=False))
    assert f"Its log ends so:\n    {said}\nEither the disk here is full" in message
    assert "nix-collect-garbage" in message
    assert "virtualisation.diskSize" in message


def test_a_build_without_end_is_ended(shop: Workshop) -> None:
    body = machine("vm", shop.host, '{ test.build = "sleep 1000"; }')
    message = refusal(shop, write_flake(shop.tmp / "f", body, tracked=False), build_timeout=5)
    assert "did not end within 5 s" in message
    assert f"building nixos-system-{shop.host}" in message


def test_errors_are_of_the_class_that_says_who_has_to_act() -> None:
    assert issubclass(EvaluationError, FlakeError)
    assert issubclass(FlakeError, UserError)
