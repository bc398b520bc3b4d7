"""`derive`: contrast pairs in, control vector out. Rows are streamed from the engines and not stored."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from steer_engine.derive.actors import start_capturing
from steer_engine.derive.capture_engine import EngineFacts
from steer_engine.derive.dump_folder import DumpManifest
from steer_engine.derive.fit import MAX_ROWS_BYTES, SAMPLE_TEXTS, CapturedRows
from steer_engine.derive.methods import FROM_ROWS, require_method
from steer_engine.derive.texts import Pair, Pairs, from_pairs, load_pairs
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector

SAMPLE_BYTES = 1 << 28
"""Size of the rows that are kept for the quality numbers of a method that needs only sums."""


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

    Ray actors, each with a `steer_engine.LLM`, capture the residual stream of every text at the same hook that steers.
    They send back sums, and rows if the method needs them.

    Args:
        model: path, Hugging Face id, or the name of a packaged model.
        pairs: JSONL file or name of a packaged set (see `load_pairs`), or pairs.
        method: one of `methods.METHODS`. Scale 1 of the vector is the difference of the means for all but `mean`.
        blocks: sites to capture, `"all"`, `"8-22"`, a number or numbers.
        position: token rows that represent a text: `"last"`, `"mean"`, or numbers such as `"-1,-2"`.
        chat: apply the model's chat template to the texts.
        actors: number of engines that run in parallel.
        ray_address: cluster to run them on (None: a local Ray for this call).
        gpus_per_actor: None for one each (or the tensor parallel size) if Ray has enough.
        engine_args: further arguments of the engine, such as `{"tensor_parallel_size": 2}`.

    Raises:
        DerivationError: pairs or settings are unusable, or give no direction; names file and line if there is one.
        UnsupportedEngineError: the model cannot be armed.
    """
    require_method(method)
    pairs = _as_pairs(pairs)
    with start_capturing(
        model,
        source=pairs.source or "pairs",
        position=position,
        blocks=blocks,
        chat=chat,
        dtype=dtype,
        actors=actors,
        ray_address=ray_address,
        gpus_per_actor=gpus_per_actor,
        engine_args=engine_args,
        progress=progress,
    ) as run:
        keep_rows_of = num_pairs_to_keep(method, len(pairs), run.facts)
        rows = CapturedRows()
        with run.shown.counting("capturing", total=len(pairs), unit="pairs") as advance:
            for chunk in run.engines.capture_pairs(pairs, keep_rows_of=keep_rows_of):
                rows.add(chunk)
                advance(chunk.positive.count)
    manifest = DumpManifest.of(model, run.config, run.facts, from_pairs(pairs))
    return rows.fit(method, run.facts.blocks, manifest.vector_metadata(method))


def _as_pairs(pairs: str | os.PathLike[str] | Pairs | Sequence[Pair]) -> Pairs:
    if isinstance(pairs, Pairs):
        return pairs
    if isinstance(pairs, str | os.PathLike):
        return load_pairs(pairs)
    return Pairs(tuple(pairs))


def num_pairs_to_keep(method: str, num_pairs: int, facts: EngineFacts) -> int:
    """Pairs whose rows are kept: all if the method needs them, else the first few, for the quality numbers.

    Raises:
        DerivationError: the method needs more rows than fit in memory.
    """
    bytes_of_pair = 2 * len(facts.blocks) * facts.hidden_size * np.dtype(np.float32).itemsize
    if method not in FROM_ROWS:
        return min(num_pairs, SAMPLE_TEXTS // 2, SAMPLE_BYTES // bytes_of_pair)
    size = num_pairs * bytes_of_pair
    if size > MAX_ROWS_BYTES:
        raise DerivationError(
            f"The rows of {num_pairs} pairs at {len(facts.blocks)} blocks take {size >> 20} MiB; this method keeps "
            f"them all, at most {MAX_ROWS_BYTES >> 20} MiB. Choose fewer blocks or pairs, or diffmean."
        )
    return num_pairs
