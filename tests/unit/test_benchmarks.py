"""The parts of the benchmarks that only calculate and draw."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
pytest.importorskip("benchmarks", reason="a source archive has none")

from benchmarks import plot
from benchmarks.figures import Figure, fit, table
from benchmarks.side_by_side import Contender, measure


def cells(figure: Figure) -> list[str]:
    return [str(next(iter(column.cells))) for column in table("t", [figure]).columns]


def test_a_line_is_found_again():
    line = fit([(x, 0.25 * x + 3) for x in (1, 64, 256)])
    assert (line.slope, line.intercept, line.r2) == pytest.approx((0.25, 3, 1))


def test_what_is_not_linear_is_seen():
    assert fit([(1, 1), (64, 64**2), (256, 256**2)]).r2 < 0.99


def test_a_line_needs_two_places():
    with pytest.raises(ValueError, match="two different x"):
        fit([(1, 1), (1, 2)])


@pytest.mark.parametrize(
    ("value", "least", "met"), [(49, False, True), (51, False, False), (51, True, True)]
)
def test_a_goal_is_met_or_not(value, least, met):
    figure = Figure("wait", [value], goal=50, least=least)
    assert figure.met is met
    assert cells(figure)[5] == f"{'≥' if least else '≤'} 50 {'✓' if met else '✗'}"


def test_a_figure_stands_beside_its_limit():
    shown = cells(Figure("wait", [10, 30, 20], limit=8, limit_name="QEMU alone"))
    assert shown == ["wait", "20.0 ms", "10.0", "30.0", "3", "", "8.0", "2.5", "QEMU alone"]


def test_json_has_all_of_it():
    told = Figure("wait", [1, 3], goal=4, limit=1).to_json()
    assert (told["median"], told["met"], told["samples"]) == (2, True, [1, 3])


def test_slow_contenders_take_part_in_some_rounds_and_setting_up_is_not_timed():
    calls: list[str] = []
    quick = Contender("quick", lambda: calls.append("quick"))
    slow = Contender(
        "slow",
        lambda: calls.append("slow"),
        before=lambda: calls.append("before"),
        after=lambda: calls.append("after"),
        every=2,
    )
    measure([quick, slow], 3, warm_up=1)
    turn = ["quick", "before", "slow", "after"]
    assert calls == ["quick", *turn, "quick", *turn]
    assert (len(quick.seconds), len(slow.seconds)) == (3, 2)


def test_the_plot_is_a_picture_with_a_bar_for_each():
    picture = plot.bars("A <b>", [("ours", 0.05, True), ("others", 12.0, False)])
    root = ElementTree.fromstring(picture)
    name = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in root.iter(f"{name}text")]
    assert {"A <b>", "ours", "50 ms", "others", "12 s", "10 ms", "100 s"} <= set(texts)
    first, second = (float(each.get("width", 0)) for each in list(root.iter(f"{name}rect"))[1:])
    room = plot.WIDTH - plot.LABEL - plot.VALUE
    assert 0 < first < second < room
