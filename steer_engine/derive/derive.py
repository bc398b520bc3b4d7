"""Contrast pairs in, control vector out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from steer_engine.derive.activations import EngineFacts, Position, ReaderConfig
from steer_engine.derive.actors import pool
from steer_engine.derive.dump import manifest_of
from steer_engine.derive.engine_options import as_blocks, engine_defaults, model_for_actors, model_name
from steer_engine.derive.fit import MAX_ROWS_BYTES, SAMPLE_BYTES, SAMPLE_PAIRS, Readings, fit, vector_of
from steer_engine.derive.methods import FROM_ROWS, require_method
from steer_engine.derive.pairs import Pair, Pairs, load_pairs
from steer_engine.derive.progress import Progress
from steer_engine.derive.texts import from_pairs
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector


def derive(
    model: str,
    pairs: str | os.PathLike[str] | Pairs | Sequence[Pair],
    *,
    method: str = "diffmean",
    blocks: str | int | Iterable[int] = "all",
    position: str = "last",
    chat: bool = False,
    dtype: str = "auto",
    actors: int = 1,
    ray_address: str | None = None,
    gpus_per_actor: float | None = None,
    engine_args: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ControlVector:
    """Derive a control vector on the engine that will serve it.

    Ray actors, each with a `steer_engine.LLM`, read the residual stream of every text at the very hook that steers, and
    send back sums (or rows, for methods that need them).

    Args:
        model: path, Hugging Face id, or the name of a packaged model.
        pairs: JSONL file or name of a packaged set (see `load_pairs`), or pairs.
        method: one of `methods.METHODS`. Scale 1 of the vector is the difference of the means for all but `mean`.
        blocks: sites to read, `"all"`, `"8-22"`, a number or numbers.
        position: token rows that stand for a text: `"last"`, `"mean"`, or numbers such as `"-1,-2"`.
        chat: render the texts with the model's chat template.
        actors: engines that read side by side. ray_address: cluster to run them on (None: a local Ray for this call).
        gpus_per_actor: None takes one each where Ray has as many.
        engine_args: further arguments of the engine, such as `{"tensor_parallel_size": 2}`.

    Raises:
        DerivationError: the pairs or settings cannot give a vector; names file and line where there is one.
        UnsupportedEngineError: the model cannot be armed.
    """
    require_method(method)
    pairs = _as_pairs(pairs)
    config = ReaderConfig(
        model=model_for_actors(model, local=ray_address is None),
        blocks=as_blocks(blocks),
        position=Position(position),
        chat=chat,
        source=pairs.source or "pairs",
        engine_args=tuple({**engine_defaults(), "dtype": dtype, **(engine_args or {})}.items()),
    )
    with (
        Progress(enabled=progress) as shown,
        pool(config, actors=actors, ray_address=ray_address, gpus_per_actor=gpus_per_actor) as engines,
    ):
        with shown.waiting(f"starting {actors} engine{'s' if actors > 1 else ''} for {model}"):
            facts = engines.facts()
        keep_rows_of = _num_rows_to_keep(method, len(pairs), facts)
        readings = Readings()
        with shown.counting("reading", total=len(pairs), unit="pairs") as advance:
            for reading in engines.read(pairs, keep_rows_of=keep_rows_of):
                readings.add(reading)
                advance(reading.positive.count)
    fitted = fit(readings, method, facts.blocks)
    return vector_of(fitted, manifest_of(model_name(model), config, facts, from_pairs(pairs)), method)


def _as_pairs(pairs: str | os.PathLike[str] | Pairs | Sequence[Pair]) -> Pairs:
    if isinstance(pairs, Pairs):
        return pairs
    if isinstance(pairs, str | os.PathLike):
        return load_pairs(pairs)
    return Pairs(tuple(pairs))


def _num_rows_to_keep(method: str, num_pairs: int, facts: EngineFacts) -> int:
    """Pairs whose rows are kept: all for methods that need them, else as many as a bounded sample for quality takes."""
    size_of_pair = 2 * len(facts.blocks) * facts.hidden_size * np.dtype(np.float32).itemsize
    if method not in FROM_ROWS:
        return min(num_pairs, SAMPLE_PAIRS, SAMPLE_BYTES // size_of_pair)
    size = num_pairs * size_of_pair
    if size > MAX_ROWS_BYTES:
        raise DerivationError(
            f"The rows of {num_pairs} pairs at {len(facts.blocks)} blocks take {size >> 20} MiB; this method keeps "
            f"them all, at most {MAX_ROWS_BYTES >> 20} MiB. Choose fewer blocks or pairs, or diffmean."
        )
    return num_pairs
