"""The HTML report and its SVG figures."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector
from steer_engine.vectors.report import (
    EDGE,
    HEIGHT,
    bars,
    block_cosines,
    cosine_by_block,
    heatmap,
    histogram_shares,
    histograms,
    html_report,
)


def body(page: str) -> ET.Element:
    """The page as XML. From <h1> on it is valid XML: every tag is closed and every text escaped."""
    return ET.fromstring("<page>" + page.partition("</style>")[2].replace("</html>", "</page>"))


def test_the_page_has_a_row_per_block_and_its_figures(vector: ControlVector) -> None:
    page = html_report({"cheerful": vector})
    root = body(page)
    assert [h.text for h in root.iter("h2")] == ["cheerful"]
    rows = [[cell.text or "" for cell in row] for row in root.iter("tr")]
    norm = vector.norms[2]
    assert rows[1] == ["2", f"{norm:.4g}", "10.5", f"{norm / 10.5:.1%}", "1.000", ""]
    assert rows[3][0] == "7"
    assert rows[3][4:] == ["", "25.0%"]  # the separation is unknown
    assert len(list(root.iter("figure"))) == 4
    assert len(list(root.iter("rect"))) == 3 + 3 + 2 + 9
    for foreign in ("<script", "http:", "https:", "url("):
        assert foreign not in page


def test_unknown_values_are_left_out() -> None:
    page = html_report({"bare": ControlVector(directions={0: np.zeros(3)})})
    assert len(list(body(page).iter("figure"))) == 2
    assert "no suggestion can be made" in page


def test_text_of_files_is_escaped(vector: ControlVector) -> None:
    evil = "<script>alert(1)</script>&\"'"
    hostile = vector.with_metadata(model=evil, notes=evil, method=evil, created_with={evil: evil})
    page = html_report({evil: hostile, "b": hostile})
    assert "<script" not in page
    body(page)


def test_several_vectors_are_compared_by_block(vector: ControlVector) -> None:
    page = html_report({"a": vector, "b": -vector.restrict([3]), "c": vector})
    rows = [[cell.text or "" for cell in row] for row in list(body(page).iter("table"))[-1]]
    assert rows[0] == ["block", "a · b", "a · c", "b · c"]
    assert rows[2] == ["3", "-1.000", "1.000", "-1.000"]
    assert rows[1] == ["2", "", "1.000", ""]
    with pytest.raises(VectorFileError, match="hidden size 6 and 2"):
        html_report({"a": vector, "b": ControlVector(directions={2: np.ones(2)})})
    with pytest.raises(VectorFileError, match="at least one"):
        html_report({})


def test_cosines() -> None:
    a = ControlVector(directions={0: np.array([1.0, 0]), 1: np.array([1.0, 1]), 2: np.zeros(2)})
    half = np.sqrt(0.5)
    assert np.allclose(block_cosines(a), [[1, half, 0], [half, 1, 0], [0, 0, 0]], atol=1e-15)
    b = ControlVector(directions={1: np.array([0, 2.0]), 2: np.ones(2), 5: np.ones(2)})
    assert cosine_by_block(a, b) == pytest.approx({1: half, 2: 0.0})


def test_projections_are_shown_per_block(vector: ControlVector) -> None:
    sides = (np.linspace(1, 3, 50), np.linspace(-3, -1, 10))
    page = html_report({"a": vector, "b": vector}, {"a": {2: sides, 7: sides}})
    captions = [caption.text for caption in body(page).iter("figcaption")]
    assert [text for text in captions if text and "projection" in text] == [
        "projection of texts at block 2",
        "projection of texts at block 7",
    ]


def heights(picture: str) -> list[float]:
    return [float(rect.attrib["height"]) for rect in ET.fromstring(picture).iter("rect")]


def test_bars_are_in_proportion() -> None:
    one, two, none = heights(bars({3: 1.0, 4: 2.0, 5: 0.0}))
    assert two == HEIGHT - EDGE
    assert one == two / 2
    assert none == 0.0


def test_bars_are_limited_to_the_given_range() -> None:
    assert heights(bars({0: 0.75, 1: 0.2, 2: 3.0}, low=0.5, high=1.0)) == [77.0, 0.0, 154.0]
    assert heights(bars({0: 0.0, 1: 0.0})) == [0.0, 0.0]
    assert heights(bars({})) == []


def test_heatmap_colours_show_sign_and_size() -> None:
    picture = ET.fromstring(heatmap(np.array([[1.0, -1.0], [0.0, 0.5]]), [4, 9]))
    assert [rect.attrib["fill"] for rect in picture.iter("rect")] == ["#2166ac", "#b2182b", "#ffffff", "#90b2d6"]
    assert "4, 9: -1.000" in [title.text for title in picture.iter("title")]


def test_histograms_show_the_shares_of_each_side() -> None:
    positive, negative = np.array([2.0, 2.0, 3.0, 4.0]), np.array([-4.0, 2.0])
    shares, edges = histogram_shares(positive, negative)
    assert (edges[0], edges[-1], len(edges)) == (-4.0, 4.0, 25)
    assert [share.sum() for share in shares] == [1.0, 1.0]
    at_two = np.searchsorted(edges, 2.0, side="right") - 1
    assert (shares[0][at_two], shares[1][at_two]) == (0.5, 0.5)
    picture = ET.fromstring(histograms(positive, negative))
    assert len(picture.findall(".//rect")) == 48
    titles = [title.text for title in picture.iter("title")]
    assert "negatives from -4 to -3.667: 50.0%" in titles
    ET.fromstring(histograms(np.zeros(3), np.zeros(3)))
