"""The `steering` field: what is accepted and refused, and that every refusal names the wrong field."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError
from steer_engine.fields import (
    MAX_BLOCK_NUMBER,
    MAX_ECHO_CHARS,
    MAX_FIELDS,
    MAX_NAME_CHARS,
    InlineVector,
    Strict,
    parse_blocks,
    shown,
)
from steer_engine.parse import parse_spec
from steer_engine.probe_spec import ProbeSpec, StopSpec
from steer_engine.scope import AllSpec, AnySpec, ConditionSpec, ExceptSpec, ScheduleSpec, ScopeSpec, TriggerSpec
from steer_engine.site import Site
from steer_engine.spec import MAX_EDITS, MAX_SPEC_CHARS, CaptureSpec, EditSpec, Gate, Op, SteeringSpec
from steer_engine.vectors.metadata import MAX_BLOCKS

MAX_MESSAGE_CHARS = 300
HUGE = 10**400
BEYOND_PRINTING = 10**5000
"""Python refuses to turn this one into text."""

# Paths that a machine could give away, and words of the libraries that read the field.
FORBIDDEN = re.compile(r"/\w+/|\.py|pydantic|set_int_max_str_digits|Traceback|instance of", re.IGNORECASE)


def one(**fields: Any) -> dict[str, Any]:
    return {"edits": [{"vector": "v", **fields}]}


def refused(raw: Any) -> SteeringRequestError:
    with pytest.raises(SteeringRequestError) as caught:
        parse_spec(raw)
    error = caught.value
    assert_presentable(error)
    return error


def assert_presentable(error: SteeringRequestError) -> None:
    assert error.param is not None
    assert error.param.startswith("steering")
    assert len(error.param) <= 2 * MAX_ECHO_CHARS
    assert 10 < len(error.message) <= MAX_MESSAGE_CHARS
    assert error.message.isprintable()
    assert error.param.isprintable()
    error.message.encode()
    assert error.message.endswith(".")
    assert not FORBIDDEN.search(error.message)


# What is accepted


@pytest.mark.parametrize("raw", [None, False, "null", "false", " null "])
def test_no_steering_requested(raw: Any) -> None:
    assert parse_spec(raw) is None


def test_the_schema_of_the_documentation_reads_as_documented() -> None:
    spec = parse_spec(
        """{"edits": [{"vector": "cheerful", "scale": 1.5, "op": "add", "unit": "vector", "blocks": "8-22",
            "scope": "all", "gate": {"vector": "sad", "min_cos": 0.1}, "lo": null, "hi": null, "target": null}],
            "preserve_norm": false}"""
    )
    assert spec is not None
    assert spec.edits == [
        EditSpec(vector="cheerful", scale=1.5, blocks="8-22", gate=Gate(vector="sad", min_cos=0.1)),
    ]
    assert not spec.preserve_norm


def test_defaults() -> None:
    spec = parse_spec(one())
    assert spec is not None
    assert spec.edits is not None
    edit = spec.edits[0]
    assert (edit.scale, edit.op, edit.unit, edit.blocks, edit.scope) == (1.0, Op.ADD, "vector", "all", "all")
    assert (edit.gate, edit.lo, edit.hi, edit.target) == (None, None, None, None)


SMALLEST: dict[type[Strict], dict[str, Any]] = {
    SteeringSpec: {"edits": [{"vector": "v"}]},
    EditSpec: {"vector": "v"},
    InlineVector: {"data": "AAAA"},
    Gate: {"vector": "v", "min_cos": 0.0},
    ScheduleSpec: {"kind": "linear", "over": 4, "to": 0.5},
    ConditionSpec: {"vector": "v"},
    AnySpec: {"any": [{"vector": "v"}]},
    AllSpec: {"all": [{"vector": "v"}]},
    ScopeSpec: {"start": 1},
    ExceptSpec: {"after": "x"},
    TriggerSpec: {"after": "x"},
    ProbeSpec: {"name": "p", "vector": "v"},
    StopSpec: {"probe": "p", "above": 1.0},
    CaptureSpec: {},
}
"""An object of each class of the schema, as a client that leaves out what it may writes it."""


def strict_classes(base: type[Strict] = Strict) -> set[type[Strict]]:
    below = set(base.__subclasses__())
    return below.union(*(strict_classes(each) for each in below))


def test_every_class_of_the_schema_is_here() -> None:
    assert strict_classes() == set(SMALLEST)


@pytest.mark.parametrize("schema", SMALLEST, ids=lambda schema: schema.__name__)
def test_null_is_the_same_as_leaving_an_optional_field_out(schema: type[Strict]) -> None:
    """Typed clients and tables send null for every field that they do not set."""
    fields, plain = SMALLEST[schema], schema.model_validate(SMALLEST[schema])
    nulls = dict.fromkeys(name for name in schema.field_names() if name not in fields)
    assert schema.model_validate({**fields, **nulls}) == plain
    for name in nulls:
        assert schema.model_validate({**fields, name: None}) == plain
    for name, field in schema.model_fields.items():
        if field.is_required():
            with pytest.raises(ValidationError, match="Field required"):
                schema.model_validate({**fields, field.alias or name: None})
    with pytest.raises(ValidationError, match="Extra inputs"):
        schema.model_validate({**fields, "strength": None})


def test_nulls_in_every_object_of_a_request_change_nothing() -> None:
    raw = {
        "edits": [
            {
                "vector": "v",
                "gate": SMALLEST[Gate],
                "scope": {"start": 1, "except": SMALLEST[ExceptSpec]},
                "schedule": SMALLEST[ScheduleSpec],
                "when": {"any": [{"vector": "v"}]},
            },
            {"vector": SMALLEST[InlineVector], "when": {"all": [{"vector": "v"}]}},
            {"vector": "v", "when": {"vector": "v", "above": 0.5}},
        ],
        "probes": [SMALLEST[ProbeSpec]],
        "stop": [SMALLEST[StopSpec]],
        "capture": {},
    }

    def with_nulls(value: Any, schema: type[Strict] | None) -> Any:
        if isinstance(value, list):
            return [with_nulls(each, schema) for each in value]
        if not isinstance(value, dict):
            return value
        if schema is None:
            schema = next(each for each in (AnySpec, AllSpec, ConditionSpec) if value.keys() <= set(each.field_names()))
        names = schema.field_names()
        return dict.fromkeys(names) | {name: with_nulls(inner, BELOW.get(name)) for name, inner in value.items()}

    spec = parse_spec(with_nulls(raw, SteeringSpec))
    assert spec is not None
    assert spec == parse_spec(raw)
    assert refused({"edits": [{"vector": None}]}).param == "steering.edits[0].vector"
    assert refused({"edits": [{"vector": "v", "strength": None}]}).param == "steering.edits[0].strength"


BELOW: dict[str, type[Strict]] = {
    "edits": EditSpec,
    "vector": InlineVector,
    "gate": Gate,
    "scope": ScopeSpec,
    "except": ExceptSpec,
    "schedule": ScheduleSpec,
    "probes": ProbeSpec,
    "stop": StopSpec,
    "capture": CaptureSpec,
}
"""The class of the objects in a field; those of conditions have one of three."""


def test_a_mapping_and_its_text_read_alike() -> None:
    raw = one(scale=-2, blocks=[9, 8], scope={"start": -4}, gate={"vector": "g", "max_cos": 0})
    spec = parse_spec(raw)
    assert spec == parse_spec(json.dumps(raw))
    assert spec is not None
    assert parse_spec(spec) is spec


def test_whole_numbers_are_numbers() -> None:
    spec = parse_spec(one(op="set", target=2))
    assert spec is not None
    assert spec.edits is not None
    assert isinstance(spec.edits[0].target, float)


@pytest.mark.parametrize("op", list(Op))
def test_every_operation_is_read_by_its_name(op: Op) -> None:
    fields = {
        Op.CLAMP: {"lo": -1.0},
        Op.SET: {"target": 0.0},
        Op.FEATURE: {"feature": 3, "scale": 0},
        Op.ROTATE: {"toward": "sad", "degrees": 30},
    }.get(op, {"scale": 0.5})
    spec = parse_spec(one(op=op.value, **fields))
    assert spec is not None
    assert spec.edits is not None
    assert spec.edits[0].op is op


@pytest.mark.parametrize(
    "scope", ["all", "prompt", "generation", {}, {"start": None}, {"start": -5, "end": None}, {"start": 0, "end": -1}]
)
def test_scopes(scope: Any) -> None:
    spec = parse_spec(one(scope=scope))
    assert spec is not None
    assert spec.edits is not None
    assert spec.edits[0].scope == (scope if isinstance(scope, str) else ScopeSpec(**scope))


def test_an_inline_vector() -> None:
    spec = parse_spec({"edits": [{"vector": {"data": "AAAA"}}]})
    assert spec is not None
    assert spec.edits is not None
    assert spec.edits[0].vector == InlineVector(data="AAAA")


def test_a_preset_alone() -> None:
    spec = parse_spec({"preset": "calm"})
    assert spec is not None
    assert (spec.edits, spec.preset) == (None, "calm")


def test_a_capture_alone_or_beside_what_steers() -> None:
    capture = {"blocks": "1-2", "site": "mlp", "positions": [0, -1], "after": True}
    for other in ({}, {"preset": "calm"}, one()):
        spec = parse_spec(other | {"capture": capture})
        assert spec is not None
        assert spec.capture == CaptureSpec(**capture)
    plain = CaptureSpec(blocks="all", site=Site.BLOCK, scope="prompt", positions=None, after=False)
    assert parse_spec({"capture": {}}) == SteeringSpec(capture=plain)


@pytest.mark.parametrize("scope", ["prompt", "generation", "all"])
@pytest.mark.parametrize("positions", ["last", "mean", "all", [0, -1]])
def test_token_numbers_are_of_the_prompt(scope: Any, positions: Any) -> None:
    capture = {"scope": scope, "positions": positions}
    if scope != "prompt" and isinstance(positions, list):
        error = refused({"capture": capture})
        assert error.param == "steering.capture.positions"
        assert "use 'all', 'mean' or 'last'" in str(error)
    else:
        spec = parse_spec({"capture": capture})
        assert spec is not None
        assert spec.capture == CaptureSpec(**capture)


@pytest.mark.parametrize(
    ("capture", "param"),
    [
        ({"blocks": [-1]}, ".blocks"),
        ({"positions": "first"}, ".positions"),
        ({"positions": []}, ".positions"),
        ({"positions": [0.5]}, ".positions[0]"),
        ({"positions": [0, 2**40]}, ".positions[1]"),
        ({"positions": list(range(1025))}, ".positions"),
        ({"positions": {"start": 0}}, ".positions"),
        ({"after": 1}, ".after"),
        ({"site": "residual"}, ".site"),
        ({"site": ["mlp"]}, ".site"),
        ({"scope": "answer"}, ".scope"),
        ({"scope": {"start": 0}}, ".scope"),
        ({"scope": ["all"]}, ".scope"),
        ({"layers": 3}, ".layers"),
        ("all", ""),
        (True, ""),
    ],
)
def test_what_a_capture_is_not(capture: Any, param: str) -> None:
    assert refused({"capture": capture}).param == f"steering.capture{param}"


def test_a_kept_norm_without_edits() -> None:
    assert refused({"capture": {}, "preserve_norm": True}).param == "steering.preserve_norm"


def test_the_last_of_repeated_keys_counts() -> None:
    """As in every JSON parser of the serving stack: text and body must not mean two things."""
    spec = parse_spec('{"edits": [], "edits": [{"vector": "v", "scale": 1, "scale": 2}]}')
    assert spec is not None
    assert spec.edits == [EditSpec(vector="v", scale=2.0)]


def test_the_schema_is_published_in_full() -> None:
    schema = SteeringSpec.model_json_schema()
    assert set(schema["properties"]) == {"edits", "preserve_norm", "when", "preset", "probes", "stop", "capture"}
    assert set(schema["$defs"]["EditSpec"]["properties"]) == set(EditSpec.model_fields)
    assert not schema["$defs"]["EditSpec"]["additionalProperties"]


def test_specs_cannot_be_changed() -> None:
    spec = parse_spec(one())
    assert spec is not None
    with pytest.raises(ValidationError, match="frozen"):
        spec.preserve_norm = True  # type: ignore[misc]


# Blocks


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [
        ("all", None),
        ("8-11", (8, 9, 10, 11)),
        ("14", (14,)),
        ("7-7", (7,)),
        ("007", (7,)),
        (14, (14,)),
        (0, (0,)),
        ([9, 8, 8], (8, 9)),
        (f"0-{MAX_BLOCK_NUMBER}", tuple(range(MAX_BLOCK_NUMBER + 1))),
    ],
)
def test_forms_of_blocks(blocks: Any, numbers: tuple[int, ...] | None) -> None:
    assert parse_blocks(blocks) == numbers
    spec = parse_spec(one(blocks=blocks))
    assert spec is not None
    assert spec.edits is not None
    assert spec.edits[0].blocks == blocks


def test_blocks_reach_as_far_as_those_of_vectors() -> None:
    assert MAX_BLOCK_NUMBER == MAX_BLOCKS - 1


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ("", "'8-22'"),
        ("ALL", "'8-22'"),
        ("8-", "'8-22'"),
        ("-8", "'8-22'"),
        ("8 - 22", "'8-22'"),
        ("8-22-30", "'8-22'"),
        ("8,9", "'8-22'"),
        ("8\n", "'8-22'"),
        ("\u0663", "'8-22'"),
        ("0x10", "'8-22'"),
        ("999999999999", "'8-22'"),
        ("22-8", "write '8-22'"),
        ("0-1024", "1024"),
        ("99999", "99999"),
        (-1, "-1"),
        (MAX_BLOCK_NUMBER + 1, "0 to 1023"),
        (10**30, "huge number"),
        ([3, -10], "-10"),
        ([], "leave it out"),
        ([0] * (MAX_BLOCK_NUMBER + 2), "at most 1024 items"),
        (True, "true"),
        (1.5, "1.5"),
        ({"start": 1}, "an object"),
        ("x" * MAX_NAME_CHARS, "xxx..."),
        ("x" * (MAX_NAME_CHARS + 1), "128"),
    ],
)
def test_bad_blocks(blocks: Any, says: str) -> None:
    error = refused(one(blocks=blocks))
    assert error.param == "steering.edits[0].blocks"
    assert says in error.message


def test_block_numbers_beyond_printing() -> None:
    for blocks in (BEYOND_PRINTING, -BEYOND_PRINTING, [3, BEYOND_PRINTING]):
        assert "huge number" in refused(one(blocks=blocks)).message


@pytest.mark.parametrize(("blocks", "place"), [([True], 0), ([1, "2"], 1), ([1, 2, 3.0], 2), ([[1]], 0), ([None], 0)])
def test_bad_items_of_a_list_of_blocks(blocks: Any, place: int) -> None:
    assert refused(one(blocks=blocks)).param == f"steering.edits[0].blocks[{place}]"


# Refusals name their field


@pytest.mark.parametrize("field", ["scale", "lo", "hi", "target"])
@pytest.mark.parametrize(
    "value", ["1", "NaN", True, False, [], {}, float("nan"), float("inf"), -float("inf"), HUGE, -HUGE, 1j, b"1"]
)
def test_numbers_are_finite_numbers(field: str, value: Any) -> None:
    assert refused(one(**{field: value})).param == f"steering.edits[0].{field}"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_json_text_has_no_other_numbers(number: str) -> None:
    error = refused(f'{{"edits": [{{"vector": "v", "scale": {number}}}]}}')
    assert error.param == "steering"
    assert number in error.message


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" + "0" * 400])
def test_numbers_too_large_for_a_float(number: str) -> None:
    assert refused(f'{{"edits": [{{"vector": "v", "scale": {number}}}]}}').param == "steering.edits[0].scale"


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ({}, "steering"),
        ({"edits": None}, "steering"),
        ({"edits": [{"vector": "v"}], "preset": "p"}, "steering"),
        ({"preset": "p", "preserve_norm": True}, "steering.preserve_norm"),
        ({"preset": ""}, "steering.preset"),
        ({"preset": 5}, "steering.preset"),
        ({"preset": "p" * 200}, "steering.preset"),
        ({"edits": []}, "steering.edits"),
        ({"edits": {}}, "steering.edits"),
        ({"edits": "v"}, "steering.edits"),
        ({"edits": ["v"]}, "steering.edits[0]"),
        ({"edits": [{"vector": "v"}, None]}, "steering.edits[1]"),
        ({"edits": [{"vector": "v"}], "preserve_norm": 1}, "steering.preserve_norm"),
        ({"edits": [{"vector": "v"}], "preserve_norm": "yes"}, "steering.preserve_norm"),
        ({"edits": [{"vector": "v"}], "scale": 1}, "steering.scale"),
        ({"Edits": []}, "steering.Edits"),
        (one(weight=1), "steering.edits[0].weight"),
        ({"edits": [{"vector": "v"}, {"vector": "v", "scales": 1}]}, "steering.edits[1].scales"),
        ({"edits": [{}]}, "steering.edits[0].vector"),
        ({"edits": [{"vector": ""}]}, "steering.edits[0].vector"),
        ({"edits": [{"vector": "v" * 10_000}]}, "steering.edits[0].vector"),
        ({"edits": [{"vector": 5}]}, "steering.edits[0].vector"),
        ({"edits": [{"vector": None}]}, "steering.edits[0].vector"),
        ({"edits": [{"vector": ["v"]}]}, "steering.edits[0].vector"),
        ({"edits": [{"vector": {}}]}, "steering.edits[0].vector.data"),
        ({"edits": [{"vector": {"data": 5}}]}, "steering.edits[0].vector.data"),
        ({"edits": [{"vector": {"data": ""}}]}, "steering.edits[0].vector.data"),
        ({"edits": [{"vector": {"data": "AAAA", "path": "x"}}]}, "steering.edits[0].vector.path"),
        (one(op="frob"), "steering.edits[0].op"),
        (one(op="ADD"), "steering.edits[0].op"),
        (one(op=[]), "steering.edits[0].op"),
        (one(unit="sigma"), "steering.edits[0].unit"),
        (one(unit=1), "steering.edits[0].unit"),
        (one(scope="everything"), "steering.edits[0].scope"),
        (one(scope=[0, 5]), "steering.edits[0].scope"),
        (one(scope=5), "steering.edits[0].scope"),
        (one(scope={"start": "0"}), "steering.edits[0].scope.start"),
        (one(scope={"start": True}), "steering.edits[0].scope.start"),
        (one(scope={"end": 1.0}), "steering.edits[0].scope.end"),
        (one(scope={"end": 2**30 + 1}), "steering.edits[0].scope.end"),
        (one(scope={"start": -(2**30) - 1}), "steering.edits[0].scope.start"),
        (one(scope={"start": HUGE}), "steering.edits[0].scope.start"),
        (one(scope={"begin": 0}), "steering.edits[0].scope.begin"),
        (one(gate="sad"), "steering.edits[0].gate"),
        (one(gate={}), "steering.edits[0].gate.vector"),
        (one(gate={"vector": "g"}), "steering.edits[0].gate"),
        (one(gate={"vector": "", "min_cos": 0.1}), "steering.edits[0].gate.vector"),
        (one(gate={"vector": {"data": "AAAA"}, "min_cos": 0.1}), "steering.edits[0].gate.vector"),
        (one(gate={"vector": "g", "min_cos": 1.5}), "steering.edits[0].gate.min_cos"),
        (one(gate={"vector": "g", "max_cos": -1.5}), "steering.edits[0].gate.max_cos"),
        (one(gate={"vector": "g", "min_cos": float("nan")}), "steering.edits[0].gate.min_cos"),
        (one(gate={"vector": "g", "min_cos": "0.1"}), "steering.edits[0].gate.min_cos"),
        (one(gate={"vector": "g", "min_cos": 0.5, "max_cos": 0.1}), "steering.edits[0].gate.min_cos"),
        (one(gate={"vector": "g", "min_cos": 0.1, "scale": 1}), "steering.edits[0].gate.scale"),
        (one(lo=1), "steering.edits[0].lo"),
        (one(hi=1), "steering.edits[0].hi"),
        (one(op="set", target=1, hi=1), "steering.edits[0].hi"),
        (one(op="clamp"), "steering.edits[0].lo"),
        (one(op="clamp", lo=2, hi=1), "steering.edits[0].lo"),
        (one(op="clamp", lo=1, scale=2), "steering.edits[0].scale"),
        (one(op="set"), "steering.edits[0].target"),
        (one(op="set", target=1, scale=2), "steering.edits[0].scale"),
        (one(target=1), "steering.edits[0].target"),
        (one(op="clamp", lo=1, target=1), "steering.edits[0].target"),
        (one(op="ablate", unit="residual"), "steering.edits[0].unit"),
        (one(op="add_relative", unit="residual"), "steering.edits[0].unit"),
    ],
)
def test_a_refusal_names_the_field(raw: Any, param: str) -> None:
    assert refused(raw).param == param
    try:
        text = json.dumps(raw, allow_nan=False)
    except ValueError:
        return
    assert refused(text).param == param


def test_a_refusal_says_value_and_what_is_valid() -> None:
    assert refused(one(scale="1")).message == ("steering.edits[0].scale: Input should be a valid number, not '1'.")
    assert refused({"edits": [{"vector": 5}]}).message == (
        "steering.edits[0].vector: must be a vector's name, its digest 'sha256:...', or {'data': base64 of a "
        "safetensors file}, not 5."
    )
    assert refused(one(scope={"begin": 0})).message == (
        "steering.edits[0].scope: unknown field 'begin'; valid fields: after, until, each, tokens, from, start, end, "
        "except."
    )
    assert refused(one(gate="sad")).message == "steering.edits[0].gate: must be an object, not 'sad'."


@pytest.mark.parametrize("raw", [True, 5, 1.5, [], [{}], b"{}", object(), "[]", "5", '"null"', "true"])
def test_only_objects_are_specs(raw: Any) -> None:
    error = refused(raw)
    assert error.param == "steering"
    assert "object" in error.message


# Hostile input


@pytest.mark.parametrize(
    "text", ["", " ", "{", "{'edits': []}", "\x00", "{}{}", '{"edits": [}', "\ud800", "nul", "\ufeff{}"]
)
def test_text_that_is_no_json(text: str) -> None:
    error = refused(text)
    assert error.param == "steering"
    assert "not valid JSON" in error.message


@pytest.mark.parametrize("opening", ["[", '{"edits":', '{"edits":[{"vector":', '{"a":['])
def test_deeply_nested_text(opening: str) -> None:
    error = refused(opening * (MAX_SPEC_CHARS // len(opening)))
    assert error.param == "steering"
    assert "nested too deeply" in error.message


def test_deeply_nested_objects() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    assert refused({"edits": nested}).param == "steering.edits[0]"
    assert refused(one(scope=nested)).param == "steering.edits[0].scope"
    while nested:  # A deep list is taken apart by hand: its own destructor would recurse.
        nested = nested.pop()


def test_text_has_a_largest_size() -> None:
    fits = json.dumps(one()).ljust(MAX_SPEC_CHARS)
    assert parse_spec(fits) is not None
    with pytest.raises(PayloadTooLargeError) as caught:
        parse_spec(fits + " ")
    assert caught.value.status == 413
    assert_presentable(caught.value)


def test_numbers_of_many_digits_in_text() -> None:
    error = refused(f'{{"edits": [{{"vector": "v", "scale": {"1" * 5000}}}]}}')
    assert "too many digits" in error.message


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"])
def test_lone_surrogates(name: str) -> None:
    assert refused({"edits": [{"vector": name}]}).param == "steering.edits[0].vector"
    assert refused(json.dumps({"edits": [{"vector": name}]})).param == "steering.edits[0].vector"
    assert refused({"preset": name}).param == "steering.preset"
    refused(one(blocks=name))
    refused(one(**{name: 1}))
    refused({name: 1})


@pytest.mark.parametrize("key", ["a\x00b", "a\nb", "k" * 10_000, "\u202e", "", "<name>", "edits[0].scale", "é" * 100])
def test_strange_keys_are_shown_safely(key: str) -> None:
    error = refused({key: 1})
    assert error.param is not None
    assert error.param.startswith("steering.")
    assert "unknown field" in error.message
    assert refused(one(**{key: 1})).param == "steering.edits[0]" + error.param.removeprefix("steering")


@pytest.mark.parametrize("raw", [{1: 2}, {None: 1}, {"edits": [{"vector": "v", 3: 1}]}, {(1, 2): 3}])
def test_keys_that_are_no_text(raw: Any) -> None:
    refused(raw)


def test_more_edits_than_the_schema_accepts() -> None:
    assert parse_spec({"edits": [{"vector": "v"}] * MAX_EDITS}) is not None
    assert refused({"edits": [{"vector": "v"}] * (MAX_EDITS + 1)}).param == "steering.edits"


@pytest.mark.parametrize(
    "raw",
    [
        {"edits": [{}] * MAX_EDITS},
        {"edits": [{"vector": 1, "blocks": [None] * 1024, "scope": 1}] * MAX_EDITS},
        {"edits": [{"vector": "v", **{f"k{i}": 1 for i in range(MAX_FIELDS - 1)}}] * MAX_EDITS},
        {f"k{i}": 1 for i in range(200_000)},
        {"edits": [{"vector": "v", "blocks": "0-99999"}] * MAX_EDITS},
        {"edits": [{"vector": "v", "blocks": list(range(1024, 0, -1)), "scope": {f"k{i}": i for i in range(9999)}}]},
    ],
    ids=["missing", "wrong", "unknown", "keys", "ranges", "deep"],
)
def test_many_mistakes_cost_no_more_than_one(raw: Any) -> None:
    """A list of all mistakes, gone through once per mistake, took minutes on the second of these."""
    started = time.process_time()
    refused(raw)
    assert time.process_time() - started < 0.5


def test_an_unknown_field_among_many() -> None:
    error = refused({f"k{i}": 1 for i in range(MAX_FIELDS + 1)})
    assert error.param == "steering"
    assert "valid fields: edits, preserve_norm, when, preset" in error.message


# Nothing but SteeringRequestError comes out

_OBJECTS = (SteeringSpec, EditSpec, Gate, ScopeSpec, ScheduleSpec, ConditionSpec, AnySpec, AllSpec)
_FIELD_NAMES = [*(name for each in _OBJECTS for name in each.field_names()), "data"]
_WORDS = ["all", "add", "clamp", "set", "generation", "residual", "8-22", "sha256:" + "0" * 64, "v", "", "\ud800", "\0"]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([HUGE, -HUGE, 10**4299, 2**31, 2**63, 2**64, -(2**30) - 1])
    | st.floats()
    | st.sampled_from(_WORDS)
    | st.text(max_size=8)
    | st.text(alphabet=st.characters(exclude_categories=()), max_size=4)
    | st.binary(max_size=4)
)
keys = st.sampled_from(_FIELD_NAMES) | st.text(max_size=4) | st.sampled_from(["\ud800", "x" * 10_000])
json_like = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6), max_leaves=20
)
# Mostly the right fields with anything in them: plain JSON would seldom get past the outermost object.
gates = json_like | st.dictionaries(st.sampled_from([*Gate.model_fields]), json_like, max_size=3)
scopes = json_like | st.dictionaries(st.sampled_from(ScopeSpec.field_names()), json_like, max_size=2)
schedules = json_like | st.dictionaries(st.sampled_from(ScheduleSpec.field_names()), json_like, max_size=3)
conditions = json_like | st.dictionaries(st.sampled_from(ConditionSpec.field_names()), json_like, max_size=3)
whens = conditions | st.dictionaries(st.sampled_from(["any", "all"]), st.lists(conditions, max_size=2), max_size=2)
edits = st.fixed_dictionaries(
    {"vector": st.just("v") | json_like},
    optional={
        name: json_like for name in EditSpec.model_fields if name not in ("vector", "gate", "scope", "schedule", "when")
    }
    | {"gate": gates, "scope": scopes, "schedule": schedules, "when": whens},
)
specs = (
    json_like
    | st.dictionaries(keys, json_like, max_size=6)
    | st.builds(
        lambda edits, rest: {"edits": edits, **rest},
        st.lists(edits, max_size=3),
        st.dictionaries(st.sampled_from(["preserve_norm", "preset"]), json_like, max_size=1)
        | st.builds(dict, when=whens),
    )
)


@settings(max_examples=150, deadline=None)
@given(specs)
@example({"edits": [{"vector": "v", "blocks": BEYOND_PRINTING}]})
@example({"edits": [{"vector": "v", "scale": BEYOND_PRINTING}]})
@example({"\ud800": {}})
def test_any_json_like_value_is_read_or_refused(raw: Any) -> None:
    try:
        spec = parse_spec(raw)
    except SteeringRequestError as error:
        assert_presentable(error)
        return
    if spec is not None:
        for edit in spec.edits or []:
            parse_blocks(edit.blocks)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40) | specs.map(lambda raw: json.dumps(raw, default=repr, skipkeys=True)))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_spec(text)
    except SteeringRequestError as error:
        assert_presentable(error)


# Values in messages


@given(scalars | json_like)
def test_shown_values_are_short_and_printable(value: Any) -> None:
    text = shown(value)
    assert 0 < len(text) <= MAX_ECHO_CHARS
    assert text.isprintable()
    text.encode()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a'b", '"a\'b"'),
        ("x" * 80, "'" + "x" * 75 + "...'"),
        ("x" * 78, "'" + "x" * 78 + "'"),
        (None, "null"),
        (True, "true"),
        (12, "12"),
        (2**63, "a huge number"),
        (1.5, "1.5"),
        ([1], "an array"),
        ({}, "an object"),
        (b"", "a bytes"),
    ],
)
def test_shown_values(value: Any, text: str) -> None:
    assert shown(value) == text


def test_max_chars_holds_for_objects_as_for_text() -> None:
    spec = {"edits": [{"vector": "a", "blocks": list(range(100)), "scale": 1.5}] * 4}
    text = json.dumps(spec, separators=(",", ":"))
    for form in (spec, text):
        assert parse_spec(form, len(text)) is not None
        with pytest.raises(PayloadTooLargeError, match="max_spec_bytes"):
            parse_spec(form, len(text) // 2)
    assert parse_spec(spec) is not None, "a preset's own length is limited where it is stored"


def test_an_inline_vector_does_not_count_as_length_of_the_spec() -> None:
    spec = {"edits": [{"vector": {"data": "A" * 10_000}}]}
    assert parse_spec(spec, 100) is not None
    assert parse_spec(json.dumps(spec), 100, 7_500) is not None
    with pytest.raises(PayloadTooLargeError, match="max_spec_bytes"):
        parse_spec(json.dumps(spec), 100, 7_000)
    with pytest.raises(PayloadTooLargeError, match="max_spec_bytes"):
        parse_spec(json.dumps({"preset": "a" * 200, "preserve_norm": False}), 100, 7_500)


@pytest.mark.parametrize(
    "spec",
    [
        {"edits": [{"vector": "a"}] * 2**20},
        {"x" * 2**20: 1},
        {"edits": [{"vector": "a", "scale": 10**100_000}]},
        {"edits": [[[{"a": [0] * 2**20}]]]},
    ],
)
def test_a_long_object_is_refused_before_it_is_read(spec: dict[str, Any]) -> None:
    began = time.process_time()
    with pytest.raises(PayloadTooLargeError):
        parse_spec(spec, 65_536 // 8)
    assert time.process_time() - began < 0.5
