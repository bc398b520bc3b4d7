from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np

from steer_engine.vectors import report


def heights(picture: str) -> list[float]:
    return [float(rect.attrib["height"]) for rect in ET.fromstring(picture).iter("rect")]


def test_bars_are_in_proportion() -> None:
    one, two, none = heights(report.bars({3: 1.0, 4: 2.0, 5: 0.0}))
    assert two == report.HEIGHT - report.EDGE
    assert one == two / 2
    assert none == 0.0


def test_bars_of_a_given_range_are_cut_at_it() -> None:
    assert heights(report.bars({0: 0.75, 1: 0.2, 2: 3.0}, low=0.5, high=1.0)) == [77.0, 0.0, 154.0]
    assert heights(report.bars({0: 0.0, 1: 0.0})) == [0.0, 0.0]
    assert heights(report.bars({})) == []


def test_a_heat_map_colours_by_sign_and_size() -> None:
    picture = ET.fromstring(report.heatmap(np.array([[1.0, -1.0], [0.0, 0.5]]), [4, 9]))
    assert [rect.attrib["fill"] for rect in picture.iter("rect")] == ["#2166ac", "#b2182b", "#ffffff", "#90b2d6"]
    assert "4, 9: -1.000" in [title.text for title in picture.iter("title")]


def test_histograms_are_shares_of_each_side() -> None:
    positive, negative = np.array([2.0, 2.0, 3.0, 4.0]), np.array([-4.0, 2.0])
    shares, edges = report.histogram_shares(positive, negative)
    assert (edges[0], edges[-1], len(edges)) == (-4.0, 4.0, 25)
    assert [share.sum() for share in shares] == [1.0, 1.0]
    at_two = np.searchsorted(edges, 2.0, side="right") - 1
    assert (shares[0][at_two], shares[1][at_two]) == (0.5, 0.5)
    picture = ET.fromstring(report.histograms(positive, negative))
    assert len(picture.findall(".//rect")) == 48
    titles = [title.text for title in picture.iter("title")]
    assert "negatives from -4 to -3.667: 50.0%" in titles
    ET.fromstring(report.histograms(np.zeros(3), np.zeros(3)))
