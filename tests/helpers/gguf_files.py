"""GGUF files as other tools write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter


def write_gguf(path: Path, keys: Mapping[str, object], blocks: Sequence[int] = (1, 3)) -> Path:
    """A control vector with these keys besides llama.cpp's own; the direction of block l is `[l, 1, -2]`."""
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_int32("controlvector.layer_count", len(blocks))
    for key, value in keys.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_array)(key, value)
    for block in blocks:
        writer.add_tensor(f"direction.{block}", np.array([block, 1.0, -2.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
