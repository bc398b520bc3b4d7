"""Resolving a spec: every refusal with its field and status, and the report of an answer."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
from helpers.random_specs import BY_DIGEST, HIDDEN_SIZE, MODEL, NUM_BLOCKS, VECTORS, source, specs
from helpers.random_specs import resolved as resolved_here
from hypothesis import given, settings

from steer_engine.containment import LARGEST_FINITE
from steer_engine.edit import ALL, GENERATION, PROMPT, Scope
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.model_shape import MAX_RUNS_SHOWN, ModelShape, describe_blocks
from steer_engine.parse import parse_spec
from steer_engine.resolve import ResolvedSpec, resolve
from steer_engine.resolve_vectors import MAX_REPEATED, Repeated
from steer_engine.settings import Limits
from steer_engine.spec import Op, SteeringSpec
from steer_engine.vectors import ControlVector, VectorMetadata
from steer_engine.vocabulary import Vocabulary

LIMITS = Limits()


def shape(**fields: Any) -> ModelShape:
    return ModelShape(**{**{name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__}, **fields})


def vector_of(
    size: float, block: int = 0, residual: float | None = None, hidden_size: int = HIDDEN_SIZE
) -> ControlVector:
    """A vector of norm `size` at one block."""
    direction_D = np.zeros(hidden_size, dtype=np.float32)
    direction_D[0] = size
    norms = {} if residual is None else {block: residual}
    return ControlVector(directions={block: direction_D}, metadata=VectorMetadata(residual_norms=norms))


def resolve_with(
    vector: ControlVector, model: ModelShape = MODEL, limits: Limits = LIMITS, **fields: Any
) -> ResolvedSpec:
    spec = parse_spec({"edits": [{"vector": "v", **fields}]})
    assert spec is not None
    return resolve(spec, {"v": vector, **VECTORS, vector.digest: vector}.__getitem__, model, limits)


def resolved(*edits: dict[str, Any], model: ModelShape = MODEL, limits: Limits = LIMITS, **rest: Any) -> ResolvedSpec:
    return resolved_here({"edits": [{"vector": "a", **edit} for edit in edits], **rest}, model, limits)


def refused(*edits: dict[str, Any], **rest: Any) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        resolved(*edits, **rest)
    return caught.value


# What is resolved


def test_names_become_digests() -> None:
    (edit,) = resolved({"scale": 1.5}).edits
    assert edit.edit.vector == VECTORS["a"].digest
    assert edit.edit.blocks == VECTORS["a"].blocks
    assert edit.edit.scales == (1.5,) * 4
    assert edit.edit.scope == ALL


@pytest.mark.parametrize(
    ("scope", "meant"),
    [
        ("all", ALL),
        ("prompt", PROMPT),
        ("generation", GENERATION),
        ({}, ALL),
        ({"start": -1}, GENERATION),
        ({"start": 3, "end": -2}, Scope.span(3, -2)),
    ],
)
def test_scopes(scope: Any, meant: Scope) -> None:
    assert resolved({"scope": scope}).edits[0].edit.scope == meant


def test_all_blocks_are_those_of_the_vector() -> None:
    assert resolved({"vector": "b"}).edits[0].edit.blocks == (1, 2, 3)
    assert resolved({"vector": "b", "blocks": "2-3"}).edits[0].edit.blocks == (2, 3)
    assert resolved({"vector": "b", "blocks": [3, 1, 3]}).edits[0].edit.blocks == (1, 3)


def test_residual_units_are_mean_residual_norms_of_the_block() -> None:
    vector = VECTORS["a"]
    (edit,) = resolved({"scale": 0.5, "unit": "residual", "blocks": [1, 2]}).edits
    for block, scale in zip((1, 2), edit.edit.scales, strict=True):
        assert scale * vector.norms[block] == pytest.approx(0.5 * vector.metadata.residual_norms[block], rel=1e-15)


def test_set_holds_both_ends_at_the_target() -> None:
    edit = resolved({"op": "set", "target": 2}).edits[0].edit
    assert (edit.lo, edit.hi) == (2.0, 2.0)


def test_an_open_gate_bound_lets_everything_through() -> None:
    gate = resolved({"gate": {"vector": "c", "max_cos": 0.5}}).edits[0].edit.gate
    assert gate is not None
    assert gate.vector == VECTORS["c"].digest
    assert gate.bounds[0][0] < -1
    assert {high for _, high in gate.bounds} == {0.5}


# Refusals: where, why, with which status


@pytest.mark.parametrize(
    ("edit", "param", "says"),
    [
        ({"vector": "nobody"}, "vector", "nobody"),
        ({"vector": "sha256:" + "0" * 64}, "vector", "sha256:0"),
        ({"gate": {"vector": "nobody", "min_cos": 0.1}}, "gate.vector", "nobody"),
    ],
)
def test_unknown_vectors(edit: dict[str, Any], param: str, says: str) -> None:
    error = refused({}, edit)
    assert isinstance(error, UnknownVectorError)
    assert (error.param, error.status) == (f"steering.edits[1].{param}", 404)
    assert says in error.message


def test_unknown_presets() -> None:
    with pytest.raises(UnknownVectorError) as caught:
        resolve(SteeringSpec(preset="calm\n"), source, MODEL, LIMITS)
    assert (caught.value.param, caught.value.status) == ("steering.preset", 404)
    assert r"'calm\n'" in caught.value.message


@pytest.mark.parametrize(
    ("edit", "param", "says"),
    [
        ({"scale": 1000.5}, "scale", "at most 1000"),
        ({"scale": -1000.5}, "scale", "at most 1000"),
        ({"scale": -1e300}, "scale", "-1e+300"),
        ({"blocks": 4}, "blocks", "0 to 3"),
        ({"blocks": "2-1000"}, "blocks", "Block 1000"),
        ({"vector": "d", "blocks": "1-2"}, "blocks", "no direction at blocks 1; it has 2"),
        ({"blocks": 1, "gate": {"vector": "d", "min_cos": 0.1}}, "gate.vector", "no direction at blocks 1"),
        ({"gate": {"vector": "b", "min_cos": 0.1}}, "gate.vector", "no direction at blocks 0"),
    ],
)
def test_refusals(edit: dict[str, Any], param: str, says: str) -> None:
    error = refused({}, edit)
    assert (error.param, error.status) == (f"steering.edits[1].{param}", 400)
    assert says in error.message


def test_vectors_of_another_model() -> None:
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector_of(1.0, hidden_size=HIDDEN_SIZE + 1))
    assert caught.value.param == "steering.edits[0].vector"
    assert "hidden size 17" in caught.value.message
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector_of(1.0, block=NUM_BLOCKS))
    assert caught.value.param == "steering.edits[0].blocks"


def test_gates_of_another_model() -> None:
    spec = parse_spec({"edits": [{"vector": "a", "blocks": 0, "gate": {"vector": "g", "min_cos": 0.0}}]})
    assert spec is not None
    vectors = {"a": VECTORS["a"], "g": vector_of(1.0, hidden_size=HIDDEN_SIZE + 1)}
    with pytest.raises(SteeringRequestError) as caught:
        resolve(spec, vectors.__getitem__, MODEL, LIMITS)
    assert caught.value.param == "steering.edits[0].gate.vector"


def test_more_edits_than_the_limit() -> None:
    assert len(resolved(*[{}] * 8).edits) == 8
    error = refused(*[{}] * 9)
    assert (error.param, error.status) == ("steering.edits", 400)
    assert "at most 8" in error.message
    assert refused({}, {}, limits=Limits(max_edits=1)).param == "steering.edits"


def test_more_vectors_than_the_limit() -> None:
    """Counted by content, those of gates included."""
    spec = parse_spec(
        {"edits": [{"vector": name, "gate": {"vector": "c", "min_cos": 0.0}} for name in ("a", "b", "a")]}
    )
    assert spec is not None
    vectors = {name: vector_of(size) for name, size in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    assert len(resolve(spec, vectors.__getitem__, MODEL, Limits(max_request_vectors=3)).vectors) == 3
    with pytest.raises(SteeringRequestError, match="3 different vectors; one request may name at most 2") as caught:
        resolve(spec, vectors.__getitem__, MODEL, Limits(max_request_vectors=2))
    assert (caught.value.param, caught.value.status) == ("steering.edits", 400)


def test_unarmed_operations() -> None:
    model = shape(ops=(Op.ADD, Op.SET))
    assert refused({"op": "ablate"}, model=model).param == "steering.edits[0].op"
    assert "armed: add, set" in refused({"op": "ablate"}, model=model).message
    resolved({"op": "set", "target": 1.0, "gate": {"vector": "a", "min_cos": 0.0}}, model=model, preserve_norm=True)


def test_a_graph_of_adds_only_has_neither_gates_nor_norms() -> None:
    model = shape(ops=(Op.ADD,))
    resolved({}, model=model)
    assert refused({"gate": {"vector": "a", "min_cos": 0.0}}, model=model).param == "steering.edits[0].gate"
    error = refused({}, model=model, preserve_norm=True)
    assert error.param == "steering.preserve_norm"
    assert "--steering-ops" in error.message


def test_unarmed_blocks() -> None:
    model = shape(armed_blocks=(1, 2))
    error = refused({}, model=model)
    assert error.param == "steering.edits[0].blocks"
    assert "Blocks 0, 3 are not armed here; armed: 1-2" in error.message
    resolved({"blocks": "1-2"}, model=model)


def test_rows_that_one_request_may_need() -> None:
    model = shape(rows=2)
    resolved({}, {"vector": "c"}, {"vector": "b"}, model=model)  # equal scopes: one row
    resolved({}, {"scope": "prompt"}, model=model)
    error = refused({}, {"scope": "prompt"}, {"scope": "generation"}, model=model)
    assert error.param == "steering.edits"
    assert "need 3 rows" in error.message
    assert "room for 2" in error.message
    assert "Each edit takes a row, each gate vector and each condition one more" in error.message
    assert refused({"gate": {"vector": "a", "min_cos": 0.0}}, model=shape(rows=1)).param == "steering.edits"


@pytest.mark.parametrize("rows", [2, 4])
def test_edits_without_gates_fit_if_each_has_a_row(rows: int) -> None:
    """`GET /v1/steering` publishes this number as `max_edits_per_block`."""
    edits = [{"op": "ablate" if i % 2 else "add", "vector": "abc"[i % 3]} for i in range(rows)]
    resolved(*edits, model=shape(rows=rows))
    assert refused(*edits, {"vector": "b"}, model=shape(rows=rows)).param == "steering.edits"


@pytest.mark.parametrize("op", ["add_relative", "ablate", "clamp", "set"])
def test_a_zero_vector_has_no_direction(op: str) -> None:
    fields = {"clamp": {"lo": 0.0}, "set": {"target": 0.0}}.get(op, {})
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector_of(0.0), op=op, **fields)
    assert caught.value.param == "steering.edits[0].vector"
    assert "zero at blocks 0" in caught.value.message


def test_adding_a_zero_vector_is_allowed() -> None:
    resolve_with(vector_of(0.0), scale=3.0)


def test_a_zero_vector_measures_nothing_and_gates_nothing() -> None:
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector_of(0.0, residual=1.0), unit="residual")
    assert caught.value.param == "steering.edits[0].vector"
    spec = parse_spec({"edits": [{"vector": "a", "blocks": 0, "gate": {"vector": "zero", "min_cos": 0.0}}]})
    assert spec is not None
    with pytest.raises(SteeringRequestError) as caught:
        resolve(spec, {"a": VECTORS["a"], "zero": vector_of(0.0)}.__getitem__, MODEL, LIMITS)
    assert caught.value.param == "steering.edits[0].gate.vector"


def test_residual_units_need_residual_norms() -> None:
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector_of(1.0), unit="residual")
    assert caught.value.param == "steering.edits[0].unit"


# Doses


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"scale": 10.1}, "scale"),
        ({"scale": -10.1}, "scale"),
        ({"scale": 10.1, "unit": "residual"}, "scale"),
        ({"scale": 10.1, "op": "add_relative"}, "scale"),
        ({"scale": -10.1, "op": "ablate"}, "scale"),
        ({"op": "set", "target": 20.2}, "target"),
        ({"op": "set", "target": -20.2}, "target"),
        ({"op": "clamp", "lo": 20.2}, "lo"),
        ({"op": "clamp", "hi": -20.2}, "hi"),
        ({"op": "clamp", "lo": -30.0, "hi": -20.2}, "hi"),
    ],
)
def test_doses_are_limited(fields: dict[str, Any], name: str) -> None:
    """At most 10 mean residual norms, which are 2 here, as the norm of the vector is."""
    vector = vector_of(2.0, residual=2.0)
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector, **fields)
    assert caught.value.param == f"steering.edits[0].{name}"
    assert "10.1 residual norms; at most 10" in caught.value.message
    smaller = {key: value * 99 / 101 if isinstance(value, float) else value for key, value in fields.items()}
    resolve_with(vector, **smaller)


@pytest.mark.parametrize("fields", [{"lo": -1e6}, {"hi": 1e6}, {"lo": -1e6, "hi": 1e6}])
def test_bounds_that_hold_nothing_back_are_no_dose(fields: dict[str, Any]) -> None:
    resolve_with(vector_of(2.0, residual=2.0), op="clamp", **fields)


def test_without_residual_norms_only_the_scale_is_limited() -> None:
    resolve_with(vector_of(2.0), scale=1000.0)
    resolve_with(vector_of(2.0), op="set", target=1e6)
    with pytest.raises(SteeringRequestError):
        resolve_with(vector_of(2.0), op="add_relative", scale=10.1)


# What device memory holds


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("fields", "name"),
    [({"op": "set", "target": 1.0}, "target"), ({"op": "clamp", "lo": -1.0}, "lo"), ({"op": "clamp", "hi": 1.0}, "hi")],
)
def test_bounds_fit_the_dtype(dtype: str, fields: dict[str, Any], name: str) -> None:
    largest = LARGEST_FINITE[dtype]
    fits = {key: value * largest if isinstance(value, float) else value for key, value in fields.items()}
    # A target beyond what the whole stream may hold is refused too, as a matter of all edits (test_containment.py).
    if fields["op"] == "set":
        with pytest.raises(SteeringRequestError, match="together"):
            resolve_with(vector_of(1.0), shape(dtype=dtype), **fits)
    else:
        resolve_with(vector_of(1.0), shape(dtype=dtype), **fits)
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector_of(1.0), shape(dtype=dtype), **{**fits, name: fits[name] * 1.001})
    assert caught.value.param == f"steering.edits[0].{name}"
    assert dtype in caught.value.message


def test_rows_that_overflow_float16() -> None:
    half = shape(dtype="float16")
    resolve_with(vector_of(100.0), half, scale=80.0)
    for vector, scale in ((vector_of(100.0), 82.0), (vector_of(70_000.0), 0.001)):
        with pytest.raises(SteeringRequestError) as caught:
            resolve_with(vector, half, scale=scale)
        assert caught.value.param == "steering.edits[0].scale"
        assert "float16" in caught.value.message
        resolve_with(vector, shape(dtype="bfloat16"), scale=scale)


def test_unit_rows_do_not_overflow() -> None:
    resolve_with(vector_of(1e30), shape(dtype="float16"), op="ablate")


def test_as_many_edits_as_allowed_do_not_overflow_together() -> None:
    """Eight adds of 32752 / 8 are one row, whose numbers are finite: the other half is left for the stream itself."""
    edit = {"vector": "v", "blocks": 0, "scale": 32752 / 8 / 100}
    spec = parse_spec({"edits": [edit] * 8})
    assert spec is not None
    template = resolve(spec, {"v": vector_of(100.0)}.__getitem__, shape(dtype="float16"), LIMITS).template
    (_, (placed,)) = template.sites[0]
    assert abs(placed.entry.c0) * 100.0 <= 65504


@pytest.mark.parametrize(("dtype", "size"), [("float16", 2.0**-16), ("float32", 1e-44), ("bfloat16", 1e-39)])
def test_rows_too_small_to_hold_their_vector(dtype: str, size: float) -> None:
    """They would round to something else or to nothing: steered by name only."""
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector_of(size), shape(dtype=dtype))
    assert caught.value.param == "steering.edits[0].vector"
    assert f"too small for {dtype}" in caught.value.message
    resolve_with(vector_of(1e-3), shape(dtype=dtype))


def test_coefficients_fit_float32() -> None:
    """A worker packs them as float32, and must not fail."""
    with pytest.raises(SteeringRequestError) as caught:
        resolve_with(vector_of(1e-38, residual=10.0), unit="residual", scale=50.0)
    assert caught.value.param == "steering.edits[0].scale"


# Digests


def test_a_digest_does_not_depend_on_names_or_the_order_of_adds() -> None:
    one = resolved({"vector": "a", "scale": 0.1}, {"vector": "b", "scale": 0.2}, {"vector": "a", "scale": 0.3})
    other = resolved({"vector": VECTORS["b"].digest, "scale": 0.2}, {"scale": 0.3}, {"scale": 0.1}, {"scale": 0})
    assert one.digest == other.digest
    assert re.fullmatch("sha256:[0-9a-f]{64}", one.digest)
    assert one.digest != resolved({"scale": 0.4}).digest


def test_a_digest_depends_on_scope_order_and_norms() -> None:
    requested: list[ResolvedSpec] = [
        resolved({}),
        resolved({"scope": "generation"}),
        resolved({"scope": {"end": 1}}),
        resolved({"scope": {"end": -1}}),
        resolved({}, preserve_norm=True),
        resolved({"op": "ablate"}, {}),
        resolved({}, {"op": "ablate"}),
        resolved({"blocks": 1}),
    ]
    assert len({spec.digest for spec in requested}) == len(requested)


def test_all_that_does_nothing_is_one() -> None:
    nothing = [
        resolved({"scale": 0}),
        resolved({"scale": 0}, preserve_norm=True),
        resolved({"scale": 2}, {"scale": -2}),
        resolved({"op": "ablate", "scope": {"start": 4, "end": 4}}),
    ]
    assert len({spec.digest for spec in nothing}) == 1
    assert nothing[0].vectors == {}
    assert nothing[0].report()["edits"] == []


# What travels to the compile step, and what the answer says


def by_digest(raw: dict[str, Any]) -> dict[str, Any]:
    """The same spec with digests in place of names."""
    edits = []
    for edit in raw["edits"]:
        named = dict(edit, vector=source(edit["vector"]).digest)
        if edit.get("gate"):
            named["gate"] = dict(edit["gate"], vector=source(edit["gate"]["vector"]).digest)
        edits.append(named)
    return {**raw, "edits": edits}


@settings(max_examples=80, deadline=None)
@given(specs())
def test_names_do_not_matter_after_resolving(raw: dict[str, Any]) -> None:
    requested, again = resolved_here(raw), resolved_here(by_digest(raw))
    assert again.digest == requested.digest
    assert again.template == requested.template
    assert again.vectors == requested.vectors
    assert not re.search('"[abcd]"', json.dumps(requested.template.at(7).to_wire())), "no name travels to the engine"


@settings(max_examples=80, deadline=None)
@given(specs())
def test_a_resolved_spec_carries_every_vector_of_its_program(raw: dict[str, Any]) -> None:
    """The registry may drop a vector after the request was resolved."""
    requested = resolved_here(raw)
    assert tuple(requested.vectors) == requested.template.vectors
    assert all(requested.vectors[digest] is BY_DIGEST[digest] for digest in requested.template.vectors)
    assert set(requested.template.at(7).vectors) <= set(requested.vectors)


def test_copies_of_a_request_share_its_resolved_spec() -> None:
    """vLLM deep-copies the sampling parameters of every request."""
    requested = resolved({"scale": 2.0})
    assert copy.deepcopy({"steering": requested})["steering"] is requested


def test_the_report() -> None:
    requested = resolved(
        {"scale": 1.5, "blocks": "1-2"},
        {"vector": VECTORS["b"].digest, "op": "clamp", "lo": -1, "scope": {"end": -2}},
        {"scale": 0},
        {"op": "set", "target": 0.5, "blocks": [2], "gate": {"vector": "c", "min_cos": 0.1}},
    )
    digests = {name: vector.digest for name, vector in VECTORS.items()}
    first, second, third = (requested.edits[i].edit.digest for i in (0, 1, 3))
    assert requested.report() == {
        "digest": requested.digest,
        "edits": [
            {
                "name": "a",
                "vector": digests["a"],
                "op": "add",
                "scale": 1.5,
                "unit": "vector",
                "blocks": [1, 2],
                "scope": "all",
                "digest": first,
            },
            {
                "vector": digests["b"],
                "op": "clamp",
                "scale": 1.0,
                "unit": "vector",
                "blocks": [1, 2, 3],
                "scope": {"start": None, "end": -2},
                "lo": -1.0,
                "digest": second,
            },
            {
                "name": "a",
                "vector": digests["a"],
                "op": "set",
                "scale": 1.0,
                "unit": "vector",
                "blocks": [2],
                "scope": "all",
                "target": 0.5,
                "gate": {"vector": digests["c"], "min_cos": 0.1},
                "digest": third,
            },
        ],
    }
    json.dumps(requested.report(), allow_nan=False)


def test_the_report_names_the_preset() -> None:
    spec = parse_spec({"edits": [{"vector": "a"}]})
    assert spec is not None
    report = resolve(spec, source, MODEL, LIMITS, preset="calm").report()
    assert report["preset"] == "calm"


@pytest.mark.parametrize(
    ("blocks", "text"),
    [((), ""), ((4,), "4"), ((0, 1, 2, 5), "0-2, 5"), ((1, 3, 5), "1, 3, 5"), (tuple(range(0, 40, 2)), None)],
)
def test_blocks_in_words(blocks: tuple[int, ...], text: str | None) -> None:
    if text is None:
        text = ", ".join(map(str, blocks[:MAX_RUNS_SHOWN])) + " and 12 more"
    assert describe_blocks(blocks) == text


def test_norms_are_computed_once() -> None:
    """Resolving asks for them per block: computing all of them each time took 30 ms a request at 32 x 4096."""
    vector = vector_of(1.0)
    assert vector.norms is vector.norms


# Capture


def with_capture(capture: dict[str, Any], capture_blocks: tuple[int, ...]) -> ResolvedSpec:
    return resolved_here({"capture": capture}, shape(capture_blocks=capture_blocks), LIMITS)


def test_a_capture_at_all_capture_blocks() -> None:
    found = with_capture({"positions": [0, -1]}, (1, 2))
    report = {"blocks": [1, 2], "positions": [0, -1], "scope": "prompt", "after": False}
    assert found.report()["capture"] == report
    assert found.report()["edits"] == []
    assert found.vectors == {}
    assert with_capture({"blocks": 2, "after": True}, (1, 2)).report()["capture"]["blocks"] == [2]


@pytest.mark.parametrize(("scope", "positions"), [("prompt", "last"), ("generation", "all"), ("all", "all")])
def test_the_rows_of_a_scope_that_names_no_positions(scope: str, positions: str) -> None:
    found = with_capture({"scope": scope}, (1, 2)).capture
    assert found is not None
    assert (found.scope, found.positions) == (scope, positions)
    assert with_capture({"scope": scope, "positions": "mean"}, (1, 2)).report()["capture"]["positions"] == "mean"


@pytest.mark.parametrize("scope", ["prompt", "generation"])
def test_no_capture_where_the_host_does_not_know_whose_rows_are_whose(scope: str) -> None:
    model = shape(capture_blocks=(1, 2), deals_rows_on_device=True)
    with pytest.raises(SteeringRequestError, match="enable_adaptive_verification.* Use a server without") as caught:
        resolved_here({"capture": {"scope": scope}}, model, LIMITS)
    assert caught.value.param == "steering.capture"


def test_a_capture_that_is_off_or_at_other_blocks() -> None:
    with pytest.raises(SteeringRequestError, match="--steering-capture") as caught:
        with_capture({}, ())
    assert caught.value.param == "steering.capture"
    with pytest.raises(SteeringRequestError, match="Blocks 0, 3 cannot be captured here; available: 1-2") as caught:
        with_capture({"blocks": [0, 1, 3]}, (1, 2))
    assert caught.value.param == "steering.capture.blocks"


def test_a_capture_is_no_part_of_the_digest() -> None:
    plain = resolved({"scale": 2.0}, model=shape(capture_blocks=(0,)))
    capturing = resolved({"scale": 2.0}, model=shape(capture_blocks=(0,)), capture={})
    assert capturing.digest == plain.digest
    assert capturing.template == plain.template


# Specs that come again


def named_source(vectors: dict[str, ControlVector], asked: list[str]) -> Any:
    def found(name: str) -> ControlVector:
        asked.append(name)
        if name not in vectors:
            raise UnknownVectorError(f"There is no control vector {name!r}.")
        return vectors[name]

    return found


SPEC = parse_spec({"edits": [{"vector": "a", "blocks": [1, 2]}, {"vector": "b", "op": "ablate"}]})
assert SPEC is not None


def test_a_spec_that_comes_again_is_resolved_once() -> None:
    asked: list[str] = []
    vectors, repeated = dict(VECTORS), Repeated[ResolvedSpec]()
    first = resolve(SPEC, named_source(vectors, asked), MODEL, LIMITS, repeated=repeated)
    assert set(asked) == {"a", "b"}
    again = parse_spec(json.dumps(SPEC.model_dump()))
    assert again is not None
    assert again is not SPEC
    assert resolve(again, named_source(vectors, asked), MODEL, LIMITS, repeated=repeated) is first
    for other in ({"edits": [{"vector": "a", "blocks": [1, 2], "scale": 0.5}]}, {"edits": [{"vector": "b"}]}):
        spec = parse_spec(other)
        assert spec is not None
        assert resolve(spec, source, MODEL, LIMITS, repeated=repeated).digest != first.digest
    assert resolve(SPEC, source, MODEL, LIMITS, repeated=repeated, preset="p").preset == "p"


@pytest.mark.parametrize("content", ["other", "equal"])
def test_a_name_that_stands_for_another_vector_is_resolved_anew(content: str) -> None:
    vectors, repeated = dict(VECTORS), Repeated[ResolvedSpec]()
    first = resolve(SPEC, named_source(vectors, []), MODEL, LIMITS, repeated=repeated)
    kept = vectors["b"]
    vectors["b"] = (
        VECTORS["c"] if content == "other" else ControlVector(directions=kept.directions, metadata=kept.metadata)
    )
    second = resolve(SPEC, named_source(vectors, []), MODEL, LIMITS, repeated=repeated)
    assert second is not first
    assert vectors["b"].digest in second.vectors
    assert (second.digest == first.digest) == (content == "equal")


def test_a_vector_that_is_gone_is_named_by_its_field() -> None:
    vectors, repeated = dict(VECTORS), Repeated[ResolvedSpec]()
    resolve(SPEC, named_source(vectors, []), MODEL, LIMITS, repeated=repeated)
    del vectors["b"]
    for _ in range(2):
        with pytest.raises(UnknownVectorError) as caught:
            resolve(SPEC, named_source(vectors, []), MODEL, LIMITS, repeated=repeated)
        assert caught.value.param == "steering.edits[1].vector"


def test_another_vocabulary_is_resolved_anew() -> None:
    repeated = Repeated[ResolvedSpec]()
    spec = parse_spec({"edits": [{"vector": "a", "scope": {"after": "x"}}]})
    assert spec is not None
    digests = {
        resolve(
            spec,
            source,
            MODEL,
            LIMITS,
            vocabulary=Vocabulary(lambda text, ids=ids: list(ids), 100, lambda name: "none"),
            repeated=repeated,
        ).digest
        for ids in ([5], [6])
    }
    assert len(digests) == 2


def test_a_limited_number_of_specs_is_kept() -> None:
    repeated = Repeated[ResolvedSpec]()
    for i in range(3 * MAX_REPEATED):
        spec = parse_spec({"edits": [{"vector": "a", "scale": i / 1000}]})
        assert spec is not None
        resolve(spec, source, MODEL, LIMITS, repeated=repeated)
        assert len(repeated._kept) <= MAX_REPEATED
