"""The deployed generation by its revision: real git, and real nix where it has to agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from _flake import Workshop, git, machine, needs_nix, write_flake

from pytest_nixvm.errors import ChangeError, FlakeError
from pytest_nixvm.flake import FlakeReference
from pytest_nixvm.flake.revision import base_reference


def commit(repository: Path, message: str) -> str:
    git(repository, "add", ".")
    git(repository, "commit", "-q", "--allow-empty", "-m", message)
    return git(repository, "rev-parse", "HEAD")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Make a flake with three commits: main, the tag v1 on the first, a branch `old/one`."""
    flake = tmp_path / "config"
    flake.mkdir()
    git(flake, "init", "-q", "-b", "main")
    for number in (1, 2, 3):
        (flake / "flake.nix").write_text(f"{{ outputs = _: {{ number = {number}; }}; }}")
        commit(flake, f"number {number}")
    git(flake, "tag", "-a", "-m", "release", "v1", "HEAD~2")
    git(flake, "branch", "old/one", "HEAD~1")
    return flake


def base(text: str, flake: Path | str) -> FlakeReference:
    cwd = flake if isinstance(flake, Path) else Path("/")
    return base_reference(text, FlakeReference.parse(str(flake), cwd), cwd)


@pytest.mark.parametrize(
    ("text", "commit"),
    [
        ("HEAD", "main"),
        ("HEAD~1", "main~1"),
        ("HEAD^^", "main~2"),
        ("main", "main"),
        ("v1", "main~2"),
        ("old/one", "main~1"),
        ("main@{0}", "main"),
        ("main^{/number 2}", "main~1"),
    ],
)
def test_a_revision_is_the_same_flake_there(config: Path, text: str, commit: str) -> None:
    found = base(text, config)
    assert found.url == f"git+file://{config}?rev={git(config, 'rev-parse', commit)}"
    assert found.local is None
    assert found.attribute is None


def test_a_short_commit_is_made_whole(config: Path) -> None:
    whole = git(config, "rev-parse", "main~1")
    assert base(whole[:8], config).url.endswith(f"rev={whole}")
    assert base(whole, config).url.endswith(f"rev={whole}")


def test_a_flake_in_a_folder_is_found_in_that_folder(config: Path) -> None:
    inner = config / "hosts/a b"
    inner.mkdir(parents=True)
    (inner / "flake.nix").write_text("{ outputs = _: { }; }")
    revision = commit(config, "inner")
    assert base("HEAD", inner).url == f"git+file://{config}?dir=hosts/a%20b&rev={revision}"
    with pytest.raises(ChangeError) as caught:
        base("HEAD~1", inner)
    assert "HEAD~1 (" in str(caught.value)
    assert '"number 3") has no hosts/a b/flake.nix' in str(caught.value)


def test_a_path_reference_in_a_repository_has_its_revisions(config: Path) -> None:
    candidate = FlakeReference.parse(f"path:{config}", config)
    assert base_reference("v1", candidate, config).url.startswith(f"git+file://{config}?rev=")


def test_a_directory_with_a_flake_wins_over_a_branch_and_one_without_does_not(
    config: Path,
) -> None:
    for name, content in (("other", "{ outputs = _: { }; }"), ("plain", None)):
        git(config, "branch", name, "v1")
        (config / name).mkdir()
        if content:
            (config / name / "flake.nix").write_text(content)
    assert base("other", config).url == f"git+file://{config}?dir=other"
    assert "rev=" in base("plain", config).url
    with pytest.raises(FlakeError, match=r"plain is no flake"):
        base("./plain", config)


@pytest.mark.parametrize("name", ["v1", "main~2", "old/one~1", "refs/tags/v1"])
def test_a_whole_reference_takes_any_name_that_git_takes(config: Path, name: str) -> None:
    revision = git(config, "rev-parse", "v1^{commit}")
    assert base(f"git+file:.?ref={name}", config).url == f"git+file://{config}?rev={revision}"
    with pytest.raises(ChangeError, match=r"^git\+file:\.\?ref=nowhere: .* no revision nowhere"):
        base("git+file:.?ref=nowhere", config)


def test_a_machine_may_have_had_another_name(config: Path) -> None:
    assert base("HEAD~1#old-name", config).attribute == "old-name"
    for attribute, kept in (
        ("dev-vm", None),
        ("nixosConfigurations.dev-vm", None),
        ("hosts.inner", "hosts.inner"),
    ):
        candidate = FlakeReference.parse(f"{config}#{attribute}", config)
        assert base_reference("HEAD~1", candidate, config).attribute == kept


@pytest.mark.parametrize(
    ("candidate", "text", "url"),
    [
        ("github:me/config", "main", "github:me/config/main"),
        ("github:me/config/v2?dir=nix", "v1", "github:me/config/v1?dir=nix"),
        (f"gitlab:me/config?rev={'a' * 40}", "feature/x", "gitlab:me/config/feature/x"),
        ("git+https://x.org/a?ref=main", "v1", "git+https://x.org/a?ref=v1"),
        ("git+ssh://git@x.org/a", "b" * 40, f"git+ssh://git@x.org/a?rev={'b' * 40}"),
        ("flake:config", "v1", "flake:config/v1"),
        ("github:me/config", "github:me/config/v1#vm", "github:me/config/v1"),
    ],
)
def test_a_remote_flake_at_another_revision(candidate: str, text: str, url: str) -> None:
    assert base(text, candidate).url == url


@pytest.mark.parametrize(
    ("candidate", "text", "message"),
    [
        ("github:me/config", "HEAD~1", "name a branch, a tag or a commit"),
        ("https://x.org/a.tar.gz", "v1", "has no revisions"),
    ],
)
def test_what_a_remote_flake_can_not_say(candidate: str, text: str, message: str) -> None:
    with pytest.raises(ChangeError, match=message):
        base(text, candidate)


def test_a_revision_that_is_none_is_one_message_with_what_there_is(config: Path) -> None:
    with pytest.raises(ChangeError) as caught:
        base("mian", config)
    text = str(caught.value)
    assert f"{config} has no revision mian. Did you mean main?" in text
    assert "Its last commits:\n    " in text
    assert "number 3" in text
    with pytest.raises(ChangeError, match=r"Its branches and tags: main, old/one, v1\."):
        base("HEAD~9", config)


def test_a_branch_that_only_the_remote_has_is_named(config: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(config), str(clone))
    with pytest.raises(ChangeError, match=r"Did you mean origin/old/one\?"):
        base("one", clone)
    assert "rev=" in base("origin/old/one", clone).url


def test_a_shallow_clone_says_how_to_get_the_rest(config: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "2", f"file://{config}", str(clone))
    with pytest.raises(ChangeError) as caught:
        base("HEAD~2", clone)
    text = str(caught.value)
    assert "shallow clone with 2 of its commits" in text
    assert "git fetch --unshallow" in text
    assert "fetch-depth: 0" in text


@pytest.mark.parametrize("text", ["", "-x", "#vm", "--help"])
def test_no_revision_at_all(config: Path, text: str) -> None:
    with pytest.raises(ChangeError, match="is no revision"):
        base(text, config)


def test_no_repository_and_no_commits(tmp_path: Path) -> None:
    flake = write_flake(tmp_path / "config", "", tracked=False)
    with pytest.raises(ChangeError, match=r"config is not in a git repository"):
        base("HEAD~1", flake)
    git(flake, "init", "-q", "-b", "main")
    with pytest.raises(ChangeError, match=r"has no commits yet"):
        base("HEAD", flake)


@needs_nix
@pytest.mark.parametrize("depth", [None, "2"])
def test_nix_reads_the_old_revision_and_the_new_one(tmp_path: Path, depth: str | None) -> None:
    shop = Workshop(tmp_path)
    flake = write_flake(shop.tmp / "config", machine("vm", "old-name"))
    text = (flake / "flake.nix").read_text()
    (flake / "flake.nix").write_text(text.replace("old-name", "new-name"))
    commit(flake, "renamed")
    if depth:
        commit(flake, "nothing")
        git(tmp_path, "clone", "-q", "--depth", depth, f"file://{flake}", str(tmp_path / "clone"))
        flake = tmp_path / "clone"
        assert "shallow=1" in base("HEAD~1", flake).url
    new = shop.flake(flake)
    old = shop.flake(flake, reference=base("HEAD" if depth else "HEAD~1", flake))
    assert "new-name" in new.real_toplevel("vm")
    assert ("new-name" if depth else "old-name") in old.real_toplevel("vm")
    assert old.real_toplevel("vm") == old.real_toplevel("vm")
