"""Files of Neuronpedia: steering vectors as its API returns them, and exports of explanations, which label features.

    {"vector": {"modelId": ..., "hookName": "blocks.6.hook_resid_pre", "vector": [...], "vectorLabel": ...,
                "vectorDefaultSteerStrength": ...}}

A vector is one direction. `hook_resid_pre` of block l is the output of block l - 1. Explanations are JSON lines, also
compressed with gzip, or one JSON array: `{"index": "12", "description": "words about praise", ...}`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from steer_engine.errors import UnreadableFileError, VectorFileError
from steer_engine.fields import shown
from steer_engine.site import Site
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import MAX_BLOCKS, MAX_HIDDEN_SIZE, MAX_TEXT, VectorMetadata
from steer_engine.vectors.row_set import MAX_INDEX, MAX_LABEL
from steer_engine.vectors.storage import read_vector_file, write_atomically

MAX_FILE_BYTES = 1 << 24
"""Of a vector: 65,536 numbers as text are less than 2 MB."""

MAX_LINE_BYTES = 1 << 22
"""Of one explanation, with its embedding."""

MAX_ARRAY_BYTES = 1 << 28
"""Of explanations in one JSON array, which is read whole. Lines have no such limit: they are read one by one."""

MAX_EXPORT_BYTES = 1 << 34
"""Of all lines of a file, decompressed."""

EXPORTS = ("explanations.jsonl", "explanations.jsonl.gz", "explanations.json")
"""Names of an export beside an autoencoder, in the order in which they are looked for."""

_HOOK = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")


def load(path: Path) -> ControlVector:
    """Read a vector, from a whole answer of the API, or the object inside, or what creates one.

    Raises:
        VectorFileError: not such an object, or not a direction of the residual stream between blocks.
    """
    try:
        found = json.loads(read_vector_file(path, MAX_FILE_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, VectorFileError):
            raise
        raise VectorFileError(f"{path}: not JSON.") from None
    if isinstance(found, dict) and isinstance(found.get("vectors"), list) and len(found["vectors"]) == 1:
        found = found["vectors"][0]
    if isinstance(found, dict) and isinstance(found.get("vector"), dict):
        found = found["vector"]
    numbers = found.get("vector", found.get("values")) if isinstance(found, dict) else None
    if not isinstance(numbers, list) or not 1 <= len(numbers) <= MAX_HIDDEN_SIZE:
        raise VectorFileError(f"{path}: not one vector of Neuronpedia; `vector` is a list of numbers there.")
    if not all(map(_is_number, numbers)):
        raise VectorFileError(f"{path}: the vector has values that are not finite numbers.")
    assert isinstance(found, dict)
    block = _block(found, path)
    strength = found.get("vectorDefaultSteerStrength", found.get("defaultSteerStrength"))
    notes = [f"Neuronpedia's default strength is {strength:g}."] if _is_number(strength) else []
    if label := _line(found.get("vectorLabel", found.get("label"))):
        notes.insert(0, f"Label: {label}.")
    metadata = VectorMetadata.checked({"model": str(found.get("modelId") or "")[:MAX_TEXT], "notes": " ".join(notes)})
    return ControlVector(directions={block: np.array(numbers, np.float64)}, metadata=metadata)


def save(vector: ControlVector, path: Path) -> None:
    """Write one direction as the body with which Neuronpedia's API creates a vector.

    Raises:
        VectorFileError: the vector has directions at several blocks, or is not of the stream after one.
    """
    if vector.metadata.site is not Site.BLOCK:
        raise VectorFileError(
            f"Vectors are exported as directions of the stream; this one is of site {vector.metadata.site.value!r}."
        )
    if len(vector.blocks) != 1:
        raise VectorFileError(f"Neuronpedia's vectors have one direction; this one has blocks {list(vector.blocks)}.")
    (block,) = vector.blocks
    body = {
        "modelId": vector.metadata.model,
        "layerNumber": block + 1,
        "hookType": "hook_resid_pre",
        "vector": [float(number) for number in vector.directions[block]],
        "vectorDefaultSteerStrength": 10,
        "vectorLabel": path.stem,
    }
    write_atomically(path, json.dumps(body).encode())


def explanations(path: Path) -> Iterator[tuple[int, str]]:
    """(number of a feature, what it stands for) for each explanation of a file, in its order.

    A feature may have several. Entries without a number or a description are left out.

    Raises:
        VectorFileError: the file cannot be read, or is not such an export.
    """
    count = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for entry in _entries(file):
                number = entry.get("index")
                if isinstance(number, str) and number.isdecimal() and number.isascii() and len(number) <= 10:
                    number = int(number)
                if type(number) is not int or not 0 <= number <= MAX_INDEX:
                    continue
                inner = entry.get("explanations")
                texts = inner if isinstance(inner, list) else [entry]
                for text in texts:
                    if label := _line(text.get("description") if isinstance(text, dict) else None):
                        count += 1
                        yield number, label
    except VectorFileError as error:
        raise VectorFileError(f"{path}: {error.message}") from None
    except (zlib.error, EOFError, gzip.BadGzipFile):
        raise VectorFileError(f"{path}: damaged gzip data.") from None
    except OSError as error:
        raise UnreadableFileError(f"{path}: cannot be read ({error.strerror or error}).") from None
    if count == 0:
        raise VectorFileError(f'{path}: no line with a feature\'s "index" and "description".')


def export_beside(path: Path) -> Path | None:
    """The export of explanations in the folder of an autoencoder."""
    folder = path if path.is_dir() else path.parent
    return next((folder / name for name in EXPORTS if (folder / name).is_file()), None)


def _entries(file: io.BufferedReader | gzip.GzipFile) -> Iterator[dict[str, Any]]:
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    if first == b"[":
        text = first + file.read(MAX_ARRAY_BYTES)
        if len(text) > MAX_ARRAY_BYTES:
            raise VectorFileError(f"an array of more than {MAX_ARRAY_BYTES} bytes; export it as JSON lines.")
        yield from (entry for entry in _parsed(text) if isinstance(entry, dict))
        return
    rest, total = first, 0
    while line := rest + file.readline(MAX_LINE_BYTES):
        rest = b""
        total += len(line)
        if len(line) >= MAX_LINE_BYTES or total > MAX_EXPORT_BYTES:
            raise VectorFileError(f"a line of more than {MAX_LINE_BYTES} bytes, or {MAX_EXPORT_BYTES} bytes of lines.")
        if line.strip() and isinstance(entry := _parsed(line), dict):
            yield entry


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise VectorFileError("not JSON lines and not a JSON array.") from None


def _block(found: dict[str, Any], path: Path) -> int:
    hook, layer, kind = found.get("hookName"), found.get("layerNumber"), found.get("hookType")
    if hook is None and type(layer) is int and isinstance(kind, str):
        hook = f"blocks.{layer}.{kind}"
    match = _HOOK.fullmatch(hook) if isinstance(hook, str) else None
    if match is None:
        raise VectorFileError(f"{path}: hookName {shown(hook)} is not the residual stream, blocks.N.hook_resid_pre.")
    block = int(match[1]) - (match[2] == "pre")
    if not 0 <= block < MAX_BLOCKS:
        raise VectorFileError(f"{path}: {hook} is not the output of a block.")
    return block


def _is_number(value: Any) -> bool:
    """Whether it is finite, and no whole number too large for a float."""
    return type(value) in (int, float) and abs(value) < 1e39


def _line(text: Any) -> str:
    """A text as one printable line; empty for anything else."""
    if not isinstance(text, str):
        return ""
    words = " ".join(text[: 4 * MAX_LABEL].split())
    return "".join(each if each.isprintable() else "?" for each in words)[:MAX_LABEL]
