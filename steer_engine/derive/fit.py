"""Fit a direction to the rows of a contrast, and measure how well it separates the classes.

The one fitter of this package. Rows come chunk by chunk and may be passed over several times, whether engines sent them
(`CapturedRows`) or a dump contains them (`dump_fitter.py`). Equal chunks in equal order give equal bits.

Shape suffixes: N texts, L blocks, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from steer_engine.derive.methods import (
    FROM_MOMENTS,
    FROM_ROWS,
    PAIRED,
    mean_difference,
    signed_and_scaled,
    top_direction,
)
from steer_engine.derive.moments import Array, Chunk, Moments
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import VectorMetadata

MAX_ROWS_BYTES = 1 << 30
"""Rows that a method keeps in memory, at most."""

SAMPLE_TEXTS = 2048
"""Texts, from the first, that the held-out AUROC is measured on. More would change it by a few hundredths at most, and
would need memory that grows with the data."""

MIN_TEXTS_OF_A_CLASS = 2

FOLDS = 5
MIN_TEXTS_FOR_AUROC = 2 * FOLDS
"""With fewer texts of a class, a fold holds out less than two: its AUROC says nothing and is left out."""

ZERO = 2.0**-20
"""A direction up to this length, in mean residual norms, is the rounding error of a zero direction: 2**-24 for each
float32 value, times 16 for the model's own rounding."""


@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """Positives and negatives of one contrast at one block.

    positive, negative: sums over all texts (L = 1). chunks: returns positive and negative rows `[N, D]` in float64,
    chunk by chunk, in the same order at each call. They may cover only the first texts, or none, if the method needs
    sums only. paired: the n-th positive and the n-th negative of a chunk are a pair. source: name of the texts, for
    messages.
    """

    block: int
    positive: Moments
    negative: Moments
    chunks: Callable[[], Iterable[tuple[Array, Array]]]
    paired: bool = True
    source: str = "pairs"

    @property
    def residual_norm(self) -> float:
        """Mean norm of a token row."""
        total = self.positive.norm_L + self.negative.norm_L
        return float(total[0] / (self.positive.norm_count + self.negative.norm_count))

    @property
    def gap_D(self) -> Array:
        """Difference of the class means."""
        gap_D: Array = self.positive.mean_LD[0] - self.negative.mean_LD[0]
        return gap_D

    def differences(self) -> Iterator[Array]:
        """Positive minus negative of each pair, `[N, D]`, chunk by chunk."""
        for positive_ND, negative_ND in self.chunks():
            yield positive_ND - negative_ND


def joined(chunks: Iterable[tuple[Array, Array]], num_texts: int | None = None) -> tuple[Array, Array]:
    """Positive and negative rows in memory: of whole chunks until they contain `num_texts` texts, else of all."""
    parts: list[tuple[Array, Array]] = []
    count = 0
    for positive_ND, negative_ND in chunks:
        parts.append((positive_ND, negative_ND))
        count += len(positive_ND) + len(negative_ND)
        if num_texts is not None and count >= num_texts:
            break
    if not parts:
        return np.empty((0, 0)), np.empty((0, 0))
    return np.concatenate([positive for positive, _ in parts]), np.concatenate([negative for _, negative in parts])


class CapturedRows:
    """Chunks of pairs that engines captured: running sums of all of them, and the rows of those that contain rows."""

    def __init__(self) -> None:
        self._sums: tuple[Moments, Moments] | None = None
        self._with_rows: list[Chunk] = []

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk. Chunks must come in the order of the pairs."""
        if self._sums is None:
            self._sums = chunk.positive, chunk.negative
        else:
            self._sums = self._sums[0] + chunk.positive, self._sums[1] + chunk.negative
        if chunk.positive_NLD is not None:
            self._with_rows.append(chunk)

    def at(self, index: int, block: int) -> BlockRows:
        """The block at an index of the captured blocks."""
        assert self._sums is not None, "nothing was captured"
        positive, negative = self._sums

        def chunks() -> Iterator[tuple[Array, Array]]:
            for chunk in self._with_rows:
                assert chunk.positive_NLD is not None
                assert chunk.negative_NLD is not None
                yield chunk.positive_NLD[:, index].astype(np.float64), chunk.negative_NLD[:, index].astype(np.float64)

        return BlockRows(block=block, positive=positive.at(index), negative=negative.at(index), chunks=chunks)

    def fit(self, method: str, blocks: Sequence[int], metadata: VectorMetadata) -> ControlVector:
        """Fit a method at all captured blocks. Raises DerivationError as `fit_block` and `vector_of`."""
        fits = [fit_block(self.at(index, block), method) for index, block in enumerate(blocks)]
        return vector_of(fits, metadata)


@dataclass(frozen=True, kw_only=True)
class BlockFit:
    """Direction of one block and its quality.

    separation: held-out AUROC. explained: share of the pairs' squared differences that lies along the direction. None
    if there are too few texts, or no pairs.
    """

    block: int
    direction_D: Array
    residual_norm: float
    separation: float | None
    explained: float | None


def fit_block(rows: BlockRows, method: str) -> BlockFit:
    """Fit a method at one block.

    Raises:
        DerivationError: a class is missing, or the method needs pairs.
    """
    counts = rows.positive.count, rows.negative.count
    if min(counts) < MIN_TEXTS_OF_A_CLASS:
        raise DerivationError(
            f"{rows.source}: {counts[0]} positive and {counts[1]} negative texts; a direction needs at least "
            f"{MIN_TEXTS_OF_A_CLASS} of each. Give the texts labels, or pairs."
        )
    if method in PAIRED and not rows.paired:
        raise DerivationError(f"{rows.source}: {method} needs pairs; these texts have none. Take diffmean or lda.")
    direction_D = _direction(rows, method)
    separation = None
    if method != "mean":  # the mean of one class is not meant to separate classes
        separation = held_out_auroc(*joined(rows.chunks(), SAMPLE_TEXTS), FROM_ROWS.get(method, mean_difference))
    return BlockFit(
        block=rows.block,
        direction_D=direction_D,
        residual_norm=rows.residual_norm,
        separation=separation,
        explained=explained_variance(rows.differences(), direction_D) if rows.paired else None,
    )


def _direction(rows: BlockRows, method: str) -> Array:
    if method in FROM_MOMENTS:
        direction_D: Array = FROM_MOMENTS[method](rows.positive, rows.negative)[0]
        return direction_D
    if method not in PAIRED:
        return FROM_ROWS[method](*joined(rows.chunks()))
    # Passes over the differences, so that a dump larger than memory can be fitted.
    gap_D = rows.gap_D
    centre_D = gap_D if method == "pca_centred" else np.zeros_like(gap_D)
    top_D, _ = top_direction(lambda: (part_ND - centre_D for part_ND in rows.differences()), gap_D)
    return signed_and_scaled(top_D, gap_D)


def vector_of(fits: Sequence[BlockFit], metadata: VectorMetadata) -> ControlVector:
    """A control vector of all blocks. Norms and quality are added to the metadata.

    Raises:
        DerivationError: a direction is zero up to rounding; names the blocks.
    """
    zero = [fit.block for fit in fits if float(np.linalg.norm(fit.direction_D)) <= ZERO * fit.residual_norm]
    if zero:
        raise DerivationError(
            f"Positives and negatives do not differ at block(s) {', '.join(map(str, zero))}: the direction is zero. "
            "Causes are texts that differ only before the position, or the same texts in both classes. "
            "Choose other pairs, blocks or another position."
        )
    quality = {
        "residual_norms": {fit.block: fit.residual_norm for fit in fits},
        "separation": {fit.block: fit.separation for fit in fits if fit.separation is not None},
        "explained_variance": {fit.block: fit.explained for fit in fits if fit.explained is not None},
    }
    return ControlVector(
        directions={fit.block: fit.direction_D.astype(np.float32) for fit in fits},
        metadata=VectorMetadata.checked(metadata.model_dump() | quality),
    )


def auroc(positive_N: Array, negative_N: Array) -> float:
    """Probability that a random positive scores above a random negative; a tie counts half."""
    scores = np.concatenate([positive_N, negative_N])
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count) - (count - 1) / 2.0)[place]
    num_positive, num_negative = len(positive_N), len(negative_N)
    wins = rank_N[:num_positive].sum() - num_positive * (num_positive + 1) / 2.0
    return float(wins / (num_positive * num_negative))


def held_out_auroc(positive_ND: Array, negative_ND: Array, method: Callable[[Array, Array], Array]) -> float | None:
    """Mean AUROC over folds, each with the direction of the other folds. None for too few texts.

    A fold is every `FOLDS`-th text of each class. So pairs stay together, and a sorted file's topics are spread evenly.
    """
    if min(len(positive_ND), len(negative_ND)) < MIN_TEXTS_FOR_AUROC:
        return None
    positive_fold_N, negative_fold_N = (np.arange(len(side)) % FOLDS for side in (positive_ND, negative_ND))
    areas = []
    for fold in range(FOLDS):
        positive_out, negative_out = positive_fold_N == fold, negative_fold_N == fold
        direction_D = method(positive_ND[~positive_out], negative_ND[~negative_out])
        areas.append(auroc(positive_ND[positive_out] @ direction_D, negative_ND[negative_out] @ direction_D))
    return float(np.mean(areas))


def explained_variance(differences: Iterable[Array], direction_D: Array) -> float | None:
    """Share of the squared differences `[N, D]` of pairs that lies along a direction.

    None if the direction or all differences are zero, or if there are none.
    """
    length = float(np.linalg.norm(direction_D))
    along = total = 0.0
    for part_ND in differences:
        along += float(((part_ND @ direction_D) ** 2).sum())
        total += float((part_ND**2).sum())
    return min(1.0, along / (length**2 * total)) if length > 0.0 and total > 0.0 else None
