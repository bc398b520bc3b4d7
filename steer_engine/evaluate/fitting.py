"""A control vector from contrasts, on the engine that evaluates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from steer_engine.derive.fit import CapturedRows
from steer_engine.derive.moments import Chunk, Sample, summarise
from steer_engine.evaluate.conditions import Contrast
from steer_engine.evaluate.encode import Encoder
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import VectorMetadata

if TYPE_CHECKING:
    from steer_engine.llm import LLM


PAIRS_PER_BATCH = 64

Side = list[Sample]


def read(
    llm: LLM, encoder: Encoder, pairs: Sequence[Contrast], advance: Callable[[int], None] = lambda steps: None
) -> tuple[Side, Side]:
    """The residual stream after the last token of every positive and every negative, at all blocks."""
    positive: Side = []
    negative: Side = []
    for start in range(0, len(pairs), PAIRS_PER_BATCH):
        batch = pairs[start : start + PAIRS_PER_BATCH]
        texts = [encoder.ids(*text) for pair in batch for text in (pair.positive, pair.negative)]
        samples = [summarise(rows_LTD, skip_first=False) for rows_LTD in llm.capture(texts, "last")]
        positive += samples[::2]
        negative += samples[1::2]
        advance(len(batch))
    return positive, negative


def vector_of(llm: LLM, sides: tuple[Side, Side], method: str, *, model: str, notes: str) -> ControlVector:
    """The vector that a method makes of what was read, at all blocks of the model.

    Raises:
        DerivationError: the sides do not differ.
    """
    rows = CapturedRows()
    rows.add(Chunk.of(*sides, keep_rows=True))
    metadata = VectorMetadata(
        model=model,
        hidden_size=llm.hidden_size,
        num_blocks=llm.num_blocks,
        method=method,
        position="last",
        notes=notes,
    )
    return rows.fit(method, llm.capture_blocks, metadata)
