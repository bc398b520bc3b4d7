"""No accepted spec can make a residual stream non-finite: a bound on its growth covers every operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_engine.containment import ASSUMED_PEAK, LARGEST_FINITE, MAX_STREAM_NORM, check_measurable
from steer_engine.errors import SteeringRequestError
from steer_engine.model_shape import ModelShape
from steer_engine.parse import parse_spec
from steer_engine.resolve import resolve
from steer_engine.settings import Limits
from steer_engine.spec import Op
from steer_engine.vectors import ControlVector, VectorMetadata

BLOCKS, HIDDEN = 12, 4
DTYPES = ("float32", "bfloat16", "float16")


def vector_of(norm: float, residual: float | None = None) -> ControlVector:
    direction = np.zeros(HIDDEN, dtype=np.float32)
    direction[0] = norm
    norms = {} if residual is None else dict.fromkeys(range(BLOCKS), residual)
    directions = dict.fromkeys(range(BLOCKS), direction)
    return ControlVector(directions=directions, metadata=VectorMetadata(residual_norms=norms))


def resolve_edits(edits: list[dict[str, Any]], dtype: str, vector: ControlVector, **spec_fields: Any) -> Any:
    shape = ModelShape(
        hidden_size=HIDDEN,
        num_blocks=BLOCKS,
        armed_blocks=tuple(range(BLOCKS)),
        ops=tuple(Op),
        rows=16,
        dtype=dtype,
    )
    spec = parse_spec({"edits": [{"vector": "v", **edit} for edit in edits], **spec_fields})
    assert spec is not None
    return resolve(spec, lambda name: vector, shape, Limits())


TINY = 1e-6
"""Residual norms by which a client could make any edit look small."""

REFUSED: list[tuple[str, list[dict[str, Any]], float | None]] = [
    ("float32", [{"op": "set", "target": 3e38, "blocks": 3}], None),
    ("bfloat16", [{"op": "set", "target": 3e38, "blocks": 3}], None),
    ("float16", [{"op": "set", "target": 6e4, "blocks": 3}], None),
    ("float32", [{"op": "clamp", "lo": 3e38, "blocks": 3}], None),
    ("float32", [{"op": "clamp", "hi": -3e38, "blocks": 3}], None),
    ("float32", [{"op": "set", "target": 1e20, "blocks": 3}, {"op": "add_relative", "scale": 1.0, "blocks": 3}], None),
    ("float32", [{"op": "add_relative", "scale": 10.0}] * 2, None),
    ("bfloat16", [{"op": "add_relative", "scale": 10.0}] * 2, None),
    ("float16", [{"op": "add_relative", "scale": 3.0}], None),
    ("float16", [{"op": "add_relative", "scale": 5.0, "blocks": 3}], None),
    ("float16", [{"op": "ablate", "scale": 10.0, "blocks": 3}], None),
    ("float32", [{"op": "ablate", "scale": -10.0}] * 2, None),
    ("bfloat16", [{"op": "ablate", "scale": -10.0}] * 2, None),
    ("float32", [{"op": "add_relative", "scale": 10.0}], TINY),
    ("bfloat16", [{"op": "add_relative", "scale": 10.0}], TINY),
    ("float16", [{"op": "add_relative", "scale": 3.0}], TINY),
    ("float16", [{"op": "add_relative", "scale": 1.5, "blocks": 3}], TINY),
    ("float32", [{"op": "ablate", "scale": -10.0}], TINY),
    ("bfloat16", [{"op": "ablate", "scale": -10.0}], TINY),
    ("float16", [{"op": "ablate", "scale": -1.5, "blocks": 3}], TINY),
    ("float32", [{"op": "add", "scale": 1.0}], 1e16),
]
"""Type of the stream, edits, and the residual norm of each block in the vector's file."""


@pytest.mark.parametrize(("dtype", "edits", "residual"), REFUSED)
@pytest.mark.parametrize("gated", [False, True])
def test_what_could_overflow_is_refused(
    dtype: str, edits: list[dict[str, Any]], residual: float | None, gated: bool
) -> None:
    if gated:
        edits = [edit | {"gate": {"vector": "v", "min_cos": 0.0}} for edit in edits]
    with pytest.raises(SteeringRequestError) as caught:
        resolve_edits(edits, dtype, vector_of(1.0, residual))
    assert caught.value.param is not None
    assert caught.value.param.startswith("steering.edits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edits",
    [
        [{"op": "add", "scale": 10.0}],
        [{"op": "add_relative", "scale": 0.05}],
        [{"op": "add_relative", "scale": 0.9, "blocks": 3}],
        [{"op": "ablate"}],
        [{"op": "ablate", "scale": 2.0}],
        [{"op": "clamp", "lo": -5.0, "hi": 5.0}],
        [{"op": "set", "target": -40.0}],
    ],
)
def test_useful_edits_are_accepted(dtype: str, edits: list[dict[str, Any]]) -> None:
    resolve_edits(edits, dtype, vector_of(1.0))
    resolve_edits(edits, dtype, vector_of(1.0, residual=90.0))


def test_with_preserved_norms_each_block_is_bounded_by_itself() -> None:
    edits = [{"op": "add_relative", "scale": 10.0}] * 2
    with pytest.raises(SteeringRequestError, match="grow the residual stream"):
        resolve_edits(edits, "float32", vector_of(1.0))
    resolve_edits(edits, "float32", vector_of(1.0), preserve_norm=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [1e-6, 1.0, 90.0])
def test_the_norms_in_a_file_never_loosen_the_bound(dtype: str, residual: float) -> None:
    """A client writes them; and a file may know the norms of early blocks only, which are the smallest."""
    refused = []
    for scale in np.geomspace(0.05, 9.9, 20):
        edits = [{"op": "add_relative", "scale": float(scale)}]
        try:
            resolve_edits(edits, dtype, vector_of(1.0))
        except SteeringRequestError:
            refused.append(edits)
    assert refused
    for edits in refused:
        with pytest.raises(SteeringRequestError, match="grow the residual stream"):
            resolve_edits(edits, dtype, vector_of(1.0, residual))


def edited(x: np.ndarray, edit: dict[str, Any], unit: np.ndarray) -> np.ndarray:
    """One operation on a row, in float64."""
    along = float(x @ unit)
    op, scale = edit["op"], edit.get("scale", 1.0)
    if op == "add":
        return x + scale * unit
    if op == "add_relative":
        return x + scale * float(np.linalg.norm(x)) * unit
    if op == "ablate":
        return x - scale * along * unit
    lo, hi = edit.get("lo", edit.get("target")), edit.get("hi", edit.get("target"))
    held = float(np.clip(along, -np.inf if lo is None else lo, np.inf if hi is None else hi))
    return x + (held - along) * unit


magnitudes = st.sampled_from([1e-3, 0.5, 1.0, 9.9, 1e3, 1e6, 1e12, 1e17])
signs = st.sampled_from([-1.0, 1.0])


@st.composite
def edits_at_the_limits(draw: st.DrawFn) -> dict[str, Any]:
    op = draw(st.sampled_from(["add", "add_relative", "ablate", "clamp", "set"]))
    number = draw(magnitudes) * draw(signs)
    blocks = draw(st.sampled_from([3, "0-5", "all"]))
    if op == "set":
        return {"op": op, "target": number, "blocks": blocks}
    if op == "clamp":
        return {"op": op, draw(st.sampled_from(["lo", "hi"])): number, "blocks": blocks}
    return {"op": op, "scale": number, "blocks": blocks}


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(edits_at_the_limits(), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    along=signs,
)
def test_no_accepted_spec_grows_the_largest_row_beyond_its_dtype(
    edits: list[dict[str, Any]], dtype: str, along: float
) -> None:
    """The row that grows most points along the vector, or against it; each operation is done at each of its blocks."""
    try:
        resolve_edits(edits, dtype, vector_of(1.0))
    except SteeringRequestError:
        return
    unit = np.eye(HIDDEN)[0]
    x = ASSUMED_PEAK[dtype] * along * unit
    spans = {3: range(3, 4), "0-5": range(6), "all": range(BLOCKS)}
    for block in range(BLOCKS):
        for edit in edits:
            if block in spans[edit["blocks"]]:
                x = edited(x, edit, unit)
                assert np.linalg.norm(x) <= MAX_STREAM_NORM[dtype]
    assert np.abs(x).max() <= LARGEST_FINITE[dtype]
    assert np.isfinite(np.float32(x @ x)), "norms are computed in float32"


@pytest.mark.parametrize(
    ("dtype", "norm", "fits"), [("float16", 1e5, False), ("float16", 1e-8, False), ("float32", 1e5, True)]
)
def test_a_condition_needs_a_vector_that_the_dtype_holds(dtype: str, norm: float, fits: bool) -> None:
    if fits:
        check_measurable(vector_of(norm), [0], "steering.when.vector", dtype)
        return
    with pytest.raises(SteeringRequestError, match="norm at block 0") as refused:
        check_measurable(vector_of(norm), [0], "steering.when.vector", dtype)
    assert refused.value.param == "steering.when.vector"
