"""The change fixture and --nixvm-from: what is said where there is nothing to switch."""

from __future__ import annotations

import shlex
import shutil

import pytest
from _flake import FLAKE, git, needs_nix
from _project import Project, host, said

pytestmark = needs_nix

TEST = "def test_change(change): change.switch()\n"


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    made = Project(pytester)
    made.write(TEST)
    return made


# --- skipped: a fact about the machine -----------------------------------------------------------


def test_without_a_deployed_generation_it_is_said_how_to_name_one(project: Project):
    project.commit(host("web"))
    text = project.skipped()

    assert "Which generation is deployed? --nixvm-from=REF names it" in text
    assert "HEAD~1, a branch, or a flake reference such as git+file:.?ref=main" in text
    assert "SKIPPED [1] test_it.py:1: Which" in text  # the test's place, not the plugin's
    assert project.built() == []


def test_a_candidate_that_equals_the_base(project: Project):
    project.commit(host("web"))
    project.commit(host("web"))
    text = project.skipped("--nixvm-from=HEAD~1")
    assert "web is the same in both generations: there is nothing to switch to (/nix/store" in text


def test_a_machine_that_is_new(project: Project):
    project.commit(host("db"))
    project.commit(host("db"), host("web"))
    text = project.skipped("--nixvm-from=HEAD~1", "--nixvm-machine=web")
    assert "web is new: HEAD~1 has no such machine" in text
    assert "(It has: db.)" in text


@pytest.mark.parametrize("role", ["deployed", "candidate"])
def test_a_machine_that_can_t_be_switched(project: Project, role: str):
    off = "{ system.switch.enable = false; }"
    project.commit(host("web", "1", off if role == "deployed" else ""))
    project.commit(host("web", "2", off if role == "candidate" else ""))
    text = project.skipped("--nixvm-from=HEAD~1")
    assert f"web can't be switched: system.switch.enable is false in the {role} generation" in text


def test_a_machine_for_another_architecture_is_skipped_as_ever(project: Project):
    pi = 'nixosConfigurations.pi = nixosSystem { modules = [ ]; system = "aarch64-linux"; };'
    project.commit(host("web"), pi)
    text = project.skipped("--nixvm-from=HEAD", "--nixvm-machine=pi")
    assert "it is for aarch64-linux, this machine is x86_64-linux" in text


def test_the_deployed_generation_of_one_machine_is_not_that_of_others(project: Project):
    project.commit(host("web"), host("db"))
    project.commit(host("web"), host("db", "2"))
    text = project.skipped("--nixvm-from=HEAD~1#web")
    assert "--nixvm-from=HEAD~1#web is about web, not db." in text
    assert "web is the same in both generations" in text


# --- mistakes: one message, exit status 4 --------------------------------------------------------


def test_an_unknown_revision(project: Project):
    project.commit(host("web"))
    message = project.mistake("--nixvm-from=mian")
    assert "has no revision mian. Did you mean main?" in message
    assert "first" in message  # the last commits
    assert project.built() == []


def test_a_mistake_with_many_tests_is_told_once(project: Project):
    project.commit(host("web"), host("db"))
    project.write("def test_one(change): pass\ndef test_two(change, vm): pass\n")
    assert project.mistake("--nixvm-from=mian").count("Did you mean main?") == 1
    assert project.mistake("--nixvm-from=mian", "--nixvm-check").count("Did you mean main?") == 1


def test_tests_of_no_change_do_not_care(project: Project):
    project.commit(host("web"))
    project.write("def test_plain(): pass\ndef test_change(change): pass\n")
    done = project.run("--nixvm-from=mian", "-k", "plain")
    assert done.ret == 0, said(done)


def test_a_base_whose_flake_does_not_evaluate(project: Project):
    project.commit(host("web"))
    (project.repository / "flake.nix").write_text(FLAKE.format(body="nixosConfigurations = 1 +;"))
    git(project.repository, "commit", "-q", "-a", "-m", "broken")
    project.edit(host("web"))
    message = project.mistake("--nixvm-from=HEAD")
    assert "The deployed generation, HEAD: " in message
    assert "syntax error" in message


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ('{ test.build = throw "not yet written"; }', "not yet written"),
        ('{ test.build = "echo out of flour; exit 3"; }', "out of flour"),
    ],
)
def test_a_base_whose_machine_can_t_be_built(project: Project, module: str, says: str):
    project.commit(host("web", "1", module))
    project.commit(host("web"))
    message = project.mistake("--nixvm-from=HEAD~1")
    assert says in message
    assert "The deployed generation, HEAD~1: " in message


def test_no_machine_in_common(project: Project):
    project.commit(host("db"), host("mail"))
    project.commit(host("web"))
    message = project.mistake("--nixvm-from=HEAD~1")
    assert "HEAD~1 and" in message
    assert "have no machine in common: HEAD~1 has db, mail." in message
    assert "HEAD~1#NAME" in message


def test_another_architecture(project: Project):
    project.commit(
        'nixosConfigurations.web = nixosSystem { modules = [ ]; system = "aarch64-linux"; };'
    )
    project.commit(host("web"))
    message = project.mistake("--nixvm-from=HEAD~1")
    assert "web is for aarch64-linux in " in message
    assert "a machine can't be switched to another architecture" in message


def test_a_revision_before_there_was_a_flake(project: Project):
    project.commit(host("web"))
    git(project.repository, "rm", "-q", "--cached", "flake.nix")
    git(project.repository, "commit", "-q", "-m", "no flake")
    git(project.repository, "add", "flake.nix")
    assert "has no flake.nix" in project.mistake("--nixvm-from=HEAD")


def test_no_repository(project: Project):
    project.commit(host("web"))
    shutil.rmtree(project.repository / ".git")
    message = project.mistake("--nixvm-from=HEAD~1")
    assert "is not in a git repository, so it has no other revisions" in message


def test_a_flake_that_is_not_there(project: Project):
    project.commit(host("web"))
    assert "nowhere" in project.mistake("--nixvm-from=./nowhere")


def test_which_of_several_machines_had_the_old_name(project: Project):
    project.commit(host("old"))
    project.commit(host("web"), host("db"))
    message = project.mistake("--nixvm-from=HEAD~1#old")
    assert "which machine was called old?" in message
    assert "--nixvm-machine=NAME. There are: db, web." in message


def test_a_name_that_the_base_has_not(project: Project):
    project.commit(host("old"))
    project.commit(host("web"))
    assert "Did you mean old?" in project.mistake("--nixvm-from=HEAD~1#odl")


# --- found: the change is built, and its machine would be booted ---------------------------------


def built(done: pytest.RunResult) -> str:
    """Return what was said by a run that came as far as QEMU: these machines have no kernel."""
    text = said(done)
    assert done.parseoutcomes().keys() <= {"errors", "error", "failed"}, text
    assert "Error: " in text
    assert "skipped" not in text
    return text


def test_a_machine_that_has_got_another_name(project: Project):
    project.commit(host("old"))
    project.commit(host("web"))
    built(project.run("--nixvm-from=HEAD~1#old", flake="config#web"))
    built(project.run("--nixvm-from=HEAD~1#old", "--nixvm-machine=web"))


def test_a_machine_named_by_its_attribute_has_its_name_in_the_base(project: Project):
    project.commit(host("web"), host("db"))
    project.commit(host("web", "2"), host("db"))
    built(project.run("--nixvm-from=HEAD~1", flake="config#web"))
    text = project.skipped("--nixvm-from=HEAD~1", flake="config#db")
    assert "db is the same" in text
    built(project.run("--nixvm-from=HEAD~1#web", flake="config#web"))


def test_the_ini_file_names_the_base(project: Project):
    project.commit(host("web"))
    project.commit(host("web"))
    (project.directory / "main").mkdir()  # a directory that is called as the branch is
    project.ini("nixvm_from = main")
    assert "web is the same in both generations" in project.skipped()


def test_a_reference_names_the_base(project: Project):
    project.commit(host("web"))
    project.commit(host("web"))
    text = project.skipped("--nixvm-from=git+file:./config?ref=main")
    assert "web is the same in both generations" in text
    text = project.skipped("--nixvm-from=./config")
    assert "web is the same in both generations" in text


# --- what was built of a configuration, without that ---------------------------------------------

BARE = """
packages.x86_64-linux.bare = derivation {{
  name = "nixos-vm"; system = "x86_64-linux"; builder = "/bin/sh";
  args = [ "-ec" "PATH=/run/current-system/sw/bin:/usr/bin:/bin
    mkdir -p $out/bin {link}; echo {number} > $out/bin/run-bare-vm" ];
}};
"""


@pytest.mark.parametrize("link", ["", "$out/system"])
def test_a_bare_derivation_can_t_be_switched(project: Project, link: str):
    project.commit(BARE.format(link=link, number=1))
    project.commit(BARE.format(link=link, number=2))
    message = project.mistake("--nixvm-from=HEAD~1", flake="config#packages.x86_64-linux.bare")
    if link:
        assert "bare can't be switched to another system in a VM" in message
        assert "nixosConfigurations.NAME" in message
    else:
        assert "has no link to its system" in message


# --- xdist ---------------------------------------------------------------------------------------


def test_mistakes_and_skips_with_workers(project: Project):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    project.commit(host("web"))
    project.commit(host("web"))
    message = project.mistake("--nixvm-from=mian", "-n", "2", apart=True)
    assert "Did you mean main?" in message
    done = project.run("--nixvm-from=HEAD~1", "-n", "2", apart=True)
    assert done.parseoutcomes() == {"skipped": 1}
    assert "web is the same in both generations" in said(done)


# --- how it is run again -------------------------------------------------------------------------


def test_the_command_that_runs_it_again_has_both_generations(project: Project):
    project.commit(host("web"))
    project.write(
        "from pytest_nixvm.report import reproduce\n"
        "from pytest_nixvm.run import RUN\n"
        "def test_it(pytestconfig):\n"
        "    settings = pytestconfig.stash[RUN].settings\n"
        "    print('AGAIN', reproduce.command(pytestconfig, settings, 'nixvm::web::switch'))\n"
    )
    done = project.run(
        "-s", "--nixvm-from=HEAD~1#old web", "--nixvm-boot-loader",
        "--nixvm-check-off=web: ports: it's a toy",
    )  # fmt: skip
    [line] = [line for line in done.outlines if "AGAIN" in line]
    words = shlex.split(line.partition("AGAIN ")[2])
    assert {
        f"--nixvm-flake={project.repository}",
        "--nixvm-from=HEAD~1#old web",
        "--nixvm-boot-loader",
        "--nixvm-check-off=web: ports: it's a toy",
    } <= set(words)
    assert words[-1] == "nixvm::web::switch"
