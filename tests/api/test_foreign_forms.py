"""Other servers' requests: mapped exactly, or refused with the reason; never a path."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from steer_engine.api.body_search import Found, search_fields
from steer_engine.api.request_field import steering_of
from steer_engine.errors import SteeringRequestError
from steer_engine.spec import parse_spec
from steer_engine.vectors.safetensors_format import from_bytes

BOTH = {"phases": ["prompt", "generation"]}
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


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
            hotwire({"id": "a", "layer": 1, "scale": 1}, {"id": "b", "layer": 2, "scale": 2}),
            [{"vector": "a", "scale": 1, "blocks": [1]}, {"vector": "b", "scale": 2, "blocks": [2]}],
        ),
    ],
)
def test_what_is_mapped(body: dict[str, Any], edits: list[dict[str, Any]]) -> None:
    mapped = steering_of(body)
    assert mapped == {"edits": edits}
    assert parse_spec(mapped) is not None
    assert search_fields(body) == Found(next(iter(body)), misplaced=False)


@pytest.mark.parametrize("norm_match", [False, True])
def test_vllm_lens_activations_become_inline_vectors(norm_match: bool) -> None:
    mapped = steering_of(lens(lens_vector(norm_match=norm_match)))
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
        (easysteer(apply={"phases": ["generation"]}), "steering.vectors[0].apply"),
        (easysteer(apply={"generation": "all"}), "steering.vectors[0].apply"),
        (easysteer(apply=BOTH | {"prompt_tokens": [1]}), "steering.vectors[0].apply"),
        (easysteer(apply={"prompt": [0, 1]}), "steering.vectors[0].apply"),
        (easysteer(strength=1), "steering.vectors[0].strength"),
        ({"steering": {"vectors": []}}, "steering.vectors"),
        ({"steering": {"vectors": ["happy"]}}, "steering.vectors[0]"),
        ({"steering": {"vectors": [{"source": n, "apply": BOTH} for n in "ab"]}}, "steering.conflict"),
        (hotwire({"id": "a", "layer": 1, "scale": 1, "decode_only": True}), "vllm_xargs.hotwire"),
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
        steering_of(body)
    assert refused.value.param == param
    assert len(refused.value.message) < 300
