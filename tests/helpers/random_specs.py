"""Random specs over a few small vectors, computed twice in float64: as the client wrote them, and as compiled.

D hidden size. Every number of the compiled form carries a bound on its rounding error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from steer_engine.errors import UnknownVectorError
from steer_engine.fields import parse_blocks
from steer_engine.model_shape import ModelShape
from steer_engine.parse import parse_spec
from steer_engine.program import MEMBER, MODES, Entry, Program, RowKey
from steer_engine.resolve import ResolvedSpec, resolve
from steer_engine.scope import ScopeSpec
from steer_engine.settings import Limits
from steer_engine.spec import DIRECTIONAL, EditSpec, Op, SteeringSpec
from steer_engine.vectors import ControlVector, RowSet, VectorMetadata

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


def _row_sets() -> dict[str, RowSet]:
    """`relu` and `jump`: features 3 and 7 at block 2, without and with thresholds. `reft`: rank 2 at blocks 1 and 3."""
    rng = np.random.default_rng(99)

    def rows(count: int = 2) -> NDArray[np.float32]:
        return (rng.normal(size=(count, HIDDEN_SIZE)) / 4).astype(np.float32)

    norms = VectorMetadata(residual_norms={1: 5.0, 2: 6.0, 3: 7.0})
    numbers = {2: np.array([3, 7])}
    bias = {2: np.array([0.5, -0.25], np.float32)}
    threshold = {2: np.array([0.25, 0.75], np.float32)}
    features: dict[str, Any] = {"kind": "features", "indices": numbers, "bias": bias, "metadata": norms}
    orthonormal = {block: np.linalg.qr(rows().T)[0].T.astype(np.float32) for block in (1, 3)}
    shifts = {block: rows()[0][:2] for block in (1, 3)}
    return {
        "relu": RowSet(read={2: rows()}, write={2: rows()}, **features),
        "jump": RowSet(read={2: rows()}, write={2: rows()}, threshold=threshold, **features),
        "reft": RowSet(kind="low_rank", read={1: rows(), 3: rows()}, write=orthonormal, bias=shifts, metadata=norms),
    }


ROW_SETS = _row_sets()


def source(name: str) -> ControlVector:
    found = VECTORS.get(name) or BY_DIGEST.get(name)
    if found is None:
        raise UnknownVectorError(f"There is no control vector {name!r}.")
    return found


def file_source(name: str) -> ControlVector | RowSet:
    return ROW_SETS.get(name) or source(name)


def resolved(raw: Any, model: ModelShape = MODEL, limits: Limits | None = None) -> ResolvedSpec:
    """The vectors made of rows of files are in BY_DIGEST afterwards."""
    spec = parse_spec(raw)
    assert spec is not None
    found = resolve(spec, file_source, model, limits or Limits())
    BY_DIGEST.update(found.vectors)
    return found


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
def edits(draw: st.DrawFn, names: str = "abcd", ops: Sequence[Op] = DIRECTIONAL) -> dict[str, Any]:
    name = draw(st.sampled_from(names))
    edit: dict[str, Any] = {
        "vector": draw(st.sampled_from([name, VECTORS[name].digest])),
        "op": draw(st.sampled_from(ops)),
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
        case Op.FEATURE:
            number = st.sampled_from([3, 7, [3], [7, 3]])
            change = st.sampled_from([{"target": 0.0}, {"target": 2.5}, {"scale": 0.0}, {"scale": -1.5}, {"add": 0.75}])
            edit |= {"vector": draw(st.sampled_from(["relu", "jump"])), "blocks": 2, "feature": draw(number)}
            edit |= draw(change)
        case Op.LOW_RANK:
            edit |= {"vector": "reft", "blocks": draw(st.sampled_from(["all", 1, [1, 3]])), "scale": draw(scales)}
        case Op.ROTATE:
            angle = {draw(st.sampled_from(["degrees", "to_degrees"])): draw(st.sampled_from([-30.0, 90.0, 180, 350]))}
            edit |= angle | {"toward": "c" if name == "a" else "a"}
        case Op.ADD:
            edit["scale"] = draw(scales)
            edit["unit"] = draw(st.sampled_from(["vector", "vector", "residual"]))
        case _:
            edit["scale"] = draw(scales)
    edit["scope"] = draw(scopes)
    if draw(st.integers(0, 3)) == 0:
        gate: dict[str, Any] = {"vector": draw(st.sampled_from("ac"))}
        tested = ["min_cos", "max_cos"] if ops is DIRECTIONAL else ["min_cos", "max_cos", "min_dot", "max_dot"]
        edit["gate"] = gate | draw(st.sampled_from(tested).flatmap(lambda b: cosines.map(lambda c: {b: c})))
    return edit


@st.composite
def specs(draw: st.DrawFn, max_edits: int = 6, ops: Sequence[Op] = DIRECTIONAL) -> dict[str, Any]:
    """ops: those other than DIRECTIONAL need `file_source`."""
    return {
        "edits": draw(st.lists(edits(ops=ops), min_size=1, max_size=max_edits)),
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
    raise AssertionError(edit.op)


def _rotated(edit: EditSpec, x_D: Array, block: int) -> tuple[Array, float]:
    """In coordinates of the plane, with a rotation matrix. Also the length of x in the plane."""
    assert isinstance(edit.vector, str)
    assert isinstance(edit.toward, str)
    pair = np.stack([source(name).directions[block].astype(np.float64) for name in (edit.vector, edit.toward)])
    axes_2D = np.linalg.qr(pair.T)[0].T
    axes_2D *= np.sign(np.einsum("nd,nd->n", axes_2D, pair))[:, None]
    old_2 = axes_2D @ x_D
    length, angle = float(np.linalg.norm(old_2)), np.arctan2(old_2[1], old_2[0])
    new = np.radians(edit.to_degrees) if edit.degrees is None else angle + np.radians(edit.degrees)
    return x_D + axes_2D.T @ (length * np.array([np.cos(new), np.sin(new)]) - old_2), length


def _encoded(edit: EditSpec, rows: RowSet, x_D: Array, block: int) -> tuple[Array, float]:
    """Encode, change the activations, decode; what the dictionary does not explain is kept. Also the margin of the
    closest threshold."""
    change_D, margin = np.zeros_like(x_D), np.inf
    for feature in edit.features:
        row = rows.row(block, feature)
        before = float(row.read.astype(np.float64) @ x_D) + row.bias
        least = 0.0 if row.threshold is None else row.threshold
        active = max(before, 0.0) if before > least else 0.0
        if edit.add is not None:
            after = active + edit.add
        else:
            after = edit.scale * active if edit.target is None else edit.target
            margin = min(margin, abs(before - least))
        change_D = change_D + (after - active) * row.write.astype(np.float64)
    return x_D + change_D, margin


def _low_rank(edit: EditSpec, rows: RowSet, x_D: Array, block: int) -> Array:
    read, write = rows.read[block].astype(np.float64), rows.write[block].astype(np.float64)
    return x_D + edit.scale * write.T @ (read @ x_D + rows.bias[block] - write @ x_D)


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
        vector = file_source(edit.vector)
        if block not in (parse_blocks(edit.blocks) or vector.blocks) or not covers(edit.scope, position, prompt_len):
            continue
        if edit.gate is not None:
            gate_D = source(edit.gate.vector).directions[block].astype(np.float64)
            norm = float(np.linalg.norm(x_D))
            number = float(x_D @ gate_D) / norm / float(np.linalg.norm(gate_D)) if norm else 0.0
            shortest = min(shortest, norm)
            low, high = edit.gate.min_cos, edit.gate.max_cos
            if edit.gate.is_dot:
                number, low, high = float(x_D @ gate_D), edit.gate.min_dot, edit.gate.max_dot
            bounds = [bound for bound in (low, high) if bound is not None]
            margin = min(margin, *(abs(number - bound) for bound in bounds))
            if (low is not None and number < low) or (high is not None and number > high):
                continue
        touched = True
        if edit.op is Op.ROTATE:
            x_D, length = _rotated(edit, x_D, block)
            shortest = min(shortest, length)
            continue
        if isinstance(vector, RowSet):
            if edit.op is Op.FEATURE:
                x_D, distance = _encoded(edit, vector, x_D, block)
                margin = min(margin, distance)
            else:
                x_D = _low_rank(edit, vector, x_D, block)
            continue
        residual = vector.metadata.residual_norms[block]
        x_D = _edited(edit, x_D, vector.directions[block].astype(np.float64), residual)
    if touched and spec.preserve_norm:
        after = float(np.linalg.norm(x_D))
        shortest = min(shortest, after)
        x_D = x_D * (before / after) if after else x_D
    return Written(x_D, margin, shortest)


# What a program computes, with a bound on its rounding

U32 = 2.0**-24
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
    group: tuple[Array, float] | None = None
    for entry in entries_at(program, block):
        if not entry.start <= position < entry.end:
            continue
        if entry.details is not None and entry.details.parallel:
            group = group or (x_D, error)
        read_D, read_error = group or (x_D, error)
        if entry.details is None or entry.details.parallel != MEMBER:
            group = None
        if entry.gate is not None:
            gate_D = row_of(entry.gate[0], block)
            norm = float(np.linalg.norm(read_D))
            number = float(read_D @ gate_D) / norm / float(np.linalg.norm(gate_D)) if norm else 0.0
            if entry.details is not None and entry.details.gate_dot:
                number = float(read_D @ gate_D)
            if not entry.gate[1] <= number <= entry.gate[2]:
                continue
        touched = True
        if entry.read is not None:
            rows = (row_of(entry.row, block), row_of(entry.read, block))
            x_D, error = _applied_with_mode(entry, x_D, error, read_D, read_error, *rows, before, u)
            continue
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


def _applied_with_mode(
    entry: Entry,
    x_D: Array,
    error: float,
    read_D: Array,
    read_error: float,
    w_D: Array,
    r_D: Array,
    before: float,
    u: float,
) -> tuple[Array, float]:
    """An entry that reads x as it was before its group. Bounds as in `_applied`; both rows are unit vectors."""
    assert entry.details is not None
    size = float(np.linalg.norm(read_D))
    own, dot = float(read_D @ w_D), float(read_D @ r_D)
    # Rows that are computed are rounded to float32: those that are read, as differences, and both of Gram-Schmidt.
    rounding = 0.0 if entry.details.mode == MODES["jump"] else 2 * U32
    of_written = rounding if entry.details.mode == MODES["plane"] else 0.0
    dot_error = read_error + ((SUM_ROUNDINGS + 1) * u + rounding) * size
    if entry.details.mode == MODES["plane"]:
        length = float(np.hypot(own, dot))
        terms = [entry.c0 * length, entry.c2 * own, entry.c3 * dot]
        factor_error = (1.5 * abs(entry.c0) + abs(entry.c2) + abs(entry.c3)) * dot_error + 4 * u * abs(terms[0])
    elif entry.details.mode == MODES["jump"]:
        terms = [entry.c0, *([entry.c2 * dot, entry.c3] if entry.lo <= dot <= entry.hi else [])]
        factor_error = abs(entry.c2) * dot_error
    else:
        terms = [entry.c0, entry.c2 * dot]
        factor_error = abs(entry.c2) * dot_error
    factor = sum(terms)
    factor_error += 8 * u * (sum(map(abs, terms)) + factor_error)
    edited_D = x_D + factor * w_D
    error += factor_error * (1 + 2 * u) + (2 * u + of_written) * abs(factor)
    error += 4 * u * (before + float(np.linalg.norm(x_D)) + abs(factor) + float(np.linalg.norm(edited_D)))
    return edited_D, error
