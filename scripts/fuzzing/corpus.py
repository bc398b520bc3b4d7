"""Valid requests to every route that carries or manages steering; the mutations start from these.

They fit a server of the model `tiny` (3 blocks, hidden size 64, vocabulary 512) with the vector and the preset `house`,
the row sets `sae` and `reft`, all sites armed and captures at all blocks.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from helpers.asking import MESSAGES, TOKENS_PATH
from helpers.attack import PRESETS, VECTORS
from helpers.living import HIDDEN_SIZE, along, features, low_rank

from steer_engine.vectors import ControlVector
from steer_engine.vectors.files import to_bytes

MODEL, HOUSE = "tiny", "house"
SAE, REFT = "sae", "reft"
VALIDATE = "/v1/steering/validate"
NAMES = tuple(f"fuzz-{number}" for number in range(6))
"""Names that the fuzz uploads and deletes; `house` stays, for the reference answers."""

JSON = {"content-type": "application/json"}
BINARY = {"content-type": "application/octet-stream"}


@dataclass(frozen=True)
class Sent:
    """One request. group: its row in the result. mutations: what was done to a valid one. admin: the key it carries."""

    group: str
    method: str
    path: str
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    mutations: tuple[str, ...] = ()
    admin: bool = False


_SAMPLING: dict[str, Any] = {"temperature": 0, "max_tokens": 2}
_CHAT = {"model": MODEL, "messages": MESSAGES, **_SAMPLING, "stream": False, "seed": 1, "logprobs": True, "n": 1}

GENERATING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/chat/completions/batch": {"model": MODEL, "messages": [MESSAGES, MESSAGES], **_SAMPLING},
    "/v1/completions": {"model": MODEL, "prompt": "abc", **_SAMPLING, "stream": True, "stop": ["z"], "logit_bias": {}},
    "/v1/responses": {"model": MODEL, "input": "abc", "temperature": 0, "max_output_tokens": 2, "store": False},
    "/v1/messages": {"model": MODEL, "messages": MESSAGES, **_SAMPLING, "system": "s"},
    "/invocations": {"model": MODEL, "messages": MESSAGES, **_SAMPLING},
    TOKENS_PATH: {"model": MODEL, "token_ids": [97, 98, 99], "sampling_params": dict(_SAMPLING)},
}
"""Path -> a valid body without steering, for every path of `middleware.CARRYING_PATHS`."""

OTHER_POSTS: dict[str, dict[str, Any]] = {
    "/tokenize": {"model": MODEL, "prompt": "abc"},
    "/detokenize": {"model": MODEL, "tokens": [97]},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": MESSAGES},
    "/v1/completions/render": {"model": MODEL, "prompt": "abc"},
    "/v1/embeddings": {"model": MODEL, "input": "abc"},
    "/v1/nothing": {"model": MODEL},
}
"""Routes that cannot carry steering, one that does not exist included."""


@cache
def specs() -> tuple[dict[str, Any], ...]:
    """Valid values of the steering field, one for each form."""
    edit: dict[str, Any] = {"vector": HOUSE, "scale": 1.5}
    inline = base64.b64encode(to_bytes(along(7))).decode()
    early = ControlVector(directions={0: along(9).directions[1]})
    condition = {"vector": {"data": base64.b64encode(to_bytes(early)).decode()}, "above": 0.1, "at": "mean_prompt"}
    trigger = {"after": "a", "until": [98, 99], "each": True, "tokens": 5, "except": {"after": 100}}
    schedule = {"kind": "linear", "over": 4, "to": 0.5}
    probes = [
        {"name": "push", "vector": HOUSE, "measure": "dot", "blocks": [1]},
        {"name": "after", "vector": HOUSE, "scope": "all", "after": True, "return": "summary", "site": "mlp"},
    ]
    return (
        {"edits": [edit]},
        {"preset": HOUSE},
        {"edits": [edit | {"scale": 0}]},
        {"edits": [edit | {"op": "ablate", "scale": 1.0, "scope": "prompt"}], "preserve_norm": True},
        {"edits": [edit | {"op": "add_relative", "scale": 0.3, "blocks": [1]}]},
        {"edits": [{"vector": HOUSE, "op": "clamp", "lo": -1.0, "hi": 2.0, "blocks": "1-1"}]},
        {"edits": [{"vector": HOUSE, "op": "set", "target": 3.0, "blocks": 1, "scope": {"start": 1, "end": None}}]},
        {"edits": [edit | {"gate": {"vector": HOUSE, "min_cos": 0.1}}, edit | {"scope": "generation"}]},
        {"edits": [edit | {"vector": along(5).digest}]},
        {"edits": [edit | {"vector": {"data": inline}}]},
        {"edits": [edit | {"scope": trigger, "schedule": schedule}, edit | {"scope": "last_prompt_token"}]},
        {"edits": [edit | {"scope": {"from": "generation", "start": 0, "end": 2}, "when": condition}]},
        {"edits": [edit], "when": {"any": [condition, condition | {"measure": "dot", "below": 0.5}]}},
        {"vectors": [{"source": HOUSE, "scale": 2.0, "layers": [1], "apply": {"phases": ["prompt"]}}]},
        {"edits": [{"vector": SAE, "op": "feature", "feature": [3, 7], "target": 2.0, "blocks": 1}]},
        {"edits": [{"vector": SAE, "op": "feature", "feature": 3, "add": 0.5}, {"vector": REFT, "op": "low_rank"}]},
        {"edits": [edit | {"gate": {"vector": SAE, "feature": 7, "min_dot": 0.0, "max_dot": 9.0}}]},
        {"edits": [{"vector": HOUSE, "op": "rotate", "toward": {"data": inline}, "degrees": 30.0, "blocks": 1}]},
        {"edits": [edit | {"site": "attn"}, edit | {"site": "mlp", "op": "ablate", "scale": 0.5}]},
        {"edits": [edit], "when": {"all": [condition, condition | {"at": "max_prompt", "below": 0.9}]}},
        {"edits": [edit | {"scope": "thinking"}, edit | {"schedule": schedule | {"kind": "exponential"}}]},
        {"probes": probes},
        {"edits": [edit], "probes": probes, "stop": [{"probe": "push", "above": 50.0, "for": 2, "block": 1}]},
        {"preset": HOUSE, "probes": probes[:1], "stop": [{"probe": "push", "below": -50.0}]},
        {"edits": [edit], "capture": {"blocks": [1], "scope": "generation", "positions": "mean", "after": True}},
        {"capture": {"positions": [0, -1]}},
        {"edits": [edit | {"vector": {"data": base64.b64encode(to_bytes(low_rank())).decode()}, "op": "low_rank"}]},
    )


@cache
def foreign() -> tuple[dict[str, Any], ...]:
    """The fields of a request that asks in another server's form: of hotwire, and of vllm-lens."""
    row = np.linspace(-1, 1, HIDDEN_SIZE, dtype=np.float32)
    activations = {"data": base64.b64encode(row.tobytes()).decode(), "dtype": "float32", "shape": [1, HIDDEN_SIZE],
                   "original_dtype": "torch.float32"}  # fmt: skip
    lens = [{"activations": activations, "layer_indices": [1], "scale": 2.0, "norm_match": True}]
    wires = [{"id": HOUSE, "layer": 1, "scale": 1.5, "decode_only": True}]
    return tuple(
        {"vllm_xargs": {name: json.dumps(value)}}
        for name, value in (("hotwire", wires), ("hotwire", wires[0]), ("apply_steering_vectors", lens))
    )


def in_xargs(spec: dict[str, Any]) -> dict[str, Any]:
    """The request's fields for steering as JSON text in vLLM's extra arguments."""
    return {"vllm_xargs": {"steering": json.dumps(spec)}}


@cache
def vector_files() -> tuple[bytes, ...]:
    """Files that fit the model: two vectors in safetensors, one in GGUF, and both kinds of row sets."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "v.gguf")
        writer = GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_int32("controlvector.layer_count", 1)
        writer.add_tensor("direction.1", np.linspace(-1, 1, HIDDEN_SIZE, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        gguf = path.read_bytes()
    return to_bytes(along(3)), to_bytes(along(4, 0.5)), gguf, to_bytes(features()), to_bytes(low_rank())


def reads() -> tuple[str, ...]:
    """Paths to read."""
    lists = [f"{where}{query}" for where in (VECTORS, PRESETS) for query in ("", "?limit=2", "?after=fuzz-1&limit=1")]
    named = [f"{where}/{name}" for where in (VECTORS, PRESETS) for name in (HOUSE, *NAMES[:2])]
    return (*lists, *named, f"{VECTORS}/{HOUSE}?download", "/v1/steering", "/v1/steering/stats", "/readyz",
            "/playground", "/v1/models")  # fmt: skip
