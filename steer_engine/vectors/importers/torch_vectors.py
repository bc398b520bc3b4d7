"""The `.pt` conventions: CAA, persona vectors, the refusal direction, and a plain dict of layers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from steer_engine.errors import VectorFileError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.importers.torch_file import Array, load_tensors
from steer_engine.vectors.metadata import MAX_BLOCKS, VectorMetadata

_CAA_NAME = re.compile(r"vec_layer_(0|[1-9][0-9]{0,3})(_.*)?\.pt")


def caa(path: Path) -> ControlVector:
    """`vec_layer_{L}_{model}.pt` (Rimsky et al.): `[D]`, the output of block L. A folder gives all its layers."""
    files = sorted(path.glob("vec_layer_*.pt")) if path.is_dir() else [path]
    if not files:
        raise VectorFileError(f"{path}: the folder has no file vec_layer_*.pt.")
    directions: dict[int, Array] = {}
    for file in files:
        match = _CAA_NAME.fullmatch(file.name)
        if match is None:
            raise VectorFileError(f"{file}: the name does not say the layer; CAA's are vec_layer_{{L}}_{{model}}.pt.")
        if int(match[1]) in directions:
            raise VectorFileError(f"{file}: the folder has two files for layer {match[1]}; keep those of one model.")
        directions[int(match[1])] = _one(file, rank=1)
    return ControlVector(directions=directions, metadata=VectorMetadata(method="diffmean"))


def persona(path: Path) -> ControlVector:
    """`*_diff.pt` (Chen et al. 2025): `[blocks + 1, D]` of Hugging Face's hidden states; row L = output of block L - 1.

    Row 0 are the embeddings, which no block puts out. The last row is left out too: Hugging Face applies the final norm
    to it, so it is not the output of the last block.
    """
    rows_LD = _one(path, rank=2)
    if not 3 <= len(rows_LD) <= MAX_BLOCKS:
        raise VectorFileError(f"{path}: {len(rows_LD)} rows; one per block and one for the embeddings are needed.")
    directions = {row - 1: rows_LD[row] for row in range(1, len(rows_LD) - 1)}
    return ControlVector(directions=directions, metadata=VectorMetadata(method="diffmean", num_blocks=len(rows_LD) - 1))


def refusal(path: Path) -> ControlVector:
    """`direction.pt` (Arditi et al. 2024): `[D]`, the stream before block l = output of block l - 1.

    l is the key `layer` of `direction_metadata.json` in the same folder.
    """
    beside = path.with_name("direction_metadata.json")
    try:
        layer = json.loads(beside.read_text())["layer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise VectorFileError(f"{path}: the layer is not known; {beside.name} beside it must have `layer`.") from None
    if type(layer) is not int or not 1 <= layer < MAX_BLOCKS:
        raise VectorFileError(
            f"{beside}: layer {str(layer)[:32]!r} has no block before it; valid are 1 to {MAX_BLOCKS - 1}."
        )
    return ControlVector(directions={layer - 1: _one(path, rank=1)}, metadata=VectorMetadata(method="diffmean"))


def layers(path: Path) -> ControlVector:
    """A dict layer number -> `[D]`, outputs of blocks from 0."""
    tensors = load_tensors(path)
    if not isinstance(tensors, dict) or not all(type(key) is int for key in tensors):
        raise VectorFileError(f"{path}: not a dict of layer number -> tensor.")
    try:
        return ControlVector(directions=tensors)
    except VectorFileError as error:
        raise VectorFileError(f"{path}: {error.message}") from None


def _one(path: Path, *, rank: int) -> Array:
    tensor = load_tensors(path)
    if isinstance(tensor, dict) or tensor.ndim != rank:
        found = "a dict" if isinstance(tensor, dict) else f"shape {list(tensor.shape)}"
        raise VectorFileError(f"{path}: {found}, where a tensor of {rank} dimension(s) is expected.")
    return tensor
