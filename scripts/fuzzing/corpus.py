"""Valid requests to every route that carries or manages steering; the mutations start from these.

They fit a server of the model `tiny` (3 blocks, hidden size 64, vocabulary 512) with the vector and the preset `house`.
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
from helpers.living import HIDDEN_SIZE, along

from steer_engine.vectors import ControlVector
from steer_engine.vectors.safetensors_format import to_bytes

MODEL, HOUSE = "tiny", "house"
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
    )


def in_xargs(spec: dict[str, Any]) -> dict[str, Any]:
    """The request's fields for steering as JSON text in vLLM's extra arguments."""
    return {"vllm_xargs": {"steering": json.dumps(spec)}}


@cache
def vector_files() -> tuple[bytes, ...]:
    """Vectors that fit the model: two in safetensors, one in GGUF."""
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
    return to_bytes(along(3)), to_bytes(along(4, 0.5)), gguf


def reads() -> tuple[str, ...]:
    """Paths to read."""
    lists = [f"{where}{query}" for where in (VECTORS, PRESETS) for query in ("", "?limit=2", "?after=fuzz-1&limit=1")]
    named = [f"{where}/{name}" for where in (VECTORS, PRESETS) for name in (HOUSE, *NAMES[:2])]
    return (*lists, *named, f"{VECTORS}/{HOUSE}?download", "/v1/steering", "/v1/steering/stats", "/readyz",
            "/playground", "/v1/models")  # fmt: skip
