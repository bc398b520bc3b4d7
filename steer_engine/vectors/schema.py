"""JSON Schema of the header of a control-vector file, generated from the metadata model and the reader's limits.

`python -m steer_engine.vectors.schema > docs/vector_format.schema.json`
"""

from __future__ import annotations

import json
from typing import Any

from steer_engine.vectors.metadata import MAX_HIDDEN_SIZE, VectorMetadata
from steer_engine.vectors.metadata_text import FORMAT, FORMAT_VERSION, JSON_FIELDS, NUMBER_FIELDS

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


def header_schema() -> dict[str, Any]:
    """Schema of the JSON header: `__metadata__` and one entry per block. Values of `__metadata__` are all text."""
    tensor = {
        "type": "object",
        "description": "The direction added to the output of this block, counted from 0 over the whole model.",
        "properties": {
            "dtype": {"enum": ["F32", "F16", "BF16"]},
            "shape": {
                "type": "array",
                "items": {"type": "integer", "minimum": 1, "maximum": MAX_HIDDEN_SIZE},
                "minItems": 1,
                "maxItems": 1,
            },
            "data_offsets": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0},
                "minItems": 2,
                "maxItems": 2,
            },
        },
        "required": ["dtype", "shape", "data_offsets"],
        "additionalProperties": False,
    }
    return {
        "$schema": SCHEMA_ID,
        "title": "Header of a control-vector file (safetensors)",
        "type": "object",
        "properties": {"__metadata__": _metadata_schema()},
        "patternProperties": {r"^direction\.(0|[1-9][0-9]{0,2}|10[01][0-9]|102[0-3])$": tensor},
        "required": ["__metadata__"],
        "additionalProperties": False,
        "minProperties": 2,
    }


def _metadata_schema() -> dict[str, Any]:
    """The text map: what each text holds is said by `contentSchema` (JSON) or `pattern` (whole numbers)."""
    properties: dict[str, Any] = {
        "format": {"const": FORMAT},
        "format_version": {"const": FORMAT_VERSION},
    }
    for name, field in VectorMetadata.model_json_schema()["properties"].items():
        if name in JSON_FIELDS:
            content = {key: value for key, value in field.items() if key not in ("title", "description")}
            properties[name] = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
        elif name in NUMBER_FIELDS:
            properties[name] = {"type": "string", "pattern": "^[0-9]{1,9}$"}
        else:
            properties[name] = {key: field[key] for key in ("type", "maxLength", "pattern") if key in field}
        properties[name]["description"] = DESCRIPTIONS[name]
    return {
        "type": "object",
        "properties": properties,
        "required": ["format", "format_version"],
        "additionalProperties": {"type": "string"},
    }


DESCRIPTIONS = {
    "model": "What the vector was derived on: a Hugging Face id or a name.",
    "architecture": "The model's architecture, as in its config.json.",
    "hidden_size": "D; equal to the length of every direction.",
    "num_blocks": "Number of blocks of the model; every direction's block is below it.",
    "method": "How it was derived: diffmean, pca, ...",
    "position": "Which token rows were read: last, mean, or token numbers.",
    "residual_norms": "Block -> mean Euclidean norm of a token row of the stream at its output. Part of the digest.",
    "separation": "Block -> AUROC of the direction on texts that it was not derived from; 0.5 is chance.",
    "explained_variance": "Block -> share of the squared differences of the pairs that lies along the direction.",
    "dataset_digest": "SHA-256 of the texts it was derived from.",
    "created_with": "Package -> version.",
    "notes": "Free text.",
    "extra": "Keys of other tools. Unknown keys of the map are kept here.",
}


if __name__ == "__main__":
    print(json.dumps(header_schema(), indent=2))
