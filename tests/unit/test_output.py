"""The output directory: the newest run on top, earlier ones kept, nobody else's files touched."""

from __future__ import annotations

import pytest

from pytest_nixvm.errors import SettingsError
from pytest_nixvm.output import Output


def test_a_second_run_sets_the_first_aside(tmp_path):
    base = tmp_path / "results"
    first = Output.below(base)
    (first.directory("dev-vm-0") / "console.log").write_text("first")
    first.file("timeline.svg").write_text("<svg/>")
    first.close()

    second = Output.below(base)
    (second.directory("dev-vm-0") / "console.log").write_text("second")
    second.close()

    assert (base / "dev-vm-0" / "console.log").read_text() == "second"
    [earlier] = (base / "earlier").iterdir()
    assert (earlier / "dev-vm-0" / "console.log").read_text() == "first"
    assert (earlier / "timeline.svg").exists()


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for _ in range(3):
        output = Output.below(tmp_path)
        output.directory("test_it")
        output.close()

    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert len(list((tmp_path / "earlier").iterdir())) == 2


def test_two_runs_at_once_have_a_directory_each(tmp_path):
    first, second = Output.below(tmp_path), Output.below(tmp_path)

    assert first.path == tmp_path
    assert second.path.parent == tmp_path
    assert second.directory("x") != first.directory("x")


def test_names_that_are_taken_get_a_number(tmp_path):
    output = Output.below(tmp_path)

    assert [output.directory("a").name for _ in range(3)] == ["a", "a-2", "a-3"]


def test_a_place_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(SettingsError, match=r"Can't write to .*--nixvm-output"):
        Output.below(tmp_path / "file" / "results")
