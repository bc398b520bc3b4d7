"""Requests written for other steering servers: mapped where they mean exactly something here, else refused by reason.

    vllm_xargs.apply_steering_vectors    vllm-lens: JSON text, a list of {activations, layer_indices, scale, ...}
    vllm_xargs.hotwire                   hotwire: JSON text, {id, layer, scale} or a list of them
    steering.vectors                     EasySteer: {vectors: [{source, scale, layers, apply, ...}], conflict}

All three add to the output of a block, which is what an edit of op `add` does. None of them has positions that choose a
generated token (their generation begins one position later), so what asks for generated positions alone is refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from steer_engine.errors import SteeringRequestError, VectorFileError
from steer_engine.vectors import safetensors_format, vllm_lens_format

VLLM_LENS, HOTWIRE = "apply_steering_vectors", "hotwire"
XARGS_FORMS = (VLLM_LENS, HOTWIRE)

_MAX_ECHO = 80


def is_easysteer(steering: dict[str, Any]) -> bool:
    """Whether a `steering` object is in EasySteer's form."""
    return "vectors" in steering and not {"edits", "preset"} & set(steering)


def from_easysteer(steering: dict[str, Any]) -> dict[str, Any]:
    """Our form of an EasySteer spec. Raises SteeringRequestError."""
    _only(steering, {"vectors", "conflict", "debug"}, "steering")
    vectors = steering["vectors"]
    if not isinstance(vectors, list) or not vectors:
        raise SteeringRequestError("vectors must be a list with at least one vector.", "steering.vectors")
    if len(vectors) > 1 and steering.get("conflict", "priority") != "sequential":
        raise SteeringRequestError(
            'Several vectors add up here: that is "conflict": "sequential".', "steering.conflict"
        )
    return {"edits": [_easysteer_edit(each, f"steering.vectors[{i}]") for i, each in enumerate(vectors)]}


def _easysteer_edit(vector: Any, param: str) -> dict[str, Any]:
    if not isinstance(vector, dict):
        raise SteeringRequestError("A vector must be an object.", param)
    _only(vector, {"source", "data", "algorithm", "scale", "layers", "normalize", "apply", "params", "name"}, param)
    if vector.get("data") is not None:
        raise SteeringRequestError('Send tensors as "vector": {"data": base64 of a safetensors file}.', f"{param}.data")
    if vector.get("algorithm", "direct") != "direct":
        raise SteeringRequestError("Only algorithm 'direct' has the same meaning here.", f"{param}.algorithm")
    if vector.get("normalize"):
        raise SteeringRequestError("normalize has no counterpart here; scale the vector instead.", f"{param}.normalize")
    if vector.get("params"):
        raise SteeringRequestError("params belong to algorithms that are not mapped.", f"{param}.params")
    edit = {"vector": _name(vector.get("source"), f"{param}.source"), "scale": vector.get("scale", 1.0)}
    if vector.get("layers") is not None:
        edit["blocks"] = vector["layers"]
    return edit | {"scope": _easysteer_scope(vector.get("apply"), f"{param}.apply")}


def _easysteer_scope(apply: Any, param: str) -> str:
    if not isinstance(apply, dict):
        raise SteeringRequestError("apply is required: its phases, or prompt and generation.", param)
    if set(apply) == {"phases"} and isinstance(apply["phases"], list):
        phases = set(map(str, apply["phases"]))
    elif set(apply) <= {"prompt", "generation"} and all(value == "all" for value in apply.values()):
        phases = set(apply)
    else:
        raise SteeringRequestError('Only whole phases are mapped; use "scope": {"start", "end"} of an edit.', param)
    if phases == {"prompt", "generation"}:
        return "all"
    if phases == {"prompt"}:
        return "prompt"
    raise SteeringRequestError(
        "Generation alone begins one position later there than the scope 'generation' here; say which with an edit.",
        param,
    )


def from_hotwire(text: Any) -> dict[str, Any]:
    """Our form of a hotwire spec. Raises SteeringRequestError."""
    param = f"vllm_xargs.{HOTWIRE}"
    read = _json(text, param)
    entries = read if isinstance(read, list) else [read]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise SteeringRequestError("Give {id, layer, scale}, or a list of such objects.", param)
    for entry in entries:
        _only(entry, {"id", "layer", "scale", "decode_only"}, param)
        if entry.get("decode_only"):
            raise SteeringRequestError(
                "decode_only begins one position later than the scope 'generation' here; say which with 'steering'.",
                param,
            )
    layers = [entry.get("layer") for entry in entries]
    if not all(type(layer) is int for layer in layers):
        raise SteeringRequestError("layer must be a whole number.", param)
    if len(set(layers)) != len(layers):
        raise SteeringRequestError(
            "Of two vectors at one layer hotwire applies the last; ask for that one alone.", param
        )
    return {
        "edits": [
            {"vector": _name(entry.get("id"), param), "scale": entry.get("scale"), "blocks": [entry["layer"]]}
            for entry in entries
        ]
    }


def from_vllm_lens(text: Any) -> dict[str, Any]:
    """Our form of vllm-lens vectors; the activations become inline vectors. Raises SteeringRequestError."""
    param = f"vllm_xargs.{VLLM_LENS}"
    read = _json(text, param)
    entries = read if isinstance(read, list) else [read]
    if not entries:
        raise SteeringRequestError("Give at least one vector.", param)
    norm_match = [bool(isinstance(entry, dict) and entry.get("norm_match")) for entry in entries]
    if any(norm_match) and len(entries) > 1:
        raise SteeringRequestError("norm_match of one vector among several cannot be mapped.", param)
    edits = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise SteeringRequestError("Every vector must be an object.", param)
        _only(entry, {"activations", "layer_indices", "scale", "norm_match", "position_indices"}, param)
        if entry.get("position_indices") is not None:
            raise SteeringRequestError("position_indices cannot be mapped; use the scope of an edit.", param)
        try:
            vector = vllm_lens_format.from_object({**entry, "scale": 1.0, "norm_match": False})
        except VectorFileError as error:
            raise SteeringRequestError(error.message, param) from None
        data = base64.b64encode(safetensors_format.to_bytes(vector)).decode("ascii")
        edits.append({"vector": {"data": data}, "scale": entry.get("scale", 1.0)})
    return {"edits": edits, "preserve_norm": norm_match[0]}


def _name(source: Any, param: str) -> str:
    if not isinstance(source, str) or not source:
        raise SteeringRequestError("The name of a registered vector is needed.", param)
    if "/" in source or "\\" in source or source.endswith((".gguf", ".pt", ".safetensors")):
        raise SteeringRequestError(
            f"{source[:_MAX_ECHO]!r} is a path, which is never read from a client: register it, and give its name.",
            param,
        )
    return source


def _json(text: Any, param: str) -> Any:
    if not isinstance(text, str):
        raise SteeringRequestError(f"{param} must be a JSON string, not {type(text).__name__}.", param)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SteeringRequestError(f"{param} is not JSON ({type(error).__name__}).", param) from None


def _only(found: Mapping[str, Any], known: set[str], param: str) -> None:
    unknown = sorted(set(found) - known)
    if unknown:
        raise SteeringRequestError(f"{unknown[0][:_MAX_ECHO]!r} is not known.", f"{param}.{unknown[0][:_MAX_ECHO]}")
