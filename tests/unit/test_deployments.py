"""Two generations of a machine, on real nix and tiny flakes: what is built, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from _flake import FLAKE, OPTIONS, git, needs_nix, write_flake
from _project import host

from pytest_nixvm.deployments import Deployments
from pytest_nixvm.errors import BuildError, ChangeError, NothingToTestError
from pytest_nixvm.fleet import Fleet
from pytest_nixvm.settings import Generations, Settings

pytestmark = needs_nix

BROKEN = '{ test.build = "echo out of flour; exit 3"; }'


class Config:
    """A flake in git; each commit is a list of machines."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "config"
        self.cache = directory / "cache"

    def commit(self, *machines: str) -> None:
        if not self.path.exists():
            write_flake(self.path, "".join(machines))
            return
        (self.path / "flake.nix").write_text(FLAKE.format(body="".join(machines)))
        git(self.path, "commit", "-q", "--allow-empty", "-a", "-m", "next")

    def settings(self, attribute: str = "", **more: object) -> Settings:
        return Settings.make(
            flake=f"{self.path}{attribute}", cache=str(self.cache), nix_option=OPTIONS, **more
        )

    def deployments(self, attribute: str = "", **more: object) -> Deployments:
        return Deployments(self.settings(attribute, **more))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path)


def test_the_deployed_generation_carries_the_candidate_and_back(config: Config):
    config.commit(host("web", "1"))
    config.commit(host("web", "2"))
    found = config.deployments(from_="HEAD~1")
    generations = found.generations()
    assert generations is not None

    base = found.build("web", generations=generations)
    candidate = found.candidate("web", found.under_test, base, boot_loader=False)

    assert base.toplevel is not None
    assert base.toplevel != candidate.toplevel
    assert base.carries == (candidate.toplevel,)
    assert candidate.carries == (base.toplevel,)
    assert found.build("web", generations=generations) is base
    # Neither is what a test without a change gets, which carries nothing.
    assert found.build("web").carries == ()


def test_the_generations_are_those_of_the_settings(config: Config):
    config.commit(host("web"))
    assert config.deployments().generations() is None
    found = config.deployments(from_="HEAD~1")
    assert found.generations() == Generations.of("HEAD~1", str(config.path))


def test_several_candidates_are_beside_each_other(config: Config):
    config.commit(host("web", "1"))
    config.commit(host("web", "2"))
    config.commit(host("web", "3"))
    found = config.deployments()
    generations = Generations.of("HEAD~2", "HEAD~1", str(config.path))

    base = found.build("web", generations=generations)

    assert len(base.carries) == 2
    for reference in generations.candidates:
        build = found.candidate("web", reference, base, boot_loader=False)
        assert build.toplevel in base.carries


def test_of_several_candidates_one_may_be_the_base(config: Config):
    config.commit(host("web", "1"))
    config.commit(host("web", "1"))
    config.commit(host("web", "2"))
    found = config.deployments()
    base = found.build("web", generations=Generations.of("HEAD~2", "HEAD~1", str(config.path)))

    assert found.candidate("web", str(config.path), base, boot_loader=False).toplevel
    with pytest.raises(NothingToTestError, match="web is the same in both generations"):
        found.candidate("web", "HEAD~1", base, boot_loader=False)


def test_a_candidate_that_can_t_be_built_is_named(config: Config):
    config.commit(host("web", "1"))
    config.commit(host("web", "2", BROKEN))
    found = config.deployments(from_="HEAD~1")
    with pytest.raises(BuildError, match="out of flour") as caught:
        found.build("web", generations=found.generations())
    assert "deployed generation" not in str(caught.value)


def test_a_change_of_the_api_needs_a_base_and_boots_nothing_for_a_mistake(config: Config):
    config.commit(host("web", "1"), host("db", "1"))
    config.commit(host("web", "1"), host("db", "2"))
    with Fleet(config.settings()) as fleet:
        with pytest.raises(ChangeError, match="--nixvm-from=REF names it"):
            fleet.change("web")
        with pytest.raises(NothingToTestError, match="web is the same in both generations"):
            fleet.change("web", base="HEAD~1")
        with pytest.raises(ChangeError, match="Did you mean main"):
            fleet.change("web", base="mian")
        with pytest.raises(ChangeError, match="Did you mean main"):
            fleet.change("web", base="main", candidate="mian")
        with pytest.raises(ChangeError, match=r"has no machine wbe\. Did you mean web"):
            fleet.change("wbe", base="HEAD~1")
        assert fleet.started == []


def test_names_behind_the_hash_sign(config: Config):
    """With several machines, one of which has another name in the base."""
    config.commit(host("old", "1"), host("db", "1"))
    config.commit(host("web", "1"), host("db", "1"))
    # Asked for by its name: nothing is ambiguous.
    found = config.deployments()
    base = found.build("web", generations=Generations.of("HEAD~1#old", str(config.path)))
    assert base.name == "old"
    # By --nixvm-from for every machine: it is.
    found = config.deployments(from_="HEAD~1#old")
    with pytest.raises(ChangeError, match="which machine was called old"):
        found.check_base("web")
    config.deployments(from_="HEAD~1#old", machine=("web",)).check_base("web")
    config.deployments("#web", from_="HEAD~1#old").check_base("web")
    config.deployments(from_="HEAD~1#db").check_base("web")  # nothing to test: no mistake


def test_a_base_is_looked_at_without_a_build(config: Config):
    config.commit(host("web", "1", BROKEN))
    config.commit(host("web"), host("new"))
    found = config.deployments(from_="HEAD~1")
    found.check_base("web")
    found.check_base("new")
    config.deployments().check_base("web")  # without one
    assert not list((config.cache / "roots").glob("*"))
