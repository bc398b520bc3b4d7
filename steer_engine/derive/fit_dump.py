"""The rows of one block of a dump, text by text in canonical order, however the shards were cut.

Shape suffixes: N texts, R token rows, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from steer_engine.derive.actors import PAIRS_PER_CHUNK, Workers, ray_session
from steer_engine.derive.dump_folder import DumpFolder
from steer_engine.derive.fit import MAX_ROWS_BYTES, Fit, require_directions, vector_of
from steer_engine.derive.methods import (
    FROM_MOMENTS,
    FROM_ROWS,
    PAIRED,
    Array,
    require_method,
    signed_and_scaled,
    top_direction,
)
from steer_engine.derive.moments import Moments, Sample, explained_variance, held_out_auroc, mean_difference
from steer_engine.derive.progress import Progress
from steer_engine.derive.shard import Shard
from steer_engine.derive.texts import LABELS
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector

GROUP = 2 * PAIRS_PER_CHUNK
"""Texts that are summed together before the sums are merged: the chunks of `derive`, so that both add alike."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Consecutive texts. rows_ND: the row that stands for each; norm_N: sum of |x| over count_N token rows."""

    label_N: np.ndarray
    rows_ND: Array
    norm_N: Array
    count_N: np.ndarray

    def __len__(self) -> int:
        return len(self.label_N)

    def side(self, label: str) -> Array:
        """Rows of one class, in order."""
        rows_ND: Array = self.rows_ND[self.label_N == label]
        return rows_ND

    def moments(self, label: str) -> Moments:
        """Sums of one class at this one block (L = 1), added as `derive` adds them."""
        chosen = np.flatnonzero(self.label_N == label)
        if not len(chosen):
            return Moments.zero(1, self.rows_ND.shape[1])
        samples = [
            Sample(row_LD=self.rows_ND[None, i], norm_L=self.norm_N[None, i], norm_count=int(self.count_N[i]))
            for i in chosen
        ]
        return Moments.of(samples)

    def __getitem__(self, part: slice) -> Group:
        return Group(
            label_N=self.label_N[part],
            rows_ND=self.rows_ND[part],
            norm_N=self.norm_N[part],
            count_N=self.count_N[part],
        )

    @staticmethod
    def joined(groups: Sequence[Group]) -> Group:
        return Group(
            label_N=np.concatenate([group.label_N for group in groups]),
            rows_ND=np.concatenate([group.rows_ND for group in groups]),
            norm_N=np.concatenate([group.norm_N for group in groups]),
            count_N=np.concatenate([group.count_N for group in groups]),
        )


class BlockRows:
    """Groups of `GROUP` texts of one block; can be gone through again and again. Holds one shard's rows at a time."""

    def __init__(self, shards: Sequence[Shard], block: int, blocks: Sequence[int]) -> None:
        self._shards = shards
        self._block = block
        self._place = list(blocks).index(block)

    def __iter__(self) -> Iterator[Group]:
        waiting: list[Group] = []
        num_waiting = 0
        for shard in self._shards:
            part = self._of_shard(shard)
            while num_waiting + len(part) >= GROUP:
                cut = GROUP - num_waiting
                yield Group.joined([*waiting, part[:cut]])
                waiting, num_waiting, part = [], 0, part[cut:]
            if len(part):
                waiting.append(part)
                num_waiting += len(part)
        if waiting:
            yield Group.joined(waiting)

    def differences(self) -> Iterator[Array]:
        """Positive minus negative of each pair, `[N, D]`, group by group."""
        for group in self:
            yield group.side("positive") - group.side("negative")

    def sides(self, limit: int) -> tuple[Array, Array]:
        """Positive and negative rows of the first `limit` texts, all in memory."""
        first: list[Group] = []
        for group in self:
            first.append(group[: limit - sum(map(len, first))])
            if sum(map(len, first)) >= limit:
                break
        together = Group.joined(first)
        return together.side("positive"), together.side("negative")

    def _of_shard(self, shard: Shard) -> Group:
        rows_RD = shard.rows_RD(self._block)
        spans = [entry.rows for entry in shard.entries]
        if all(end - begin == 1 for begin, end in spans):
            rows_ND = rows_RD.astype(np.float64)
        else:
            rows_ND = np.stack([rows_RD[begin:end].astype(np.float64).mean(axis=0) for begin, end in spans])
        norm_NL, count_N = shard.norms()
        return Group(
            label_N=np.array([entry.label for entry in shard.entries]),
            rows_ND=rows_ND,
            norm_N=norm_NL[:, self._place],
            count_N=count_N,
        )


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


_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Matrix products round differently with another number of threads; with one, bits are equal and actors share cores."""


def fit_dump(
    folder: str | os.PathLike[str],
    *,
    method: str = "diffmean",
    actors: int | None = None,
    ray_address: str | None = None,
    progress: bool = True,
) -> ControlVector:
    """Fit a method to a dump.

    Args:
        folder: a whole dump. On a cluster every node must see it under this path.
        method: one of `methods.METHODS`.
        actors: processes that work side by side (default: one per core of this machine, at most one per block).
        ray_address: cluster to run them on (None: a local Ray for this call).

    Raises:
        DerivationError: the dump is incomplete, or a shard is missing, truncated or damaged (names the file), or its
            texts give no direction.
    """
    require_method(method)
    path = Path(folder).absolute()
    dump = DumpFolder.open(path)
    shards = dump.require_complete()
    blocks = dump.manifest.blocks
    count = actors if actors is not None else min(len(blocks), len(os.sched_getaffinity(0)))
    if count < 1:
        raise DerivationError(f"{count} actors cannot fit anything; at least 1 is needed.")
    with Progress(enabled=progress) as shown, ray_session(ray_address, num_cpus=count) as ray:
        resources = {"num_cpus": 0.0 if ray_address is None else 1.0}
        fitters = Workers(ray, BlockFitter, (str(path),), count=count, resources=resources, env=_ONE_THREAD)
        try:
            with shown.counting("checking", total=len(shards), unit="shards") as advance:
                for _ in fitters.ordered("check", [(shard.index.name,) for shard in shards]):
                    advance(1)
            fits: list[BlockFit] = []
            with shown.counting("fitting", total=len(blocks), unit="blocks") as advance:
                for fitted in fitters.ordered("fit", [(block, method) for block in blocks]):
                    fits.append(fitted)
                    advance(1)
        finally:
            fitters.stop()
    directions_LD = np.stack([fitted.direction_D for fitted in fits])
    require_directions(directions_LD, np.array([fitted.residual_norm for fitted in fits]), blocks)
    together = Fit(
        directions={fitted.block: fitted.direction_D.astype(np.float32) for fitted in fits},
        residual_norms={fitted.block: fitted.residual_norm for fitted in fits},
        separation={fitted.block: fitted.separation for fitted in fits if fitted.separation is not None},
        explained={fitted.block: fitted.explained for fitted in fits if fitted.explained is not None},
    )
    return vector_of(together, dump.manifest, method)


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
