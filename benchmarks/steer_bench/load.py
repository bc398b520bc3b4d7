"""A load: the requests of a run and their steering. They are generated from a seed, so every arm gets the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np


class Steering(StrEnum):
    """Steering of the requests of a load. Vectors, features and low-rank edits cover all blocks."""

    NONE = "none"
    ADD = "add"
    DIRECTIONAL = "directional"
    TRIGGERS = "triggers"
    """Adds from the second token of each prompt on, wherever it comes again, up to another token."""
    CONDITIONS = "conditions"
    """Adds under a condition on the whole prompt, which holds."""
    SCHEDULES = "schedules"
    """Adds that fade over the first 64 tokens."""
    FEATURES = "4 features"
    """Sets the activations of four features of an autoencoder."""
    RANKS = "rank 4"
    """Low-rank edits of rank 4."""
    ROTATIONS = "rotations"
    """Rotations in the plane of two vectors."""
    PROBES = "4 probes"
    """Reads only: four dot products per token."""
    PROBED_ADDS = "adds and 4 probes"


OPS: dict[Steering, tuple[str, ...]] = {
    Steering.NONE: (),
    Steering.PROBES: (),
    Steering.DIRECTIONAL: ("ablate", "clamp", "add_relative"),
    Steering.FEATURES: ("feature",),
    Steering.RANKS: ("low_rank",),
    Steering.ROTATIONS: ("rotate",),
}
"""Operations of a load, `add` if it is missing here; requests use them in rotation."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """`num_requests` random prompts, `concurrency` of them in flight, each with exactly `max_tokens` output tokens.

    num_vectors: distinct vectors among the steered requests, used in rotation.
    every: every n-th request is steered (1 = all, 2 = half).
    scope, blocks: those of every edit, as in the request field.
    probe_blocks: blocks of every probe, as in the request field.
    shared_prefix: number of tokens that all prompts start with; equal in all loads with the same seed.
    """

    num_requests: int
    concurrency: int
    max_tokens: int
    min_prompt: int = 16
    max_prompt: int = 48
    shared_prefix: int = 0
    seed: int = 0
    steering: Steering = Steering.NONE
    num_vectors: int = 1
    every: int = 1
    scope: str = "all"
    blocks: int | str = "all"
    probe_blocks: int | str = "all"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids of the prompts, without special tokens (both ends of the vocabulary)."""
        low, high = min(1000, vocab_size // 4), vocab_size - min(1000, vocab_size // 4)
        prefix = np.random.default_rng([self.seed, 1]).integers(low, high, self.shared_prefix).tolist()
        rng = np.random.default_rng([self.seed, 2, self.num_requests])
        lengths = rng.integers(self.min_prompt, self.max_prompt + 1, self.num_requests)
        return [prefix + rng.integers(low, high, int(length)).tolist() for length in lengths]

    def vector_of(self, request: int) -> int | None:
        """Number of the request's vector; None = not steered."""
        if self.steering is Steering.NONE or request % self.every:
            return None
        return (request // self.every) % self.num_vectors

    @property
    def num_steered(self) -> int:
        return sum(self.vector_of(request) is not None for request in range(self.num_requests))

    @property
    def ops(self) -> tuple[str, ...]:
        """Operations of the steered requests, used in rotation."""
        return OPS.get(self.steering, ("add",))

    def op_of(self, request: int) -> str:
        return self.ops[request % len(self.ops)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Load:
        return cls(**{**raw, "steering": Steering(raw["steering"])})


def vector(number: int, num_blocks: int, hidden_size: int) -> np.ndarray:
    """float32 [L, D]: a random unit vector for each of the L blocks."""
    rows_LD = np.random.default_rng([7, number]).standard_normal((num_blocks, hidden_size))
    unit_LD: np.ndarray = (rows_LD / np.linalg.norm(rows_LD, axis=1, keepdims=True)).astype(np.float32)
    return unit_LD


def rows(number: int, count: int, hidden_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 `[count, D]`: random unit rows to read, and orthonormal rows to write."""
    rng = np.random.default_rng([8, number])
    read_RD = rng.standard_normal((count, hidden_size))
    read_RD /= np.linalg.norm(read_RD, axis=1, keepdims=True)
    write_RD = np.linalg.qr(rng.standard_normal((hidden_size, count)))[0].T
    return read_RD.astype(np.float32), np.ascontiguousarray(write_RD, dtype=np.float32)
