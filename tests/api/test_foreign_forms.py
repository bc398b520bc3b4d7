"""Other servers' requests: mapped exactly, or refused with the reason; never a path."""

from __future__ import annotations

import base64
import json
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zstandard

from steer_engine.api.answers import status_of
from steer_engine.api.body_search import Found, search_fields
from steer_engine.api.foreign_forms import ForeignSteering
from steer_engine.api.frontend import Frontend
from steer_engine.api.request_field import steering_of
from steer_engine.errors import PayloadTooLargeError, SteeringRequestError
from steer_engine.model_shape import ModelShape
from steer_engine.parse import parse_spec
from steer_engine.settings import ALL_OPS, Limits, SteeringConfig
from steer_engine.vectors.safetensors_format import from_bytes

SHAPE = ModelShape(hidden_size=4, num_blocks=12, armed_blocks=tuple(range(12)), ops=ALL_OPS, rows=4, dtype="float32")
BOTH = {"phases": ["prompt", "generation"]}
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


def spec_of(body: dict[str, Any], **limits: int) -> dict[str, Any]:
    """The spec that a request with another server's form means."""
    requested = steering_of(body)
    assert isinstance(requested, ForeignSteering)
    return requested.to_spec(Limits(**limits), SHAPE)


def easysteer(**fields: Any) -> dict[str, Any]:
    return {"steering": {"vectors": [{"source": "happy", "apply": BOTH} | fields]}}


def hotwire(*entries: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"hotwire": json.dumps(entries[0] if len(entries) == 1 else entries)}}


def lens(*entries: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"apply_steering_vectors": json.dumps(list(entries))}}


def lens_vector(**fields: Any) -> dict[str, Any]:
    activations = {
        "data": base64.b64encode(ROWS.tobytes()).decode(), "dtype": "float32", "original_dtype": "torch.float32",
        "shape": [2, 4],
    }  # fmt: skip
    return {"activations": activations, "layer_indices": [8, 10], "scale": 2.0} | fields


NULLS = {
    "EasySteer": (
        easysteer(),
        {
            "steering": {
                "vectors": [
                    {
                        "source": "happy",
                        "apply": {"phases": ["prompt", "generation"], "prompt": None, "generation": None},
                        **dict.fromkeys(("data", "algorithm", "scale", "layers", "normalize", "params", "name")),
                    }
                ],
                "conflict": None,
                "debug": None,
            }
        },
    ),
    "hotwire": (hotwire({"id": "v", "layer": 3}), hotwire({"id": "v", "layer": 3, "scale": None, "decode_only": None})),
    "vllm-lens": (
        lens({key: value for key, value in lens_vector().items() if key != "scale"}),
        lens(lens_vector(scale=None, norm_match=None, position_indices=None)),
    ),
}


@pytest.mark.parametrize("form", NULLS)
def test_null_is_the_same_as_leaving_a_field_out(form: str) -> None:
    left_out, nulls = NULLS[form]
    found = parse_spec(spec_of(nulls))
    assert found is not None
    assert found == parse_spec(spec_of(left_out))


@pytest.mark.parametrize("body", [easysteer(source=None), easysteer(apply=None), hotwire({"id": "v", "layer": None})])
def test_null_for_a_required_field_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(SteeringRequestError):
        spec_of(body)


@pytest.mark.parametrize(
    ("body", "edits"),
    [
        (easysteer(), [{"vector": "happy", "scale": 1.0, "scope": "all"}]),
        (
            easysteer(scale=-2.0, layers=[10, 11], algorithm="direct", normalize=False, name="x", params={}),
            [{"vector": "happy", "scale": -2.0, "blocks": [10, 11], "scope": "all"}],
        ),
        (easysteer(apply={"prompt": "all", "generation": "all"}), [{"vector": "happy", "scale": 1.0, "scope": "all"}]),
        (easysteer(apply={"phases": ["prompt"]}), [{"vector": "happy", "scale": 1.0, "scope": "prompt"}]),
        (
            {"steering": {"vectors": [{"source": n, "apply": BOTH} for n in "ab"], "conflict": "sequential"}},
            [{"vector": n, "scale": 1.0, "scope": "all"} for n in "ab"],
        ),
        (hotwire({"id": "tesla", "layer": 20, "scale": 1.5}), [{"vector": "tesla", "scale": 1.5, "blocks": [20]}]),
        (
            easysteer(apply={"phases": ["generation"]}),
            [{"vector": "happy", "scale": 1.0, "scope": {"from": "generation", "start": 1}}],
        ),
        (
            easysteer(apply={"generation": "all"}),
            [{"vector": "happy", "scale": 1.0, "scope": {"from": "generation", "start": 1}}],
        ),
        (
            hotwire({"id": "a", "layer": 1, "scale": 1, "decode_only": True}),
            [{"vector": "a", "scale": 1, "blocks": [1], "scope": {"from": "generation", "start": 1}}],
        ),
        (
            hotwire({"id": "a", "layer": 1, "scale": 1}, {"id": "b", "layer": 2, "scale": 2}),
            [{"vector": "a", "scale": 1, "blocks": [1]}, {"vector": "b", "scale": 2, "blocks": [2]}],
        ),
    ],
)
def test_what_is_mapped(body: dict[str, Any], edits: list[dict[str, Any]]) -> None:
    mapped = spec_of(body)
    assert mapped == {"edits": edits}
    assert parse_spec(mapped) is not None
    assert search_fields(body) == Found(next(iter(body)), misplaced=False)


@pytest.mark.parametrize("norm_match", [False, True])
def test_vllm_lens_activations_become_inline_vectors(norm_match: bool) -> None:
    mapped = spec_of(lens(lens_vector(norm_match=norm_match)))
    (edit,) = mapped["edits"]
    vector = from_bytes(base64.b64decode(edit["vector"]["data"]))
    assert vector.blocks == (8, 10)
    assert np.array_equal(vector.directions[10], ROWS[1])
    assert edit["scale"] == 2.0
    assert mapped["preserve_norm"] is norm_match
    assert parse_spec(mapped) is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (easysteer(source="vectors/happy.gguf"), "steering.vectors[0].source"),
        (easysteer(source="happy.gguf"), "steering.vectors[0].source"),
        (easysteer(source="..\\happy"), "steering.vectors[0].source"),
        (easysteer(source="https://host/happy"), "steering.vectors[0].source"),
        (easysteer(source=None), "steering.vectors[0].source"),
        (easysteer(data={"tensors": {}}), "steering.vectors[0].data"),
        (easysteer(algorithm="loreft"), "steering.vectors[0].algorithm"),
        (easysteer(normalize=True), "steering.vectors[0].normalize"),
        (easysteer(params={"mode": "soft"}), "steering.vectors[0].params"),
        (easysteer(apply=None), "steering.vectors[0].apply"),
        (easysteer(apply={"phases": []}), "steering.vectors[0].apply"),
        (easysteer(apply={"phases": ["decode"]}), "steering.vectors[0].apply"),
        (easysteer(apply={}), "steering.vectors[0].apply"),
        (easysteer(apply=BOTH | {"prompt_tokens": [1]}), "steering.vectors[0].apply"),
        (easysteer(apply={"prompt": [0, 1]}), "steering.vectors[0].apply"),
        (easysteer(strength=1), "steering.vectors[0].strength"),
        ({"steering": {"vectors": []}}, "steering.vectors"),
        ({"steering": {"vectors": ["happy"]}}, "steering.vectors[0]"),
        ({"steering": {"vectors": [{"source": n, "apply": BOTH} for n in "ab"]}}, "steering.conflict"),
        (hotwire({"id": "a", "layer": 1, "scale": 1}, {"id": "b", "layer": 1, "scale": 1}), "vllm_xargs.hotwire"),
        (hotwire({"id": "a", "layer": "1", "scale": 1}), "vllm_xargs.hotwire"),
        (hotwire({"id": "/tmp/a.pt", "layer": 1, "scale": 1}), "vllm_xargs.hotwire"),
        (hotwire(3), "vllm_xargs.hotwire"),
        ({"vllm_xargs": {"hotwire": 3}}, "vllm_xargs.hotwire"),
        ({"vllm_xargs": {"hotwire": "{"}}, "vllm_xargs.hotwire"),
        (lens(), "vllm_xargs.apply_steering_vectors"),
        (lens(3), "vllm_xargs.apply_steering_vectors"),
        (lens(lens_vector(position_indices=[1, 2])), "vllm_xargs.apply_steering_vectors"),
        (lens(lens_vector(norm_match=True), lens_vector()), "vllm_xargs.apply_steering_vectors"),
        (lens(lens_vector(layer_indices=[1])), "vllm_xargs.apply_steering_vectors"),
        (lens(lens_vector(activations={"data": "AAAA"})), "vllm_xargs.apply_steering_vectors"),
        (lens(lens_vector(hook="pickle")), "vllm_xargs.apply_steering_vectors.hook"),
        ({"steering": False, **hotwire({"id": "a", "layer": 1, "scale": 1})}, "steering"),
        (
            {"vllm_xargs": {"steering": "{}", "hotwire": "{}"}}, "vllm_xargs.steering",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(SteeringRequestError) as refused:
        spec_of(body)
    assert refused.value.param == param
    assert len(refused.value.message) < 300


def bomb(layers: int, hidden_size: int) -> dict[str, Any]:
    """A vector of zeros, which zstd makes 10,000 times smaller."""
    frame = zstandard.ZstdCompressor().compress(bytes(4 * layers * hidden_size))
    activations = {
        "data": base64.b64encode(frame).decode(), "dtype": "float32", "original_dtype": "torch.float32",
        "shape": [layers, hidden_size], "compression": "zstd",
    }  # fmt: skip
    return lens_vector(activations=activations, layer_indices=list(range(layers)))


FEW = 8
"""The default of `max_edits`."""


@pytest.mark.parametrize(
    ("body", "limits", "status", "says"),
    [
        (lens(*[bomb(256, 65536)] * (3 * FEW)), {}, 400, "24 vectors"),
        (lens(*[bomb(256, 65536)] * FEW), {}, 400, "another model"),
        (lens(bomb(256, 4)), {}, 400, "another model"),
        (lens(*[lens_vector()] * 20_000), {}, 400, "20000 vectors"),
        (lens(*[bomb(12, 4)] * FEW), {"max_inline_bytes": FEW * 12 * 4 * 4 - 1}, 413, "1536 bytes"),
        (lens(lens_vector()), {"max_inline_bytes": 0}, 400, "switched off"),
        (lens(lens_vector(activations={"data": "A" * 70_000})), {"max_inline_bytes": 1000}, 413, "characters"),
        (hotwire(*[{"id": "a", "layer": i, "scale": 1} for i in range(20_000)]), {}, 413, "characters"),
        ({"steering": {"vectors": [{"source": "a"}] * 20_000}}, {}, 413, "characters"),
    ],
)
def test_what_is_declared_is_checked_before_anything_is_decoded(
    body: dict[str, Any], limits: dict[str, int], status: int, says: str
) -> None:
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(SteeringRequestError, match=says) as refused:
        spec_of(body, **limits)
    assert time.process_time() - began < 2, "24 bombs took 12 seconds"
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20, "24 bombs took 2 GiB"
    tracemalloc.stop()
    assert refused.value.status == status
    assert isinstance(refused.value, PayloadTooLargeError) == (status == 413)


def test_what_fits_the_limits_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_ENGINE_MAX_INLINE_BYTES", str(2**20))
    frontend = Frontend(SteeringConfig(), SHAPE)
    resolved = frontend.resolve(steering_of(lens(lens_vector())))
    assert resolved is not None
    assert len(resolved.vectors) == 1
    monkeypatch.setenv("STEER_ENGINE_MAX_INLINE_BYTES", "0")
    frontend = Frontend(SteeringConfig(), SHAPE)
    with pytest.raises(SteeringRequestError, match="switched off"):
        frontend.resolve(steering_of(lens(lens_vector())))


def test_a_request_whose_vectors_are_only_looked_at_is_not_decoded() -> None:
    """Endpoints that refuse steering look whether there is any; a form is read when it is resolved, in a thread."""
    requested = steering_of(lens(*[bomb(256, 65536)] * 3))
    assert isinstance(requested, ForeignSteering)
    assert requested.has_vectors
    assert not isinstance(steering_of(hotwire({"id": "a"})), dict)


LONG = {"edits": [{"vector": "v" * 100, "scale": 1.0}] * 3}


@pytest.mark.parametrize(
    "body",
    [
        {"steering": LONG},
        {"steering": json.dumps(LONG)},
        {"vllm_xargs": {"steering": json.dumps(LONG)}},
        {"steering": {"vectors": [{"source": "v" * 300, "apply": BOTH}]}},
        hotwire({"id": "v" * 300, "layer": 3, "scale": 1.0}),
        lens({"activations": {}, "layer_indices": [1] * 300}),
    ],
    ids=["object", "text", "text in vllm_xargs", "EasySteer", "hotwire", "vllm-lens"],
)
def test_the_limit_of_the_environment_holds_for_every_form(
    body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEER_ENGINE_MAX_SPEC_BYTES", "250")
    monkeypatch.setenv("STEER_ENGINE_MAX_INLINE_BYTES", "16")
    with pytest.raises(PayloadTooLargeError) as caught:
        Frontend(SteeringConfig(), SHAPE).resolve(steering_of(body))
    assert status_of(caught.value) == 413
    monkeypatch.setenv("STEER_ENGINE_MAX_SPEC_BYTES", "2000")
    with pytest.raises(SteeringRequestError) as caught_later:
        Frontend(SteeringConfig(), SHAPE).resolve(steering_of(body))
    assert status_of(caught_later.value) in (400, 404), "within the limit, the form itself is read"
