"""Which tests run on a machine's image: markers, --nixvm-machine, the flake's reference."""

from __future__ import annotations

import pytest
from _flake import needs_nix
from _project import Project, host, said

pytestmark = needs_nix

TESTS = """
import pytest

def test_any(vm): pass

@pytest.mark.nixvm("web")
def test_web(vm): pass

@pytest.mark.nixvm("web@ova")
def test_image(vm): pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    made = Project(pytester)
    made.write(TESTS)
    made.commit(host("web"), host("db"))
    return made


def test_images_are_tested_where_they_are_named(project: Project) -> None:
    assert sorted(project.collected()) == [
        "test_any[db]",
        "test_any[web]",
        "test_image[web@ova]",
        "test_web[web]",
    ]


def test_a_machine_s_tests_run_on_the_image_that_was_selected(project: Project) -> None:
    assert sorted(project.collected("--nixvm-machine=web@qcow2")) == [
        "test_any[web@qcow2]",
        "test_web[web@qcow2]",
    ]
    assert sorted(project.collected("--nixvm-machine=web", "--nixvm-machine=web@ova")) == [
        "test_any[web@ova]",
        "test_any[web]",
        "test_image[web@ova]",
        "test_web[web@ova]",
        "test_web[web]",
    ]
    assert sorted(project.collected("--nixvm-machine=*@iso")) == [
        "test_any[db@iso]",
        "test_any[web@iso]",
        "test_web[web@iso]",
    ]


def test_an_image_changes_with_its_machine(project: Project) -> None:
    assert "test_image[web@ova]" not in project.collected("--nixvm-changed=HEAD")
    project.commit(host("web", "2"), host("db"))
    assert sorted(project.collected("--nixvm-changed=HEAD~1")) == [
        "test_any[web]",
        "test_image[web@ova]",
        "test_web[web]",
    ]


def test_a_change_of_an_image_is_no_mistake(project: Project) -> None:
    project.write("def test_change(change): pass\n")
    done = project.run("--nixvm-from=HEAD", flake="config#web@qcow2")
    assert "no machine in common" not in said(done)
    assert "web@qcow2 is an image: a change" in said(done)


def test_a_reference_may_name_an_image(project: Project) -> None:
    project.write(TESTS.replace('"web@ova"', '"web@qcow2"'))
    assert sorted(project.collected(flake="config#web@qcow2")) == [
        "test_any[web@qcow2]",
        "test_image[web@qcow2]",
        "test_web[web@qcow2]",
    ]


def test_checks_are_for_images_too(project: Project) -> None:
    checks = project.collected("--nixvm-check", "--nixvm-machine=db@qcow2")
    assert "nixvm::db@qcow2::boots" in checks
    assert project.collected("nixvm::db@qcow2::boots") == ["nixvm::db@qcow2::boots"]
    assert "'floppy'" in project.mistake("nixvm::db@floppy")
    assert "no check nixvm::dc@qcow2" in project.mistake("nixvm::dc@qcow2")


@pytest.mark.parametrize("apart", [False, True], ids=["alone", "xdist"])
def test_a_flake_without_images_is_one_message(project: Project, apart: bool) -> None:
    more = ("-n", "1") if apart else ()
    text = project.mistake("--nixvm-machine=web@qcow2", *more, apart=apart)
    assert "There are no images of nixosConfigurations.web" in text
    assert "older than 25.05" in text
    # So it is where only a test names it.
    assert "There are no images of" in project.mistake("-k", "test_image", *more, apart=apart)


@pytest.mark.parametrize("apart", [False, True], ids=["alone", "xdist"])
def test_a_format_that_is_none_is_one_message(project: Project, apart: bool) -> None:
    more = ("-n", "1") if apart else ()
    text = project.mistake("--nixvm-machine=web@qcow", *more, apart=apart)
    assert "'qcow' that could be booted. Did you mean qcow2" in text
    project.write(TESTS.replace("web@ova", "web@floppy"))
    text = project.mistake(*more, apart=apart)
    assert "web@floppy: there is no image format 'floppy'" in text
    assert "There are: qcow2, raw, iso, ova" in text


def test_a_machine_that_is_none_is_one_message(project: Project) -> None:
    assert "matches no machine" in project.mistake("--nixvm-machine=wep@qcow2")
    project.write(TESTS.replace("web@ova", "wep@ova"))
    assert "names 'wep@ova', which is no machine" in project.mistake()
