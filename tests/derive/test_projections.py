from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.dumping import contrast, texts_of, write
from typer.testing import CliRunner

from steer_engine.cli.main import app
from steer_engine.derive.dump_fitter import project
from steer_engine.errors import DerivationError
from steer_engine.vectors import ControlVector, VectorMetadata, save


def vector(**about: object) -> ControlVector:
    directions = {block: np.eye(8, dtype=np.float32)[block % 8] * 5 for block in (4, 9)}
    fields = {"model": "org/model", "num_blocks": 12, "residual_norms": {4: 10.0, 9: 10.0}} | about
    return ControlVector(directions=directions, metadata=VectorMetadata.checked(fields))


def test_projections_are_components_along_the_unit_direction(tmp_path: Path) -> None:
    rows = contrast(15)
    write(tmp_path / "d", rows, cuts=(6,))
    found = project(tmp_path / "d", vector(), (4, 9))
    for place, block in enumerate((4, 9)):
        positive, negative = found[block]
        assert np.array_equal(positive, rows[::2, place, block % 8])
        assert np.array_equal(negative, rows[1::2, place, block % 8])


def test_a_dump_that_does_not_fit_the_vector_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d", contrast(15))
    with pytest.raises(DerivationError, match=r"a dump of org/model .*; the vector is for org/other"):
        project(tmp_path / "d", vector(model="org/other"), (4,))
    wide = ControlVector(directions={4: np.ones(9)})
    with pytest.raises(DerivationError, match=r"hidden size 8\); the vector is for a model \(hidden size 9\)"):
        project(tmp_path / "d", wide, (4,))
    with pytest.raises(DerivationError, match=r"block 5 was not captured; the dump has \[4, 9\]"):
        project(tmp_path / "d", vector(), (5,))
    one = texts_of(30, paired=False, labels=("positive", "positive"))
    write(tmp_path / "one", contrast(15), texts=one, paired=False)
    with pytest.raises(DerivationError, match="its texts are of one class"):
        project(tmp_path / "one", vector(), (4,))


def test_the_report_shows_them(tmp_path: Path) -> None:
    write(tmp_path / "d", contrast(15))
    save(vector(), tmp_path / "v.safetensors")
    arguments = ["vectors", "report", str(tmp_path / "v.safetensors"), "--dump", str(tmp_path / "d")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "r.html")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "projection of texts at block 4" in (tmp_path / "r.html").read_text()
