"""No accepted spec can make a residual stream non-finite: a bound on its growth covers every operation."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from steer_engine.containment import ASSUMED_PEAK, LARGEST_FINITE, MAX_STREAM_NORM, check_measurable
from steer_engine.errors import SteeringRequestError
from steer_engine.model_shape import ModelShape
from steer_engine.parse import parse_spec
from steer_engine.resolve import resolve
from steer_engine.settings import Limits
from steer_engine.spec import Op
from steer_engine.vectors import ControlVector, RowSet, VectorMetadata

BLOCKS, HIDDEN = 12, 4
DTYPES = ("float32", "bfloat16", "float16")
ROUNDED = 1 + 2.0**-40
"""For what float64 rounds in a hundred operations."""


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
    return resolve(spec, lambda name: FILES.get(name, vector), shape, Limits())


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


U = np.eye(HIDDEN)
SIZES = {"read": 3.0, "write": 2.0}
"""Norms of the rows in the two files below: parallel to the vector, so that every edit moves the same row most."""


def rows_of(kind: Literal["features", "low_rank"]) -> RowSet:
    """Features 3 and 7, or an intervention of rank 2, at every block."""
    read, write = np.float32(U[:2] * SIZES["read"]), np.float32(U[:2] * SIZES["write"])
    bias = dict.fromkeys(range(BLOCKS), np.array([0.5, -0.25], np.float32))
    numbers = dict.fromkeys(range(BLOCKS), np.array([3, 7])) if kind == "features" else {}
    reads, writes = dict.fromkeys(range(BLOCKS), read), dict.fromkeys(range(BLOCKS), write)
    return RowSet(kind=kind, read=reads, write=writes, bias=bias, indices=numbers)


def other_direction() -> ControlVector:
    return ControlVector(directions=dict.fromkeys(range(BLOCKS), np.float32(U[1])), metadata=VectorMetadata())


FILES = {"sae": rows_of("features"), "reft": rows_of("low_rank"), "u": other_direction()}


def edited(x: np.ndarray, edit: dict[str, Any], residual: float | None) -> np.ndarray:
    """One operation on a row, in float64, straight from the table in docs/request.md."""
    along, op, scale = float(x @ U[0]), edit["op"], edit.get("scale", 1.0)
    read, write, bias = U[:2] * SIZES["read"], U[:2] * SIZES["write"], np.array([0.5, -0.25])
    match op:
        case "add":
            return x + scale * (residual or 1.0 if edit.get("unit") == "residual" else 1.0) * U[0]
        case "add_relative":
            return x + scale * float(np.linalg.norm(x)) * U[0]
        case "ablate":
            return x - scale * along * U[0]
        case "feature":
            active = np.maximum(read @ x + bias, 0.0)
            after = active + edit["add"] if "add" in edit else np.full(2, edit["target"]) if "target" in edit else None
            return x + ((scale * active if after is None else after) - active) @ write
        case "low_rank":
            return x + scale * (read @ x + bias - write @ x) @ write
        case "rotate":
            before, now = math.atan2(x[1], x[0]), math.radians(edit.get("degrees", edit.get("to_degrees")))
            now += before if "degrees" in edit else 0.0
            return np.concatenate([math.hypot(x[0], x[1]) * np.array([math.cos(now), math.sin(now)]), x[2:]])
    lo, hi = edit.get("lo", edit.get("target")), edit.get("hi", edit.get("target"))
    held = float(np.clip(along, -np.inf if lo is None else lo, np.inf if hi is None else hi))
    return x + (held - along) * U[0]


magnitudes = st.sampled_from([1e-3, 0.05, 0.5, 1.0, 9.9, 1e3, 1e6, 1e12, 1e17])
signs = st.sampled_from([-1.0, 1.0])
spans = {"3": range(3, 4), "0-5": range(6), "all": range(BLOCKS)}


@st.composite
def edits_at_the_limits(draw: st.DrawFn, has_norms: bool) -> dict[str, Any]:
    """Of any operation, with or without a schedule and a gate that lets every row of the test pass."""
    op = draw(st.sampled_from([op.value for op in Op]))
    number = draw(magnitudes) * draw(signs)
    edit: dict[str, Any] = {"op": op, "vector": "v", "blocks": draw(st.sampled_from(list(spans)))}
    match op:
        case "set":
            edit["target"] = number
        case "clamp":
            edit[draw(st.sampled_from(["lo", "hi"]))] = number
        case "feature":
            edit |= {"vector": "sae", "feature": [3, 7], draw(st.sampled_from(["target", "add", "scale"])): number}
        case "low_rank":
            edit |= {"vector": "reft", "scale": number}
        case "rotate":
            edit |= {"toward": "u", draw(st.sampled_from(["degrees", "to_degrees"])): draw(st.floats(-360, 360))}
        case "add" if has_norms:
            edit |= {"scale": number, "unit": draw(st.sampled_from(["vector", "residual"]))}
        case _:
            edit["scale"] = number
    if op != "rotate" and draw(st.booleans()):
        most = 1.0 if op in ("set", "clamp", "feature", "low_rank") else 5.0
        edit["schedule"] = {"kind": "linear", "over": 4, "to": draw(st.sampled_from([0.0, 0.3, most]))}
    if draw(st.integers(0, 3)) == 0:
        edit["gate"] = {"vector": "v", "min_cos": -1.0}
    return edit


@st.composite
def specs_at_the_limits(draw: st.DrawFn) -> tuple[dict[str, Any], float | None]:
    """A spec, and the residual norms in the file of its vector."""
    residual = draw(st.sampled_from([None, 1e-6, 1.0, 90.0, 1e5]))
    edits = draw(st.lists(edits_at_the_limits(residual is not None), min_size=1, max_size=4))
    return {"edits": edits, "preserve_norm": draw(st.booleans())}, residual


@settings(max_examples=600, deadline=None)
@given(
    drawn=specs_at_the_limits(), dtype=st.sampled_from(DTYPES), along=signs, late=st.lists(st.booleans(), min_size=4)
)
def test_no_accepted_spec_grows_the_largest_row_beyond_its_dtype(
    drawn: tuple[dict[str, Any], float | None], dtype: str, along: float, late: list[bool]
) -> None:
    """The row that grows most points along the vector, or against it; each operation is done at each of its blocks.

    late: for each edit, whether its schedule has come to its end.
    """
    spec, residual = drawn
    try:
        resolve_edits(spec["edits"], dtype, vector_of(1.0, residual), preserve_norm=spec["preserve_norm"])
    except SteeringRequestError:
        event("refused")
        return
    event("accepted")
    x = ASSUMED_PEAK[dtype] * along * U[0]
    for block in range(BLOCKS):
        entered = float(np.linalg.norm(x))
        for edit, is_late in zip(spec["edits"], late, strict=False):
            if block in spans[edit["blocks"]]:
                share = edit["schedule"]["to"] if is_late and "schedule" in edit else 1.0
                x = x + share * (edited(x, edit, residual) - x)
                assert np.linalg.norm(x) <= MAX_STREAM_NORM[dtype] * ROUNDED
        if spec["preserve_norm"] and (norm := float(np.linalg.norm(x))):
            x *= entered / norm
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
