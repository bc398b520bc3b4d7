"""Translates steering in the request formats of other servers. What has no exact counterpart is refused.

    vllm_xargs.apply_steering_vectors    vllm-lens: JSON text, a list of {activations, layer_indices, scale, ...}
    vllm_xargs.hotwire                   hotwire: JSON text, {id, layer, scale} or a list of them
    steering.vectors                     EasySteer: {vectors: [{source, scale, layers, apply, ...}], conflict}

All three add to the output of a block, as op `add` does. The generation phase of EasySteer and hotwire begins one
position later than the scope `generation`: at the position of the first generated token, which selects the second.

The limits of a request hold for these forms too. They are checked against what a form declares, before anything is
decoded: a few hundred kilobytes of compressed zeros can declare gigabytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError, VectorFileError
from steer_engine.fields import MAX_ECHO_CHARS
from steer_engine.model_shape import ModelShape
from steer_engine.parse import check_chars
from steer_engine.settings import Limits
from steer_engine.vectors import safetensors_format, vllm_lens_format

VLLM_LENS, HOTWIRE = "apply_steering_vectors", "hotwire"
XARGS_FORMS = (VLLM_LENS, HOTWIRE)
EASYSTEER = "vectors"

DECODING = {"from": "generation", "start": 1}
"""The scope of other servers' generation phase."""

BASE64_FLOAT64 = 8 / 4 * 4 / 3
"""Characters per byte of a float32 vector: vllm-lens may send float64, in base64."""


@dataclass(frozen=True)
class ForeignSteering:
    """Steering in another server's form, not yet read.

    form: VLLM_LENS, HOTWIRE or EASYSTEER. content: the JSON text, or the `steering` object of EasySteer.
    """

    form: str
    content: Any

    @property
    def has_vectors(self) -> bool:
        """Whether reading it decodes vectors, which takes long."""
        return self.form == VLLM_LENS

    def to_spec(self, limits: Limits, model: ModelShape) -> dict[str, Any]:
        """The `steering` object with the same effect.

        Raises:
            SteeringRequestError: malformed, without an exact counterpart here, or for another model.
            PayloadTooLargeError: more than the limits allow.
        """
        if self.form == VLLM_LENS:
            return from_vllm_lens(self.content, limits, model)
        return from_hotwire(self.content, limits) if self.form == HOTWIRE else from_easysteer(self.content, limits)


def is_easysteer(steering: dict[str, Any]) -> bool:
    """Whether a `steering` object is in EasySteer's format."""
    return "vectors" in steering and not {"edits", "preset"} & set(steering)


def from_easysteer(steering: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Translate an EasySteer spec. Raises as `ForeignSteering.to_spec`."""
    check_chars(steering, limits.max_spec_bytes)
    steering = _given(steering, {"vectors", "conflict", "debug"}, "steering")
    vectors = steering.get("vectors")
    if not isinstance(vectors, list) or not vectors:
        raise SteeringRequestError("vectors must be a list with at least one vector.", "steering.vectors")
    if len(vectors) > 1 and steering.get("conflict", "priority") != "sequential":
        raise SteeringRequestError(
            'Only "conflict": "sequential" is supported for several vectors: they are all added.', "steering.conflict"
        )
    return {"edits": [_easysteer_edit(each, f"steering.vectors[{i}]") for i, each in enumerate(vectors)]}


def _easysteer_edit(vector: Any, param: str) -> dict[str, Any]:
    if not isinstance(vector, dict):
        raise SteeringRequestError("A vector must be an object.", param)
    known = {"source", "data", "algorithm", "scale", "layers", "normalize", "apply", "params", "name"}
    vector = _given(vector, known, param)
    if "data" in vector:
        raise SteeringRequestError('Send tensors as "vector": {"data": base64 of a safetensors file}.', f"{param}.data")
    if vector.get("algorithm", "direct") != "direct":
        raise SteeringRequestError("Only algorithm 'direct' is supported.", f"{param}.algorithm")
    if vector.get("normalize"):
        raise SteeringRequestError("normalize is not supported; scale the vector instead.", f"{param}.normalize")
    if vector.get("params"):
        raise SteeringRequestError("params are not supported.", f"{param}.params")
    edit = {"vector": _name(vector.get("source"), f"{param}.source"), "scale": vector.get("scale", 1.0)}
    if "layers" in vector:
        edit["blocks"] = vector["layers"]
    return edit | {"scope": _easysteer_scope(vector.get("apply"), f"{param}.apply")}


def _easysteer_scope(apply: Any, param: str) -> str | dict[str, Any]:
    if not isinstance(apply, dict):
        raise SteeringRequestError("apply is required: an object with phases, or with prompt and generation.", param)
    apply = {name: value for name, value in apply.items() if value is not None}
    if set(apply) == {"phases"} and isinstance(apply["phases"], list):
        phases = set(map(str, apply["phases"]))
    elif set(apply) <= {"prompt", "generation"} and all(value == "all" for value in apply.values()):
        phases = set(apply)
    else:
        raise SteeringRequestError(
            "Only whole phases are supported; use 'steering.edits' with a scope (documentation: Serving).", param
        )
    if phases == {"prompt", "generation"}:
        return "all"
    if phases == {"prompt"}:
        return "prompt"
    if phases == {"generation"}:
        return DECODING
    raise SteeringRequestError("apply needs the phase prompt, generation or both.", param)


def from_hotwire(text: Any, limits: Limits) -> dict[str, Any]:
    """Translate a hotwire spec. Raises as `ForeignSteering.to_spec`."""
    param = f"vllm_xargs.{HOTWIRE}"
    entries = _json_list(text, param, limits.max_spec_bytes)
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise SteeringRequestError("Expected {id, layer, scale}, or a list of such objects.", param)
    entries = [_given(entry, {"id", "layer", "scale", "decode_only"}, param) for entry in entries]
    layers = [entry.get("layer") for entry in entries]
    if not all(type(layer) is int for layer in layers):
        raise SteeringRequestError("layer must be a whole number.", param)
    if len(set(layers)) != len(layers):
        raise SteeringRequestError(
            "hotwire applies only the last of several vectors at one layer; send only that one.", param
        )
    return {
        "edits": [
            {"vector": _name(entry.get("id"), param), "scale": entry.get("scale"), "blocks": [entry["layer"]]}
            | ({"scope": DECODING} if entry.get("decode_only") else {})
            for entry in entries
        ]
    }


def from_vllm_lens(text: Any, limits: Limits, model: ModelShape) -> dict[str, Any]:
    """Translate vllm-lens vectors. The activations become inline vectors. Raises as `ForeignSteering.to_spec`."""
    param = f"vllm_xargs.{VLLM_LENS}"
    if limits.max_inline_bytes == 0:
        raise SteeringRequestError(
            "Inline vectors are switched off on this server (max_inline_bytes); register the vector, and name it in "
            "the field 'steering'.",
            param,
        )
    entries = _json_list(text, param, limits.max_spec_bytes + int(limits.max_inline_bytes * BASE64_FLOAT64))
    if not entries:
        raise SteeringRequestError("At least one vector is required.", param)
    if len(entries) > limits.max_edits:
        raise SteeringRequestError(
            f"{len(entries)} vectors are given; one request may have at most {limits.max_edits} (max_edits).", param
        )
    _check_declared(entries, param, limits.max_inline_bytes, model)
    norm_match = [bool(entry.get("norm_match")) for entry in entries]
    if any(norm_match) and len(entries) > 1:
        raise SteeringRequestError("norm_match is supported for a single vector only.", param)
    edits = []
    for entry in entries:
        entry = _given(entry, {"activations", "layer_indices", "scale", "norm_match", "position_indices"}, param)
        if "position_indices" in entry:
            raise SteeringRequestError("position_indices is not supported; use an edit with a scope.", param)
        try:
            vector = vllm_lens_format.from_object({**entry, "scale": 1.0, "norm_match": False})
        except VectorFileError as error:
            raise SteeringRequestError(error.message, param) from None
        data = base64.b64encode(safetensors_format.to_bytes(vector)).decode("ascii")
        edits.append({"vector": {"data": data}, "scale": entry.get("scale", 1.0)})
    return {"edits": edits, "preserve_norm": norm_match[0]}


def _check_declared(entries: list[Any], param: str, max_bytes: int, model: ModelShape) -> None:
    """Check the sizes that vllm-lens vectors declare, before any is decoded."""
    total = 0
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("activations"), dict):
            raise SteeringRequestError("A vector must be an object with `activations` and `layer_indices`.", param)
        try:
            layers, hidden_size = vllm_lens_format.declared_shape(entry["activations"])
        except VectorFileError as error:
            raise SteeringRequestError(error.message, param) from None
        if hidden_size != model.hidden_size or layers > model.num_blocks:
            raise SteeringRequestError(
                f"A vector has {layers} layers of hidden size {hidden_size}; the model has {model.num_blocks} of "
                f"{model.hidden_size}: it was made for another model.",
                param,
            )
        total += 4 * layers * hidden_size  # as float32
    if total > max_bytes:
        raise PayloadTooLargeError(
            f"The vectors have {total} bytes; one request may have at most {max_bytes} (max_inline_bytes).", param
        )


def _name(source: Any, param: str) -> str:
    if not isinstance(source, str) or not source:
        raise SteeringRequestError("The name of a registered vector is required.", param)
    if "/" in source or "\\" in source or source.endswith((".gguf", ".pt", ".safetensors")):
        raise SteeringRequestError(
            f"{source[:MAX_ECHO_CHARS]!r} is a path. Clients cannot load files: register the vector and use its name.",
            param,
        )
    return source


def _json_list(text: Any, param: str, max_chars: int) -> list[Any]:
    """A list as JSON text; a single item may stand without its list."""
    if not isinstance(text, str):
        raise SteeringRequestError(f"{param} must be a JSON string, not {type(text).__name__}.", param)
    if len(text) > max_chars:
        raise PayloadTooLargeError(f"{param} has {len(text)} characters; at most {max_chars} are allowed.", param)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SteeringRequestError(f"{param} is not valid JSON ({type(error).__name__}).", param) from None
    return items if isinstance(items, list) else [items]


def _given(found: Mapping[str, Any], known: set[str], param: str) -> dict[str, Any]:
    """The fields that are not null: typed clients send null for what they leave out.

    Raises:
        SteeringRequestError: one is not of `known`.
    """
    unknown = sorted(set(found) - known)
    if unknown:
        raise SteeringRequestError(
            f"Unknown field {unknown[0][:MAX_ECHO_CHARS]!r}.", f"{param}.{unknown[0][:MAX_ECHO_CHARS]}"
        )
    return {name: value for name, value in found.items() if value is not None}
