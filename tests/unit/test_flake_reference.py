"""What a user may write for a flake, and what nix is given for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_nixvm.errors import FlakeError
from pytest_nixvm.flake.fingerprint import is_fixed
from pytest_nixvm.flake.reference import FlakeReference, attribute_path, attribute_text, locate

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with a plain flake, a git repository with two, and a link to the latter."""
    tmp_path = tmp_path.resolve()
    for flake in ("plain", "repo", "repo/nix/inner"):
        (tmp_path / flake).mkdir(parents=True)
        (tmp_path / flake / "flake.nix").write_text("{ outputs = { self }: { }; }")
    (tmp_path / "repo/.git").mkdir()
    (tmp_path / "repo/empty").mkdir()
    (tmp_path / "link").symlink_to("repo")
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "url", "local"),
    [
        ("./plain", "path:{}/plain", "plain"),
        ("plain", "path:{}/plain", "plain"),
        ("plain/flake.nix", "path:{}/plain", "plain"),
        ("{}/plain/", "path:{}/plain", "plain"),
        ("path:plain", "path:{}/plain", "plain"),
        ("path:./plain", "path:{}/plain", "plain"),
        ("path:{}/plain", "path:{}/plain", "plain"),
        ("path:./repo?dir=nix/inner", "path:{}/repo?dir=nix/inner", "repo/nix/inner"),
        ("repo", "git+file://{}/repo", "repo"),
        ("link", "git+file://{}/repo", "repo"),
        ("repo/nix/inner", "git+file://{}/repo?dir=nix/inner", "repo/nix/inner"),
        ("./repo?dir=nix/inner", "git+file://{}/repo?dir=nix/inner", "repo/nix/inner"),
        ("git+file:repo", "git+file://{}/repo", "repo"),
        ("git+file:./repo?dir=nix/inner", "git+file://{}/repo?dir=nix/inner", "repo/nix/inner"),
        ("git+file://{}/repo?submodules=1", "git+file://{}/repo?submodules=1", "repo"),
        ("git+file://{}/repo?ref=main", "git+file://{}/repo?ref=main", None),
        ("github:owner/repo/main", "github:owner/repo/main", None),
        ("git+https://example.org/a.git?ref=b", "git+https://example.org/a.git?ref=b", None),
        ("https://example.org/a.tar.gz", "https://example.org/a.tar.gz", None),
        ("nixpkgs", "flake:nixpkgs", None),
        ("nixpkgs/nixos-25.11", "flake:nixpkgs/nixos-25.11", None),
    ],
)
def test_references_are_made_absolute(tree: Path, text: str, url: str, local: str | None) -> None:
    reference = FlakeReference.parse(text.format(tree), tree)
    assert reference.url == url.format(tree)
    assert reference.attribute is None
    assert reference.local == (None if local is None else tree / local)


def test_a_dot_is_the_current_directory(tree: Path) -> None:
    for text in (".", "", "./", "#", ".#"):
        assert FlakeReference.parse(text, tree / "repo").url == f"git+file://{tree}/repo"


def test_names_that_a_url_must_not_hold_are_escaped(tree: Path) -> None:
    (tree / "plain").rename(tree / "a b%ü")
    reference = FlakeReference.parse("a b%ü", tree)
    assert reference.url == f"path:{tree}/a%20b%25%C3%BC"
    assert reference.local == tree / "a b%ü"
    assert FlakeReference.parse(reference.url, tree) == reference


@pytest.mark.parametrize(
    ("fragment", "attribute", "parts"),
    [
        ("dev-vm", "dev-vm", ["dev-vm"]),
        ("nixosConfigurations.a", "nixosConfigurations.a", ["nixosConfigurations", "a"]),
        ('x."a.b".c', 'x."a.b".c', ["x", "a.b", "c"]),
        ("x.%22a.b%22", 'x."a.b"', ["x", "a.b"]),
        (r'"a\"b"', r'"a\"b"', ['a"b']),
    ],
)
def test_the_attribute_follows_the_hash(
    tree: Path, fragment: str, attribute: str, parts: list[str]
) -> None:
    reference = FlakeReference.parse(f"plain#{fragment}", tree)
    assert reference.attribute == attribute
    assert attribute_path(attribute) == parts
    assert attribute_path(attribute_text(parts)) == parts


@pytest.mark.parametrize("bad", ['"a', "a..b", ".", "a.", 'a"b', ""])
def test_a_malformed_attribute_is_refused(bad: str) -> None:
    with pytest.raises(FlakeError, match="is no attribute path"):
        attribute_path(bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("./nowhere", r"There is no .*/nowhere \(\./nowhere\)"),
        ("/nowhere/at/all", "There is no /nowhere/at/all"),
        ("path:nowhere", "path:nowhere: there is no directory .*/nowhere"),
        ("./file", "file is no directory; a flake is a directory with a flake.nix"),
        ("repo/empty", "repo/empty is no flake: there is no flake.nix in it. But .*/repo has one"),
        (".", "is no flake: there is no flake.nix in it.*nixvm init"),
        ("./" + 300 * "a", r"can't be looked at: File name too long\.|There is no .*aaa"),
        ("repo?dir=nope", "There is no directory .*/repo/nope"),
    ],
)
def test_what_is_not_there_is_named(tree: Path, text: str, message: str) -> None:
    with pytest.raises(FlakeError, match=message):
        FlakeReference.parse(text, tree)


def test_an_override_may_be_any_directory(tree: Path) -> None:
    url, local = locate("./repo/empty", tree)
    assert url == f"git+file://{tree}/repo?dir=empty"
    assert local == tree / "repo/empty"


@pytest.mark.parametrize(
    ("url", "fixed"),
    [
        ("github:a/b", False),
        ("github:a/b/main", False),
        (f"github:a/b/{REVISION}", True),
        (f"gitlab:a/b/{REVISION}?dir=x", True),
        (f"git+https://x.org/a?rev={REVISION}", True),
        ("git+https://x.org/a?ref=main", False),
        ("https://x.org/a.tar.gz?narHash=sha256-abc", True),
        ("https://x.org/a.tar.gz", False),
        ("flake:nixpkgs", False),
    ],
)
def test_only_a_revision_or_hash_names_one_content_for_ever(url: str, fixed: bool) -> None:
    assert is_fixed(url) is fixed
