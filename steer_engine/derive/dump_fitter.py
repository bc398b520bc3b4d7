"""`fit_dump`: a control vector from an activation dump; and `project`: where its texts lie along a vector.

Ray actors fit one block each, in passes over the shards. A pass sees the texts in their order, in chunks of the size
that `derive` captures, wherever the shards were cut. So both give equal bits.

Shape suffixes: N texts, R token rows, L blocks, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from steer_engine.derive.actors import PAIRS_PER_CHUNK, Workers, ray_session
from steer_engine.derive.dump_folder import DumpFolder
from steer_engine.derive.fit import MAX_ROWS_BYTES, BlockFit, BlockRows, fit_block, joined, vector_of
from steer_engine.derive.methods import FROM_ROWS, PAIRED, require_method
from steer_engine.derive.moments import Array, Moments, Sample
from steer_engine.derive.progress import Progress
from steer_engine.derive.shard import Shard
from steer_engine.derive.texts import LABELS
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector

TEXTS_PER_CHUNK = 2 * PAIRS_PER_CHUNK

MAX_PROJECTED_TEXTS = 20_000
"""Texts, from the first, that `project` covers: enough for a histogram."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment of the actors. Matrix products round differently with another number of threads. With one, bits are equal
and actors do not compete for cores."""


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
        folder: a complete dump. On a cluster, every node must see it under this path.
        method: one of `methods.METHODS`.
        actors: processes that run in parallel (default: one per core of this machine, at most one per block).
        ray_address: cluster to run them on (None: a local Ray for this call).

    Raises:
        DerivationError: the dump is incomplete, a shard is missing, truncated or damaged (names the file), or the texts
            give no direction.
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
        workers = Workers(ray, DumpFitter, (str(path),), count=count, resources=resources, env=_ONE_THREAD)
        try:
            with shown.counting("checking", total=len(shards), unit="shards") as advance:
                for _ in workers.ordered("check", [(shard.index.name,) for shard in shards]):
                    advance(1)
            fits: list[BlockFit] = []
            with shown.counting("fitting", total=len(blocks), unit="blocks") as advance:
                for fit in workers.ordered("fit", [(block, method) for block in blocks]):
                    fits.append(fit)
                    advance(1)
        finally:
            workers.stop()
    return vector_of(fits, dump.manifest.vector_metadata(method))


class DumpFitter:
    """Fits single blocks of a dump. Ray actors host it; every actor must see the folder under one path."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    @cached_property
    def _dump(self) -> DumpFolder:
        return DumpFolder.open(self._folder)

    @cached_property
    def _shards(self) -> list[Shard]:
        return self._dump.require_complete()

    def check(self, index: str) -> None:
        """Hash the shard with an index file of that name. Raises DerivationError, with the file, if it is damaged."""
        Shard(self._folder / index).require_digest()

    def fit(self, block: int, method: str) -> BlockFit:
        """Fit a method at one block.

        Raises:
            DerivationError: a class is missing, the method needs pairs, or it needs more rows than fit in memory.
        """
        manifest = self._dump.manifest
        size = manifest.num_texts * manifest.hidden_size * np.dtype(np.float64).itemsize
        if method in FROM_ROWS and method not in PAIRED and size > MAX_ROWS_BYTES:
            raise DerivationError(
                f"{self._folder}: {method} keeps all rows of a block in memory, here {size >> 20} MiB, at most "
                f"{MAX_ROWS_BYTES >> 20} MiB. Take fewer texts, or diffmean or pca, which do not."
            )
        return fit_block(_rows_of_block(self._dump, self._shards, block), method)


def project(folder: Path, vector: ControlVector, blocks: Sequence[int]) -> dict[int, tuple[Array, Array]]:
    """Block -> components of the positives and of the negatives along the vector's unit direction, `[N]` each.

    Raises:
        DerivationError: the dump is of another model, lacks a block, or has texts of one class only.
    """
    dump = DumpFolder.open(folder)
    manifest = dump.manifest
    model = vector.metadata.model
    if vector.hidden_size != manifest.hidden_size or (model and model != manifest.model):
        raise DerivationError(
            f"{folder}: a dump of {manifest.model} (hidden size {manifest.hidden_size}); the vector is for "
            f"{model or 'a model'} (hidden size {vector.hidden_size})."
        )
    if manifest.site is not vector.metadata.site:
        raise DerivationError(
            f"{folder}: a dump of site {manifest.site.value!r}; the vector is of site {vector.metadata.site.value!r}."
        )
    shards = dump.require_complete()
    projections = {}
    for block in blocks:
        if block not in manifest.blocks:
            raise DerivationError(f"{folder}: block {block} was not captured; the dump has {manifest.blocks}.")
        direction_D = vector.directions[block].astype(np.float64)
        length = float(np.linalg.norm(direction_D))
        unit_D = direction_D / length if length > 0.0 else direction_D
        positive_ND, negative_ND = joined(_classes(shards, block, manifest.blocks.index(block)), MAX_PROJECTED_TEXTS)
        if not len(positive_ND) or not len(negative_ND):
            raise DerivationError(f"{folder}: its texts are of one class; a histogram compares two.")
        projections[block] = (positive_ND @ unit_D, negative_ND @ unit_D)
    return projections


def _rows_of_block(dump: DumpFolder, shards: Sequence[Shard], block: int) -> BlockRows:
    """The rows of a block, with their sums, which take one pass over the shards."""
    index = dump.manifest.blocks.index(block)
    total = {label: Moments.zero(1, dump.manifest.hidden_size) for label in LABELS}
    for texts in _chunks(shards, block, index):
        for label in LABELS:
            samples = [
                Sample(row_LD=text["row"][None], norm_L=text["norm"][None], norm_count=int(text["norm_count"]))
                for text in texts[texts["label"] == label]
            ]
            if samples:
                total[label] += Moments.of(samples)
    return BlockRows(
        block=block,
        positive=total["positive"],
        negative=total["negative"],
        chunks=lambda: _classes(shards, block, index),
        paired=dump.manifest.paired,
        source=str(dump.path),
    )


def _classes(shards: Sequence[Shard], block: int, index: int) -> Iterator[tuple[Array, Array]]:
    """Positive and negative rows `[N, D]`, chunk by chunk."""
    for texts in _chunks(shards, block, index):
        positive_ND, negative_ND = (texts["row"][texts["label"] == label] for label in LABELS)
        yield positive_ND, negative_ND


def _chunks(shards: Sequence[Shard], block: int, index: int) -> Iterator[np.ndarray]:
    """Records of `TEXTS_PER_CHUNK` texts (see `_records`), across the shards. One shard's rows are in memory."""
    waiting: list[np.ndarray] = []
    num_waiting = 0
    for shard in shards:
        records = _records(shard, block, index)
        while num_waiting + len(records) >= TEXTS_PER_CHUNK:
            cut = TEXTS_PER_CHUNK - num_waiting
            yield np.concatenate([*waiting, records[:cut]])
            waiting, num_waiting, records = [], 0, records[cut:]
        if len(records):
            waiting.append(records)
            num_waiting += len(records)
    if waiting:
        yield np.concatenate(waiting)


def _records(shard: Shard, block: int, index: int) -> np.ndarray:
    """One record per text of a shard: label, mean `row` `[D]`, and `norm`, the sum over `norm_count` token rows."""
    rows_RD = shard.rows_RD(block)
    norm_NL, norm_count_N = shard.norms()
    fields = [("label", "U8"), ("row", np.float64, rows_RD.shape[1:]), ("norm", np.float64), ("norm_count", np.int32)]
    records = np.empty(len(shard.entries), dtype=fields)
    records["label"] = [entry.label for entry in shard.entries]
    records["norm"] = norm_NL[:, index]
    records["norm_count"] = norm_count_N
    if len(rows_RD) == len(shard.entries):
        records["row"] = rows_RD
    else:
        spans = [entry.rows for entry in shard.entries]
        records["row"] = [rows_RD[begin:end].astype(np.float64).mean(axis=0) for begin, end in spans]
    return records
