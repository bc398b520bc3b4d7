"""The rows of one block of a dump, text by text in canonical order, however the shards were cut.

Shape suffixes: N texts, R token rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from steer_engine.derive.actors import PAIRS_PER_CHUNK
from steer_engine.derive.methods import Array
from steer_engine.derive.moments import Moments, Sample
from steer_engine.derive.shard import Shard

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
