from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector
from steer_engine.vectors.report import block_cosines, cosine_by_block, html_report


def body(page: str) -> ET.Element:
    """The page as XML, which it also is from <h1> on: every tag is closed and every text escaped."""
    return ET.fromstring("<page>" + page.partition("</style>")[2].replace("</html>", "</page>"))


def test_the_page_has_a_row_per_block_and_its_figures(vector: ControlVector) -> None:
    page = html_report({"cheerful": vector})
    root = body(page)
    assert [h.text for h in root.iter("h2")] == ["cheerful"]
    rows = [[cell.text or "" for cell in row] for row in root.iter("tr")]
    norm = vector.norms[2]
    assert rows[1] == ["2", f"{norm:.4g}", "10.5", f"{norm / 10.5:.1%}", "1.000", ""]
    assert rows[3][0] == "7"
    assert rows[3][4:] == ["", "25.0%"]  # no separation is known there
    assert len(list(root.iter("figure"))) == 4
    assert len(list(root.iter("rect"))) == 3 + 3 + 2 + 9
    for foreign in ("<script", "http:", "https:", "url("):
        assert foreign not in page


def test_what_is_not_known_is_left_out() -> None:
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
