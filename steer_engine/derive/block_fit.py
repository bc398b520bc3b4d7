"""The direction of one block from the rows of a dump: what an actor of `fit` hosts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from steer_engine.derive.block_rows import BlockRows
from steer_engine.derive.dump_folder import DumpFolder
from steer_engine.derive.fit import MAX_ROWS_BYTES
from steer_engine.derive.methods import FROM_MOMENTS, FROM_ROWS, PAIRED, Array, signed_and_scaled
from steer_engine.derive.moments import Moments
from steer_engine.derive.quality import explained_variance, held_out_auroc, mean_difference
from steer_engine.derive.shard import Shard
from steer_engine.derive.subspace import top_direction
from steer_engine.derive.texts import LABELS
from steer_engine.errors import DerivationError

MIN_TEXTS_OF_A_CLASS = 2

SAMPLE_TEXTS = 2048
"""Texts, from the first, that say how well a direction separates held-out ones."""


@dataclass(frozen=True, kw_only=True)
class BlockFit:
    """What was fitted at a block. explained: share of the paired differences' squares along the direction, if paired.
    num: texts of either class."""

    block: int
    direction_D: Array
    residual_norm: float
    separation: float | None
    explained: float | None
    num: tuple[int, int]


class BlockFitter:
    """Reads a dump folder, which must be visible under one path to every actor."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    @cached_property
    def _dump(self) -> DumpFolder:
        return DumpFolder.open(self._folder)

    @cached_property
    def _shards(self) -> list[Shard]:
        return self._dump.require_complete()

    def check(self, index: str) -> None:
        """Hash a shard. Raises DerivationError that names the file where it is not what was written."""
        Shard(self._folder / index).require_digest()

    def fit(self, block: int, method: str) -> BlockFit:
        """The direction of a block.

        Raises:
            DerivationError: one class is missing, or the method needs pairs, or more rows than fit in memory.
        """
        manifest = self._dump.manifest
        rows = BlockRows(self._shards, block, manifest.blocks)
        positive, negative = self._moments(rows, manifest.hidden_size)
        if method in PAIRED and not manifest.paired:
            raise DerivationError(f"{self._folder}: {method} needs pairs; these texts have none. Take diffmean or lda.")
        gap_D = positive.mean_LD[0] - negative.mean_LD[0]
        if method in FROM_MOMENTS:
            direction_D = FROM_MOMENTS[method](positive, negative)[0]
        elif method in PAIRED:
            direction_D = signed_and_scaled(_principal(rows, method, gap_D), gap_D)
        else:
            size = manifest.num_texts * manifest.hidden_size * np.dtype(np.float64).itemsize
            if size > MAX_ROWS_BYTES:
                raise DerivationError(
                    f"{self._folder}: {method} keeps all rows of a block in memory, here {size >> 20} MiB, at most "
                    f"{MAX_ROWS_BYTES >> 20} MiB. Take fewer texts, or diffmean or pca, which keep sums only."
                )
            direction_D = FROM_ROWS[method](*rows.sides(manifest.num_texts))
        norm = (positive.norm_L + negative.norm_L)[0] / (positive.norm_count + negative.norm_count)
        separation = None
        if method != "mean":  # the mean of one side is not made to tell sides apart
            separation = held_out_auroc(*rows.sides(SAMPLE_TEXTS), FROM_ROWS.get(method, mean_difference))
        return BlockFit(
            block=block,
            direction_D=direction_D,
            residual_norm=float(norm),
            separation=separation,
            explained=explained_variance(rows.differences(), direction_D) if manifest.paired else None,
            num=(positive.count, negative.count),
        )

    def _moments(self, rows: BlockRows, hidden_size: int) -> tuple[Moments, Moments]:
        total: dict[str, Moments | None] = dict.fromkeys(LABELS)
        for group in rows:
            for label, sofar in total.items():
                part = group.moments(label)
                total[label] = part if sofar is None else sofar + part
        positive, negative = (total[label] or Moments.zero(1, hidden_size) for label in LABELS)
        if min(positive.count, negative.count) < MIN_TEXTS_OF_A_CLASS:
            raise DerivationError(
                f"{self._folder}: {positive.count} positive and {negative.count} negative texts; a direction needs at "
                f"least {MIN_TEXTS_OF_A_CLASS} of each. Give the texts labels, or pairs."
            )
        return positive, negative


def _principal(rows: BlockRows, method: str, gap_D: Array) -> Array:
    """PC1 of the paired differences, without or with their mean taken out."""
    if method == "pca":
        return top_direction(rows.differences, gap_D)[0]
    return top_direction(lambda: (part - gap_D for part in rows.differences()), gap_D)[0]
