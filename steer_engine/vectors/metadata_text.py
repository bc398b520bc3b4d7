"""Metadata as the map of text to text that safetensors (and one key of a GGUF file) can hold, read strictly."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from steer_engine.errors import VectorFileError
from steer_engine.vectors.metadata import VectorMetadata

FORMAT = "control-vector"
FORMAT_VERSION = "1"

BLOCK_FIELDS = ("residual_norms", "separation", "explained_variance")
JSON_FIELDS = (*BLOCK_FIELDS, "created_with", "extra")
NUMBER_FIELDS = ("hidden_size", "num_blocks")
TEXT_FIELDS = ("model", "architecture", "method", "position", "dataset_digest", "notes")


def metadata_to_text(metadata: VectorMetadata) -> dict[str, str]:
    """The `__metadata__` map: text to text, unknown fields left out, structured ones as JSON."""
    text = {"format": FORMAT, "format_version": FORMAT_VERSION}
    for name, value in metadata.model_dump().items():
        if name in JSON_FIELDS:
            if value:
                entries = {str(key): entry for key, entry in value.items()}
                text[name] = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
        elif value not in (None, ""):
            text[name] = str(value)
    return text


def metadata_from_text(text: Any) -> VectorMetadata:
    """Inverse of `metadata_to_text`. Keys that are not ours are kept in `extra`."""
    if not isinstance(text, dict) or not all(isinstance(value, str) for value in text.values()):
        raise VectorFileError("The file's `__metadata__` is missing or is not a map of text to text.")
    if text.get("format") != FORMAT:
        raise VectorFileError(f"The file's metadata does not say `format: {FORMAT}`; it is some other file.")
    if text.get("format_version") != FORMAT_VERSION:
        found = text.get("format_version", "none")
        raise VectorFileError(f"Format version {found[:32]!r} is not known; this release reads {FORMAT_VERSION!r}.")
    fields: dict[str, Any] = {name: text[name] for name in TEXT_FIELDS if name in text}
    for name in NUMBER_FIELDS:
        if name in text:
            if re.fullmatch(r"[0-9]{1,9}", text[name]) is None:
                raise VectorFileError(f"The metadata field {name} is {text[name][:32]!r}; a whole number is needed.")
            fields[name] = int(text[name])
    for name in JSON_FIELDS:
        if name in text:
            fields[name] = parse_json_object(text[name], f"the metadata field {name}")
    for name in BLOCK_FIELDS:
        if name in fields:
            fields[name] = {_block_key(key, name): _as_float(value) for key, value in fields[name].items()}
    foreign = text.keys() - {"format", "format_version", *TEXT_FIELDS, *NUMBER_FIELDS, *JSON_FIELDS}
    if foreign:
        fields["extra"] = {**{name: text[name] for name in sorted(foreign)}, **fields.get("extra", {})}
    return VectorMetadata.checked(fields)


def parse_json_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys and without NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise VectorFileError(f"{what.capitalize()} has the same key twice.")
        return found

    def no_constant(name: str) -> NoReturn:
        raise VectorFileError(f"{what.capitalize()} has a value {name}, which JSON does not know.")

    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except VectorFileError:
        raise
    except (ValueError, RecursionError):  # broken JSON, an integer of thousands of digits, deep nesting
        raise VectorFileError(f"{what.capitalize()} is not readable JSON.") from None
    if not isinstance(parsed, dict):
        raise VectorFileError(f"{what.capitalize()} is not a JSON object.")
    return parsed


def _block_key(key: str, name: str) -> int:
    if re.fullmatch(r"0|[1-9][0-9]{0,3}", key) is None:
        raise VectorFileError(f"The metadata's {name} name block {key[:32]!r}, which is not a block number.")
    return int(key)


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int and abs(value) < 2**53 else value
