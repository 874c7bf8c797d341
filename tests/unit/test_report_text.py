"""What reports are made of, without a VM: names, escaping, pictures, the words for a person."""

from __future__ import annotations

import shlex
import xml.etree.ElementTree as ElementTree

import pytest

from pytest_nixvm.progress import Silent
from pytest_nixvm.report import github
from pytest_nixvm.report.account import Account
from pytest_nixvm.report.cases import LONGEST, slug
from pytest_nixvm.report.evidence import _failed, _since, render, said_by
from pytest_nixvm.report.timeline import Recorded, Span, Timeline
from pytest_nixvm.transcript import Transcript

SVG = "{http://www.w3.org/2000/svg}"


# --- folders ---


@pytest.mark.parametrize(
    ("nodeid", "name"),
    [
        ("tests/test_web.py::test_up[dev-vm]", "test_web-test_up-dev-vm"),
        ("test_a.py::TestX::test_y", "test_a-TestX-test_y"),
        ("test_a.py::test[../../etc/passwd]", "test_a-test-..-..-etc-passwd"),
        ("test_a.py::test[a b\n\0;$(x)]", "test_a-test-a-b-x"),
        ("test_a.py::test[\u00fc]", "test_a-test"),
    ],
)
def test_a_folder_is_named_after_its_test(nodeid, name):
    assert slug(nodeid) == name


def test_a_folders_name_is_never_long_empty_or_hidden():
    assert len(slug("test_a.py::test[" + "x" * 500 + "]")) <= LONGEST
    assert slug("::") != ""
    assert not slug("test_a.py::test").startswith(".")
    assert slug("\u00fc") == "test"


# --- GitHub ---


def test_an_annotation_is_one_command_whatever_the_test_says():
    line = github.annotation(
        github.Failure("a.py::t[x,y:z]", "a,b.py", 7, "100% wrong\r\n::error::forged")
    )

    assert line == (
        "::error file=a%2Cb.py,line=7,title=a.py%3A%3At[x%2Cy%3Az]::"
        "100%25 wrong%0D%0A::error::forged"
    )
    assert "\n" not in line


def test_the_summary_has_a_row_for_each_failure_and_each_boot(tmp_path):
    booted = [
        {"name": "dev-vm", "accelerator": "tcg", "boots": [9.04], "failed_units": ["a.service"]}
    ]
    account = Account(
        booted=booted, cloned={"dev-vm": [0.2, 0.3]}, overrides={"dev-vm": [], "web|1": []}
    )
    text = github.summary(
        [github.Failure("a.py::t[a|b]", "a.py", 1, "x | y\nz", "/out")], account, 3
    )

    assert "1 failed" in text
    assert "| `a.py::t[a\\|b]` | x \\| y z | `/out` |" in text
    assert "3 tests passed; machines: dev-vm, web\\|1" in text
    assert "| dev-vm | tcg | 9.0 s | a.service |" in text
    assert "| dev-vm | 2 clones | | |" in text
    file = tmp_path / "summary.md"
    file.write_text("an earlier step\n")
    github.write_summary(text, {"GITHUB_STEP_SUMMARY": str(file)})
    assert file.read_text() == "an earlier step\n" + text
    github.write_summary(text, {})  # no workflow: nothing to do


# --- the timeline ---


def test_the_picture_is_svg_with_a_bar_for_each_span():
    timeline = Timeline()
    timeline.add(Span("Booting", 'Booting <dev> & "co"', 1000.0, 20.0))
    timeline.add(Span("test", "test_x", 1020.0, 5.0, ok=False))

    picture = ElementTree.fromstring(timeline.svg())

    bars = [group.find(f"{SVG}rect") for group in picture.iter(f"{SVG}g")]
    titles = [title.text for title in picture.iter(f"{SVG}title")]
    assert titles == ['Booting <dev> & "co": 20.00 s', "test_x: 5.00 s, failed"]
    widths = [float(bar.get("width")) for bar in bars if bar is not None]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    ends = [float(b.get("x")) + float(b.get("width")) for b in bars if b is not None]
    assert max(ends) <= float(picture.get("width") or 0)


def test_a_session_without_steps_has_no_picture():
    assert Timeline().svg() == ""


def test_steps_are_recorded_and_reach_another_process():
    here, there = Timeline(), Timeline()
    progress = Recorded(Silent(), here)
    progress.step("Booting dev-vm").finish("running")
    progress.step("Building web").fail("no")

    there.hear(here.told())

    assert [(s.kind, s.title, s.ok) for s in there.spans] == [
        ("Booting", "Booting dev-vm", True),
        ("Building", "Building web", False),
    ]


# --- evidence ---


def test_failed_units_are_read_from_systemds_table():
    table = (
        "  UNIT           LOAD   ACTIVE SUB    DESCRIPTION\n"
        "\u25cf planted.service loaded failed failed sh -c exit 3\n"
        "* other.timer loaded failed failed x\n"
        "\n2 loaded units listed.\n"
    )
    assert _failed(table) == ["planted.service", "other.timer"]
    assert _failed("0 loaded units listed.\n") == []


def test_a_failed_unit_is_shown_with_its_last_words():
    units = (
        "  UNIT LOAD ACTIVE SUB DESCRIPTION\n● a.service loaded failed failed a - b\n\n"
        "× a.service - what it is\n     Loaded: loaded\n\n"
        "Nov 24 vm sh[1]: one\nNov 24 vm sh[1]: two\n"
        "Nov 24 vm systemd[1]: a.service: Start request repeated too quickly.\n\n"
        "× aa.service - another\n     Loaded: loaded\n\n"
        "× c.service - a third\n     Loaded: loaded\n\nNov 24 vm systemd[1]: c.service: Failed.\n"
    )
    assert said_by(units, "a.service") == ["Nov 24 vm sh[1]: one", "Nov 24 vm sh[1]: two"]
    assert said_by(units, "aa.service") == []
    assert said_by(units, "b.service") == []
    assert said_by(units, "c.service") == ["Nov 24 vm systemd[1]: c.service: Failed."]


def test_the_journal_begins_with_the_test():
    text = (
        "[    1.000000] vm a: one\n  more\n[   12.500000] vm b: two\n  of two\n[   13.0] vm c: x\n"
    )

    assert "".join(_since(text, 12.5)) == text[text.index("[   12.5") :]
    assert _since(text, 99.0) == []


def test_a_command_is_rendered_with_its_channel_outcome_and_output():
    transcript = Transcript()
    with transcript.note("command", "echo hi", channel="shell") as entry:
        entry.outcome = "exit status 0"
        entry.output("hi\n", "")
    text = render(transcript.entries[0])

    assert "command [shell] echo hi" in text
    assert "-> exit status 0, 0.00 s" in text
    assert text.endswith("stdout:\n              hi")


def test_the_command_that_reproduces_a_test_is_one_that_a_shell_takes(pytester):
    pytester.makepyfile(
        """
        from pytest_nixvm.report import reproduce
        from pytest_nixvm.run import RUN

        def test_it(pytestconfig):
            settings = pytestconfig.stash[RUN].settings
            print("AGAIN", reproduce.command(pytestconfig, settings, "test_a.py::test[it's $x]"))
        """
    )
    done = pytester.runpytest_inprocess(
        "-s", "--nixvm-flake=github:a/b", "--nixvm-machine=dev-*", "--nixvm-memory=512",
        "--nixvm-nix-option", "substituters", "", "--nixvm-offline",
    )  # fmt: skip
    [line] = [line for line in done.outlines if "AGAIN" in line]
    words = shlex.split(line.partition("AGAIN ")[2])

    assert words[:3] == ["cd", str(pytester.path), "&&"]
    assert words[-1] == "test_a.py::test[it's $x]"
    assert {"--nixvm-flake=github:a/b", "--nixvm-machine=dev-*", "--nixvm-memory=512"} < set(words)
    at = words.index("--nixvm-nix-option")
    assert words[at : at + 3] == ["--nixvm-nix-option", "substituters", ""]
    assert "--nixvm-offline" in words
