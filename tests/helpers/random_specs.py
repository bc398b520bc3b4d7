"""Random specs over a few small vectors, computed twice in float64: as the client wrote them, and as compiled.

D hidden size. Every number of the compiled form carries a bound on its rounding error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from steer_engine.errors import UnknownVectorError
from steer_engine.fields import parse_blocks
from steer_engine.model_shape import ModelShape
from steer_engine.parse import parse_spec
from steer_engine.program import Entry, Program, RowKey
from steer_engine.resolve import ResolvedSpec, resolve
from steer_engine.scope import ScopeSpec
from steer_engine.settings import Limits
from steer_engine.spec import EditSpec, Op, SteeringSpec
from steer_engine.vectors import ControlVector, VectorMetadata

Array = NDArray[np.float64]

HIDDEN_SIZE = 16
NUM_BLOCKS = 4
MODEL = ModelShape(
    hidden_size=HIDDEN_SIZE,
    num_blocks=NUM_BLOCKS,
    armed_blocks=tuple(range(NUM_BLOCKS)),
    ops=tuple(Op),
    rows=16,
    dtype="float32",
)
_BLOCKS = {"a": (0, 1, 2, 3), "b": (1, 2, 3), "c": (0, 1, 2, 3), "d": (2,)}


def _vector(seed: int, blocks: tuple[int, ...]) -> ControlVector:
    rng = np.random.default_rng(seed)
    return ControlVector(
        directions={block: rng.normal(size=HIDDEN_SIZE).astype(np.float32) for block in blocks},
        metadata=VectorMetadata(residual_norms={block: 4.0 + block for block in blocks}),
    )


VECTORS = {name: _vector(seed, blocks) for seed, (name, blocks) in enumerate(_BLOCKS.items())}
BY_DIGEST = {vector.digest: vector for vector in VECTORS.values()}


def source(name: str) -> ControlVector:
    found = VECTORS.get(name) or BY_DIGEST.get(name)
    if found is None:
        raise UnknownVectorError(f"There is no control vector {name!r}.")
    return found


def resolved(raw: Any, model: ModelShape = MODEL, limits: Limits | None = None) -> ResolvedSpec:
    spec = parse_spec(raw)
    assert spec is not None
    return resolve(spec, source, model, limits or Limits())


# Random specs, in the client's JSON

scales = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 0.1, 1.0, 1.5])
offsets = st.none() | st.integers(-12, 12)
scopes = (
    st.sampled_from(["all", "prompt", "generation", "last_prompt_token"])
    | st.fixed_dictionaries({}, optional={"start": offsets, "end": offsets})
    | st.builds(
        lambda start, size: {"from": "generation", "start": start, "end": size and (start or 0) + size},
        st.none() | st.integers(0, 4),
        st.none() | st.integers(1, 6),
    )
)
cosines = st.floats(-0.5, 0.5)


@st.composite
def edits(draw: st.DrawFn, names: str = "abcd") -> dict[str, Any]:
    name = draw(st.sampled_from(names))
    edit: dict[str, Any] = {
        "vector": draw(st.sampled_from([name, VECTORS[name].digest])),
        "op": draw(st.sampled_from(Op)),
    }
    covered = draw(st.lists(st.sampled_from(_BLOCKS[name]), min_size=1, unique=True))
    edit["blocks"] = draw(st.sampled_from(["all", covered, covered[0], f"{covered[0]}-{_BLOCKS[name][-1]}"]))
    match edit["op"]:
        case Op.CLAMP:
            low = draw(st.sampled_from([-2.0, 0.0, 0.5]))
            bounds = {"lo": low, "hi": low + draw(st.sampled_from([0.0, 1.0, 3.0]))}
            edit |= draw(st.sampled_from([bounds, {"lo": bounds["lo"]}, {"hi": bounds["hi"]}]))
        case Op.SET:
            edit["target"] = draw(st.sampled_from([-3.0, 0.0, 2]))
        case Op.ADD:
            edit["scale"] = draw(scales)
            edit["unit"] = draw(st.sampled_from(["vector", "vector", "residual"]))
        case _:
            edit["scale"] = draw(scales)
    edit["scope"] = draw(scopes)
    if draw(st.integers(0, 3)) == 0:
        gate: dict[str, Any] = {"vector": draw(st.sampled_from("ac"))}
        edit["gate"] = gate | draw(
            st.sampled_from(["min_cos", "max_cos"]).flatmap(lambda b: cosines.map(lambda c: {b: c}))
        )
    return edit


@st.composite
def specs(draw: st.DrawFn, max_edits: int = 6) -> dict[str, Any]:
    return {
        "edits": draw(st.lists(edits(), min_size=1, max_size=max_edits)),
        "preserve_norm": draw(st.integers(0, 3)) == 0,
    }


# What a spec computes, as written


def covers(scope: str | ScopeSpec, position: int, prompt_len: int) -> bool:
    """Straight from the words of the documentation."""
    if scope == "all":
        return True
    if scope == "prompt":
        return position < prompt_len
    if scope == "generation":
        return position >= prompt_len - 1
    if scope == "last_prompt_token":
        return position == prompt_len - 1
    assert isinstance(scope, ScopeSpec)
    if scope.from_ == "generation":
        selects = position - (prompt_len - 1)  # the number of the generated token
        return selects >= (scope.start or 0) and (scope.end is None or selects < scope.end)
    start, end = scope.start or 0, scope.end
    start = max(0, prompt_len + start) if start < 0 else start
    if end is not None and end < 0:
        end = max(0, prompt_len + end)
    return start <= position and (end is None or position < end)


def _component(x_D: Array, unit_D: Array) -> float:
    return float(x_D @ unit_D)


def _edited(edit: EditSpec, x_D: Array, v_D: Array, residual: float) -> Array:
    unit_D = v_D / np.linalg.norm(v_D)
    along = _component(x_D, unit_D)
    match edit.op:
        case Op.ADD:
            return x_D + edit.scale * (residual * unit_D if edit.unit == "residual" else v_D)
        case Op.ADD_RELATIVE:
            return x_D + edit.scale * np.linalg.norm(x_D) * unit_D
        case Op.ABLATE:
            return x_D - edit.scale * along * unit_D
        case Op.CLAMP:
            held = min(max(along, -np.inf if edit.lo is None else edit.lo), np.inf if edit.hi is None else edit.hi)
            return x_D + (held - along) * unit_D
        case Op.SET:
            assert edit.target is not None
            return x_D + (edit.target - along) * unit_D


@dataclass(frozen=True)
class Written:
    x_D: Array
    margin: float
    """How far the closest gate is from deciding the other way."""
    shortest: float
    """The least norm of x that something was divided by."""


def as_written(spec: SteeringSpec, x_D: Array, block: int, position: int, prompt_len: int) -> Written:
    """What the edits of `spec`, one after the other, make of a row."""
    assert spec.edits is not None
    before = float(np.linalg.norm(x_D))
    margin, shortest, touched = np.inf, np.inf, False
    for edit in spec.edits:
        assert isinstance(edit.vector, str)
        vector = source(edit.vector)
        if block not in (parse_blocks(edit.blocks) or vector.blocks) or not covers(edit.scope, position, prompt_len):
            continue
        if edit.gate is not None:
            gate_D = source(edit.gate.vector).directions[block].astype(np.float64)
            norm = float(np.linalg.norm(x_D))
            cos = float(x_D @ gate_D) / norm / float(np.linalg.norm(gate_D)) if norm else 0.0
            shortest = min(shortest, norm)
            bounds = [bound for bound in (edit.gate.min_cos, edit.gate.max_cos) if bound is not None]
            margin = min(margin, *(abs(cos - bound) for bound in bounds))
            if (edit.gate.min_cos is not None and cos < edit.gate.min_cos) or (
                edit.gate.max_cos is not None and cos > edit.gate.max_cos
            ):
                continue
        touched = True
        residual = vector.metadata.residual_norms[block]
        x_D = _edited(edit, x_D, vector.directions[block].astype(np.float64), residual)
    if touched and spec.preserve_norm:
        after = float(np.linalg.norm(x_D))
        shortest = min(shortest, after)
        x_D = x_D * (before / after) if after else x_D
    return Written(x_D, margin, shortest)


# What a program computes, with a bound on its rounding

SUM_ROUNDINGS = HIDDEN_SIZE + 2
"""Of an addend in a sum over D, in whatever order, its product included."""


def row_of(key: RowKey, block: int) -> Array:
    """What a bank row must hold."""
    terms = [weight * BY_DIGEST[digest].directions[block].astype(np.float64) for digest, weight in key.terms]
    total_D = np.sum(terms, axis=0)
    return total_D / np.linalg.norm(total_D) if key.unit else total_D


def as_compiled(program: Program, x_D: Array, block: int, position: int, roundoff: float) -> tuple[Array, float]:
    """What the entries of `program` make of a row, and a bound on |error| of that at unit roundoff `roundoff`."""
    u = roundoff
    before = float(np.linalg.norm(x_D))
    error = u * before
    touched = False
    for entry in entries_at(program, block):
        if not entry.start <= position < entry.end:
            continue
        if entry.gate is not None:
            gate_D = row_of(entry.gate[0], block)
            norm = float(np.linalg.norm(x_D))
            cos = float(x_D @ gate_D) / norm / float(np.linalg.norm(gate_D)) if norm else 0.0
            if not entry.gate[1] <= cos <= entry.gate[2]:
                continue
        touched = True
        x_D, error = _applied(entry, x_D, error, row_of(entry.row, block), before, u)
    if touched and program.keep_norm:
        after = float(np.linalg.norm(x_D))
        if after > error:
            ratio = before / after
            # Once through x itself and once through the ratio, whose denominator may be less by the error.
            error = 2 * error * before / (after - error) + 3 * SUM_ROUNDINGS * u * before
            x_D = x_D * ratio
    return x_D, error


def entries_at(program: Program, block: int) -> tuple[Entry, ...]:
    return next((group.entries for group in program.sites if block in group.blocks), ())


def _applied(entry: Entry, x_D: Array, error: float, w_D: Array, before: float, u: float) -> tuple[Array, float]:
    """Norms bound all: rounding numbers one by one moves a vector by u * |vector| at the most."""
    size, length = float(np.linalg.norm(x_D)), float(np.linalg.norm(w_D))
    dot = float(x_D @ w_D)
    clipped = min(max(dot, entry.lo), entry.hi)
    norm_error = error + SUM_ROUNDINGS * u * size
    dot_error = (error + (SUM_ROUNDINGS + 1) * u * size) * length
    terms = [entry.c0, entry.c1 * size, entry.c2 * dot, entry.c3 * clipped, entry.c3 * dot]
    factor = entry.c0 + entry.c1 * size + entry.c2 * dot + entry.c3 * (clipped - dot)
    factor_error = abs(entry.c1) * norm_error + (abs(entry.c2) + 2 * abs(entry.c3)) * dot_error
    # Coefficients and bounds are rounded, each term is made, and summed.
    factor_error += 8 * u * (sum(map(abs, terms)) + factor_error)
    edited_D = x_D + factor * w_D
    step = abs(factor) * length
    error += factor_error * length * (1 + 2 * u) + 2 * u * step
    # Sums: of what was added before, with this step, and with the row.
    error += 4 * u * (before + size + step + float(np.linalg.norm(edited_D)))
    return edited_D, error
