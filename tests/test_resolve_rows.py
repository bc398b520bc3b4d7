"""Features, low-rank edits and rotations: what is refused, what they become, and that their growth is bounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.random_specs import HIDDEN_SIZE, MODEL, ROW_SETS, VECTORS, file_source, resolved
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_engine.errors import SteeringRequestError
from steer_engine.parse import parse_spec
from steer_engine.program import LAST, MEMBER, MODES
from steer_engine.resolve import ResolvedSpec, resolve
from steer_engine.settings import Limits
from steer_engine.spec import Op
from steer_engine.vectors import ControlVector, RowSet, VectorMetadata

FEATURE = {"op": "feature", "vector": "jump", "feature": 3}
LOW_RANK = {"op": "low_rank", "vector": "reft"}
ROTATE = {"op": "rotate", "vector": "a", "toward": "c"}


def one(**edit: Any) -> dict[str, Any]:
    return {"edits": [edit]}


def refused(spec: dict[str, Any], limits: Limits | None = None, **model: Any) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        resolved(spec, replace(MODEL, **model), limits)
    return caught.value


def resolve_rows(rows: RowSet | ControlVector, dtype: str = "float32", **edit: Any) -> ResolvedSpec:
    spec = parse_spec(one(vector="rows", **edit))
    assert spec is not None
    return resolve(spec, lambda name: rows if name == "rows" else VECTORS[name], replace(MODEL, dtype=dtype), Limits())


def rows_of(kind: str, read: Any, write: Any, **fields: Any) -> RowSet:
    arrays = {name: {1: np.array(rows, np.float32)} for name, rows in (("read", read), ("write", write))}
    return RowSet(kind=kind, **arrays, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edit", "param", "says"),
    [
        (FEATURE | {"feature": None, "scale": 0}, "feature", "needs the number of a feature"),
        (FEATURE, "edits[0]", "needs one of target, add and a scale"),
        (FEATURE | {"target": 1, "add": 1}, "edits[0]", "needs one of"),
        (FEATURE | {"target": 1, "scale": 2}, "edits[0]", "needs one of"),
        (FEATURE | {"feature": -1, "scale": 0}, "feature", ""),
        (FEATURE | {"feature": "3", "scale": 0}, "feature", "a list of numbers"),
        (FEATURE | {"feature": [], "scale": 0}, "feature", ""),
        (FEATURE | {"target": float("nan")}, "target", ""),
        (FEATURE | {"feature": 4, "scale": 0}, "feature", "no feature 4; it has 3, 7"),
        (FEATURE | {"blocks": 1, "scale": 0}, "blocks", "no direction at blocks 1"),
        (FEATURE | {"feature": list(range(9)), "scale": 0}, "feature", "at most 8 (max_rank)"),
        (FEATURE | {"target": 1e6}, "target", "dose"),
        (FEATURE | {"scale": 500.0}, "scale", "dose"),
        (FEATURE | {"scale": 0, "schedule": {"kind": "linear", "over": 4, "to": 2}}, "schedule", "at most 1"),
        (FEATURE | {"vector": "a", "scale": 0}, "vector", "'a' is a control vector"),
        (FEATURE | {"vector": "reft", "scale": 0}, "vector", "does not work with 'reft'"),
        (LOW_RANK | {"vector": "jump"}, "vector", "does not work with 'jump'"),
        (LOW_RANK | {"scale": 900.0}, "scale", "dose"),
        (LOW_RANK | {"blocks": 0}, "blocks", "no direction at blocks 0; it has 1, 3"),
        (LOW_RANK | {"unit": "residual"}, "unit", "applies to op 'add'"),
        (LOW_RANK | {"feature": 3}, "feature", "applies to op 'feature'"),
        ({"vector": "jump"}, "vector", "is a set of features, not a control vector"),
        ({"vector": "a", "blocks": 2, "gate": {"vector": "jump", "min_cos": 0}}, "gate.vector", "set of features"),
        ({"vector": "a", "blocks": 2, "gate": {"vector": "a", "feature": 3, "min_dot": 0}}, "gate.vector", "features"),
        ({"vector": "a", "gate": {"vector": "jump", "feature": 3, "min_dot": 0}}, "gate.vector", "one block"),
        ({"vector": "a", "gate": {"vector": "c", "min_dot": 0, "max_cos": 0.5}}, "gate", "cosine"),
        ({"vector": "a", "gate": {"vector": "c", "min_dot": 1, "max_dot": 0}}, "gate.min_dot", "above max_dot"),
        ({"vector": "a", "gate": {"vector": "jump", "feature": 3, "min_cos": 0}}, "gate.feature", "min_dot"),
        (ROTATE, "edits[0]", "needs degrees"),
        (ROTATE | {"degrees": 10, "to_degrees": 10}, "edits[0]", "needs degrees"),
        (ROTATE | {"degrees": 361}, "degrees", ""),
        (ROTATE | {"toward": None, "degrees": 10}, "toward", "needs a second vector"),
        (ROTATE | {"toward": "a", "degrees": 10}, "toward", "parallel"),
        (ROTATE | {"toward": "d", "degrees": 10}, "toward", "no direction at blocks 0"),
        (ROTATE | {"degrees": 10, "scale": 2}, "scale", "takes no scale"),
        (ROTATE | {"degrees": 10, "schedule": {"kind": "linear", "over": 4, "to": 0}}, "schedule", "no rotation"),
        ({"vector": "a", "toward": "c"}, "toward", "applies to op 'rotate'"),
    ],
)
def test_refusals(edit: dict[str, Any], param: str, says: str) -> None:
    error = refused(one(**edit))
    assert param in (error.param or "")
    assert says in error.message


def test_a_feature_of_a_file_with_several_blocks_needs_its_block() -> None:
    rows = {block: np.eye(2, HIDDEN_SIZE, dtype=np.float32) for block in (1, 2)}
    file = RowSet(kind="features", read=rows, write=rows)
    with pytest.raises(SteeringRequestError, match="name it with 'blocks'"):
        resolve_rows(file, op="feature", feature=0, scale=0)
    assert resolve_rows(file, op="feature", feature=0, scale=0, blocks=2).edits[0].edit.blocks == (2,)


def test_another_width_or_a_rank_beyond_the_limit() -> None:
    with pytest.raises(SteeringRequestError, match="hidden size 8"):
        resolve_rows(rows_of("low_rank", np.eye(2, 8), np.eye(2, 8)), op="low_rank")
    file = rows_of("low_rank", np.ones((9, HIDDEN_SIZE)), np.eye(9, HIDDEN_SIZE))
    with pytest.raises(SteeringRequestError, match="rank 9; this server takes at most 8") as caught:
        resolve_rows(file, op="low_rank")
    assert caught.value.param == "steering.edits[0].vector"


def test_a_row_of_zeros() -> None:
    file = rows_of("features", np.zeros((1, HIDDEN_SIZE)), np.eye(1, HIDDEN_SIZE))
    with pytest.raises(SteeringRequestError, match="row of zeros"):
        resolve_rows(file, op="feature", feature=0, scale=0)


def test_a_rank_that_reads_nothing_only_adds_its_bias() -> None:
    file = rows_of("low_rank", np.eye(2, HIDDEN_SIZE), np.eye(2, HIDDEN_SIZE), bias={1: np.array([2, 0], np.float32)})
    (site,) = resolve_rows(file, op="low_rank").template.at(5).sites
    (entry,) = site.entries
    assert (entry.read, entry.c0) == (None, 2.0)


@pytest.mark.parametrize(
    ("edit", "modes"),
    [
        (FEATURE | {"target": 2.0}, ["jump"]),
        (FEATURE | {"feature": [7, 3, 7], "scale": 0}, ["jump", "jump"]),
        (FEATURE | {"feature": [3, 7], "add": 1.5}, [None, None]),
        (FEATURE | {"feature": [3, 7], "add": 1.5, "gate": {"vector": "a", "min_cos": 0.1}}, ["read", "read"]),
        (FEATURE | {"feature": 3, "add": 1.5, "gate": {"vector": "a", "min_cos": 0.1}}, [None]),
        (LOW_RANK | {"blocks": 1}, ["read", "read"]),
        (ROTATE | {"degrees": 30, "blocks": 1}, ["plane", "plane"]),
    ],
)
def test_what_they_become(edit: dict[str, Any], modes: list[str | None]) -> None:
    """Entries that read x are one group; a single one is in none."""
    (site,) = resolved(one(**edit)).template.at(5).sites
    assert [entry.details and entry.details.mode for entry in site.entries] == [MODES[m] if m else None for m in modes]
    groups = [entry.details.parallel for entry in site.entries if entry.details]
    assert groups == ([MEMBER] * (len(groups) - 1) + [LAST] if len(groups) > 1 else [0] * len(groups))


def test_edits_that_change_nothing_are_left_out() -> None:
    assert resolved(one(**LOW_RANK, scale=0.0)).report()["edits"] == []
    assert resolved(one(**ROTATE, degrees=0)).report()["edits"] == []


def test_the_answer_names_the_file() -> None:
    (feature,) = resolved(one(**FEATURE, target=2.0)).report()["edits"]
    assert feature["vector"] == ROW_SETS["jump"].digest
    assert (feature["feature"], feature["target"], feature["blocks"]) == (3, 2.0, [2])
    (turned,) = resolved(one(**ROTATE, to_degrees=20)).report()["edits"]
    assert (turned["toward"], turned["to_degrees"]) == (VECTORS["c"].digest, 20.0)


def test_equal_rows_have_equal_digests_whatever_else_is_in_the_file() -> None:
    whole = ROW_SETS["jump"]
    kept = {name: {2: getattr(whole, name)[2][:1]} for name in ("read", "write", "bias", "threshold", "indices")}
    some = RowSet(kind="features", metadata=whole.metadata, **kept)
    digests = {resolve_rows(file, op="feature", feature=3, target=2.0).digest for file in (whole, some)}
    others = {resolve_rows(whole, op="feature", feature=f, target=t).digest for f, t in ((7, 2.0), (3, 2.5))}
    assert len(digests) == 1
    assert len(digests | others) == 3


def test_a_block_may_use_the_rows_that_others_leave() -> None:
    """Rank 2 reads four rows at a block with two entries; an engine with stages has a bank for each stage."""
    spec = one(**LOW_RANK, blocks=1)
    assert resolved(spec, replace(MODEL, rows=2)).template.num_bank_rows == 4
    assert "need 2 rows" in refused(spec, rows=1).message
    assert "need 4 rows over all blocks" in refused(spec, rows=2, armed_blocks=(1,)).message


FLOAT16 = {"op": "feature", "feature": 0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_small_row_keeps_its_direction(dtype: str) -> None:
    """Rows are stored as unit directions, their lengths in the coefficients: 1e-6 would vanish in float16."""
    file = rows_of("features", 1e-6 * np.eye(1, HIDDEN_SIZE), 1e6 * np.eye(1, HIDDEN_SIZE))
    (site,) = resolve_rows(file, dtype, op="feature", feature=0, scale=0).template.at(5).sites
    assert site.entries[0].c2 == pytest.approx(-1.0)
    assert site.entries[0].row.unit


def test_a_feature_whose_removal_grows_x_is_contained() -> None:
    """Encoder and decoder far apart: each removal multiplies x by up to 1e4."""
    skew = np.zeros((1, HIDDEN_SIZE))
    skew[0, 1] = 1e4
    file = rows_of("features", 1e4 * np.eye(1, HIDDEN_SIZE), skew, metadata=VectorMetadata(residual_norms={1: 50.0}))
    with pytest.raises(SteeringRequestError, match="grow|dose"):
        resolve_rows(file, "float16", op="feature", feature=0, scale=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from(["feature", "low_rank"]), st.integers(1, 4))
def test_the_bound_of_growth_holds(seed: int, op: str, count: int) -> None:
    """For random rows and any x, also the x that grows most."""
    rng = np.random.default_rng(seed)
    read, write = (rng.normal(size=(count, HIDDEN_SIZE)) / 4 for _ in range(2))
    kind = "features" if op == "feature" else "low_rank"
    file = rows_of(kind, read, write, bias={1: rng.normal(size=count).astype(np.float32)})
    fields: dict[str, Any] = {"feature": list(range(count)), "target": 0.5} if op == "feature" else {"scale": 0.75}
    edit = resolve_rows(file, op=op, **fields).edits[0].edit
    growth = edit.growth[0]
    read, write = file.read[1].astype(float), file.write[1].astype(float)
    change = write.T @ ((read - write) * 0.75) if op == "low_rank" else -write.T @ read
    worst = np.linalg.svd(np.eye(HIDDEN_SIZE) + change)[2][0]
    for x in (*rng.normal(size=(8, HIDDEN_SIZE)), 1e3 * worst, -1e3 * worst):
        before = read @ x + file.bias[1]
        if op == "feature":
            after = x + write.T @ (0.5 - np.maximum(before, 0.0))
        else:
            after = x + 0.75 * write.T @ (before - write @ x)
        assert np.linalg.norm(after) <= growth.factor * np.linalg.norm(x) + growth.amount + 1e-6


def test_every_operation_has_a_source_here() -> None:
    assert {Op.FEATURE, Op.LOW_RANK, Op.ROTATE} <= set(MODEL.ops)
    assert isinstance(file_source("jump"), RowSet)
