"""Rows of texts and their sums. Most methods need only sums, so memory does not grow with the number of texts.

Shape suffixes: N texts, T token rows, L blocks, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steer_engine.errors import DerivationError

Rows = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text: the row that represents it at each block, and the norms of the token rows behind it.

    norm_L: sum of |x| over `norm_count` token rows.
    """

    row_LD: Array
    norm_L: Array
    norm_count: int


def require_finite(rows: Rows) -> None:
    """Raise DerivationError if captured rows contain NaN or infinity."""
    if not np.isfinite(rows).all():
        raise DerivationError("The model's residual stream is not finite here; another dtype (bfloat16) may help.")


def summarise(rows_LTD: Rows, *, skip_first: bool, stream_LTD: Rows | None = None) -> Sample:
    """Mean over the token rows of a text, and the sum of the norms of the residual stream there, in float64.

    stream_LTD: the stream after the same blocks, if the rows are of another site.
    skip_first: the rows begin with the text's first token; leave out its norm if there are others. Models park
        attention there: its norm is tens to hundreds of times that of any other row and would dominate the mean.

    Raises:
        DerivationError: a row is not finite.
    """
    require_finite(rows_LTD)
    rows = rows_LTD.astype(np.float64)
    stream = rows if stream_LTD is None else stream_LTD.astype(np.float64)
    counted = stream[:, 1:] if skip_first and rows.shape[1] > 1 else stream
    norms_LT = np.linalg.norm(counted, axis=-1)
    return Sample(row_LD=rows.mean(axis=1), norm_L=norms_LT.sum(axis=1), norm_count=counted.shape[1])


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over the texts of one class. Addition rounds: add parts in a fixed order for equal bits.

    count: texts. sum_LD: sum of their rows. norm_L: sum of |x| over `norm_count` token rows.
    """

    count: int
    sum_LD: Array
    norm_count: int
    norm_L: Array

    @classmethod
    def zero(cls, num_blocks: int, hidden_size: int) -> Moments:
        return cls(count=0, sum_LD=np.zeros((num_blocks, hidden_size)), norm_count=0, norm_L=np.zeros(num_blocks))

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Moments:
        """Sums of at least one text, added in order in float64."""
        total = cls.zero(*samples[0].row_LD.shape)
        sum_LD, norm_L = total.sum_LD, total.norm_L
        for sample in samples:
            sum_LD += sample.row_LD
            norm_L += sample.norm_L
        return cls(count=len(samples), sum_LD=sum_LD, norm_count=sum(s.norm_count for s in samples), norm_L=norm_L)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            count=self.count + other.count,
            sum_LD=self.sum_LD + other.sum_LD,
            norm_count=self.norm_count + other.norm_count,
            norm_L=self.norm_L + other.norm_L,
        )

    def at(self, index: int) -> Moments:
        """Sums of the block at an index (L = 1)."""
        part = slice(index, index + 1)
        return Moments(count=self.count, sum_LD=self.sum_LD[part], norm_count=self.norm_count, norm_L=self.norm_L[part])

    @property
    def mean_LD(self) -> Array:
        return self.sum_LD / self.count


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive pairs: sums of each class, and their rows `[N, L, D]` if they were requested."""

    positive: Moments
    negative: Moments
    positive_NLD: Rows | None = None
    negative_NLD: Rows | None = None

    @classmethod
    def of(cls, positive: Sequence[Sample], negative: Sequence[Sample], *, keep_rows: bool) -> Chunk:
        return cls(
            positive=Moments.of(positive),
            negative=Moments.of(negative),
            positive_NLD=_stacked(positive) if keep_rows else None,
            negative_NLD=_stacked(negative) if keep_rows else None,
        )


def _stacked(samples: Sequence[Sample]) -> Rows:
    return np.stack([sample.row_LD for sample in samples]).astype(np.float32)
