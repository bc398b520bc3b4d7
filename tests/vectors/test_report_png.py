from __future__ import annotations

import sys

import numpy as np
import pytest

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector
from steer_engine.vectors.report import png_report


def test_a_picture_of_each_vector(vector: ControlVector) -> None:
    pytest.importorskip("matplotlib")
    one = png_report({"a": vector})
    two = png_report({"a$_x": vector, "b": ControlVector(directions={0: np.zeros(3)})})
    sizes = [tuple(int.from_bytes(png[i : i + 4], "big") for i in (16, 20)) for png in (one, two)]
    assert one.startswith(b"\x89PNG")
    assert sizes == [(1600, 320), (1600, 640)]


def test_errors(vector: ControlVector, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VectorFileError, match="at least one"):
        png_report({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(VectorFileError, match=r"steer-engine\[report\]"):
        png_report({"a": vector})


def test_histograms_make_the_picture_wider(vector: ControlVector) -> None:
    pytest.importorskip("matplotlib")
    sides = (np.linspace(1, 3, 50), np.linspace(-3, -1, 10))
    png = png_report({"a": vector, "b": vector}, {"a": {2: sides, 7: sides}, "b": {2: sides}})
    assert [int.from_bytes(png[i : i + 4], "big") for i in (16, 20)] == [2400, 640]
