"""Where the texts of a dump lie along a vector's directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steer_engine.derive.block_rows import BlockRows
from steer_engine.derive.dump_folder import DumpFolder
from steer_engine.derive.methods import Array
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector

MAX_TEXTS = 20_000
"""Texts, from the first, that a histogram is made of."""


def project(folder: Path, vector: ControlVector, blocks: Sequence[int]) -> dict[int, tuple[Array, Array]]:
    """Block -> components of positives and of negatives along the unit direction there, `[N]` each.

    Raises:
        DerivationError: the dump is of another model, has not the blocks, or no two classes.
    """
    dump = DumpFolder.open(folder)
    about = dump.manifest
    theirs = vector.metadata.model
    if vector.hidden_size != about.hidden_size or (theirs and theirs != about.model):
        raise DerivationError(
            f"{folder}: a dump of {about.model} (hidden size {about.hidden_size}); the vector is for "
            f"{theirs or 'a model'} (hidden size {vector.hidden_size})."
        )
    shards = dump.require_complete()
    found = {}
    for block in blocks:
        if block not in about.blocks:
            raise DerivationError(f"{folder}: block {block} was not read; it has {about.blocks}.")
        direction_D = vector.directions[block].astype(np.float64)
        length = float(np.linalg.norm(direction_D))
        unit_D = direction_D / length if length > 0.0 else direction_D
        positive_ND, negative_ND = BlockRows(shards, block, about.blocks).sides(MAX_TEXTS)
        if not len(positive_ND) or not len(negative_ND):
            raise DerivationError(f"{folder}: its texts are of one class; a histogram compares two.")
        found[block] = (positive_ND @ unit_D, negative_ND @ unit_D)
    return found
