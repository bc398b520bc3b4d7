"""Suggested blocks and scales."""

from __future__ import annotations

import numpy as np
import pytest

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, VectorMetadata
from steer_engine.vectors.suggestion import doses, shown_blocks, starting_point, suggest


def vector(size: float = 1.0, **metadata: object) -> ControlVector:
    """Unit directions at all 20 blocks of a model with residual norm 10 at each."""
    fields = {"num_blocks": 20, "residual_norms": dict.fromkeys(range(20), 10.0), **metadata}
    return ControlVector(
        directions={block: np.array([size, 0.0]) for block in range(20)}, metadata=VectorMetadata.checked(fields)
    )


def test_middle_blocks_and_scales_by_dose() -> None:
    found = suggest(vector())
    assert (found.first, found.last) == (5, 12)
    assert found.gentle == pytest.approx(0.25 / 0.8)
    assert found.strong == pytest.approx(0.5 / 0.8)
    assert str(found) == "blocks 5-12, scale 0.31 (gentle) to 0.62 (strong)"
    # A vector of twice the size needs half the scale.
    assert suggest(vector(2.0)).gentle == pytest.approx(found.gentle / 2)


def test_blocks_that_separate_badly_are_left_out() -> None:
    separation = {**dict.fromkeys(range(20), 0.96), 8: 0.6, 10: 1.0, 1: 1.0}
    assert (suggest(vector(separation=separation)).first, suggest(vector(separation=separation)).last) == (9, 12)


def test_blocks_outside_the_middle_are_better_than_none() -> None:
    late = vector().restrict([18, 19])
    assert (suggest(late).first, suggest(late).last) == (18, 19)


def test_doses_are_known_where_norms_are() -> None:
    assert doses(vector(residual_norms={3: 4.0})) == {3: 0.25}
    for bare in (vector(residual_norms={}), vector(num_blocks=None)):
        with pytest.raises(VectorFileError, match="no suggestion can be made"):
            suggest(bare)
    with pytest.raises(VectorFileError, match="directions are zero"):
        suggest(vector(0.0))


def test_shown_blocks_are_both_ends_and_the_best(vector: ControlVector) -> None:
    assert shown_blocks(vector) == (3,)
    directions = {block: np.ones(4) for block in range(12)}
    about = VectorMetadata(
        num_blocks=12, residual_norms=dict.fromkeys(range(12), 10.0), separation={4: 0.9, 5: 0.95, 6: 0.92}
    )
    known = ControlVector(directions=directions, metadata=about)
    assert shown_blocks(known) == (3, 5, 7)
    assert shown_blocks(known.with_metadata(num_blocks=None)) == (6,)


def test_a_starting_point_lies_between_gentle_and_strong() -> None:
    start = starting_point(vector())
    assert start is not None
    assert start["scale"] == pytest.approx(0.375 / 0.8, rel=0.03)
    assert (start["blocks"], start["unit"], start["scope"]) == ("5-12", "vector", "all")
    for unknown in (vector(num_blocks=None), vector(0.0), vector(1e-40, residual_norms={5: 1e300})):
        assert starting_point(unknown) is None


def test_a_calibrated_strength_comes_first() -> None:
    measured = {"suggested_scale": "0.1", "suggested_blocks": "7", "suggested_unit": "residual"}
    measured |= {"suggested_because": "x"}
    assert starting_point(vector(extra=measured)) == {
        "blocks": "7", "scale": 0.1, "unit": "residual", "scope": "all", "because": "x"
    }  # fmt: skip
    for damage in ({"suggested_scale": "much"}, {"suggested_scale": "inf"}, {"suggested_unit": "feet"}):
        assert starting_point(vector(extra=measured | damage)) is None
