from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from ggft.training.page import chart


def test_charts_are_well_formed_whatever_the_points() -> None:
    for line in ([(1, 2.0)], [(1, 0.0), (2, 0.0)], [(i, i % 7) for i in range(10_000)]):
        tree = ElementTree.fromstring(chart([("a", "--a", line), ("b & c", "--b", line)]))
        points = tree.findall("polyline")[0].attrib["points"].split()
        assert 1 <= len(points) <= 801
        for point in points:
            x, y = map(float, point.split(","))
            assert 0 <= x <= 800
            assert 0 <= y <= 240
    assert "no data" in chart([("a", "--a", [])])


@pytest.mark.parametrize(
    ("largest", "labels"),
    [
        (4.57, ["0", "2", "4", "6", "0", "step", "9"]),
        (0.001, ["0", "2.5e-4", "5e-4", "7.5e-4", "1e-3", "0", "step", "9"]),
        (142.0, ["0", "50", "100", "150", "0", "step", "9"]),
        (0.0, ["0", "0.25", "0.5", "0.75", "1", "0", "step", "9"]),
    ],
)
def test_axes_have_round_numbers(largest: float, labels: list[str]) -> None:
    tree = ElementTree.fromstring(chart([("a", "--a", [(0, 0.0), (9, largest)])]))
    assert [text.text for text in tree.findall("text")] == labels


def test_a_single_point_is_seen() -> None:
    tree = ElementTree.fromstring(chart([("a", "--a", [(1, 2.0)])]))
    assert len(tree.findall("circle")) == 1


def test_what_has_no_place_is_left_out() -> None:
    line = [(1, 2.0), (2, math.nan), (3, math.inf), (4, -1.0), (5, 1.0)]
    (path,) = ElementTree.fromstring(chart([("a", "--a", line)])).findall("polyline")
    assert len(path.attrib["points"].split()) == 2
    assert "no data" in chart([("a", "--a", [(1, math.nan)])])
