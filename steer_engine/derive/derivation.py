"""`derive`: contrast pairs in, control vector out. Rows are streamed from the engines and not stored."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from steer_engine.derive.actors import start_capturing
from steer_engine.derive.capture_config import CaptureConfig, EngineOptions, site_named
from steer_engine.derive.capture_engine import EngineFacts
from steer_engine.derive.dump_folder import DumpManifest
from steer_engine.derive.fit import MAX_ROWS_BYTES, SAMPLE_TEXTS, CapturedRows
from steer_engine.derive.methods import FROM_ROWS, require_method
from steer_engine.derive.texts import Pair, PairRow, Pairs, as_pairs, from_pairs
from steer_engine.errors import DerivationError
from steer_engine.site import Site
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import SUFFIXES, save

if TYPE_CHECKING:
    from steer_engine.llm import LLM

SAMPLE_BYTES = 1 << 28
"""Size of the rows that are kept for the quality numbers of a method that needs only sums."""


def derive(
    model: str | LLM,
    pairs: str | os.PathLike[str] | Pairs | Iterable[Pair | PairRow],
    *,
    method: str = "diffmean",
    blocks: str | int | Iterable[int] = "all",
    site: str = "block",
    position: str = "last",
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    **engine: Unpack[EngineOptions],
) -> ControlVector:
    """Derive a control vector on the engine that will serve it.

    Ray actors, each with a `steer_engine.LLM`, capture the residual stream of every text at the same hook that steers.
    They send back sums, and rows if the method needs them. A living `LLM` captures in this process, without Ray.

        vector = derive("smollm2-135m", [("I love it.", "I hate it."), ("What joy!", "What a mess!")], blocks="8-19")

    Args:
        model: path, Hugging Face id, or the name of a packaged model; or a living `LLM(..., capture=True)`.
        pairs: JSONL file or name of a packaged set (see `load_pairs`); or an iterable of (positive, negative), of
            (positive, negative, prompt), or of mappings with these keys, such as the rows of a dataset.
        method: one of `methods.METHODS`. Scale 1 of the vector is the difference of the means for all but `mean`.
        blocks: to capture, `"all"`, `"8-22"`, a number or numbers.
        site: what is captured in each block: `"block"`, the stream after it; `"attn"` or `"mlp"`, the output of its
            attention or MLP. The vector remembers it, and requests apply it there.
        position: token rows that represent a text: `"last"`, `"mean"`, or numbers such as `"-1,-2"`.
        out: file to save the vector to, `.safetensors` or `.gguf`. An existing one is replaced only with `force`.
        engine: `chat`, `dtype`, `actors`, `ray_address`, `gpus_per_actor`, `engine_args`, `progress`: see
            `EngineOptions`.

    Raises:
        DerivationError: pairs or settings are unusable, or give no direction; names file and line if there is one.
            All that needs no engine is checked before one starts.
        UnsupportedEngineError: the model cannot be armed.
    """
    require_method(method)
    pairs = as_pairs(pairs)
    if out is not None:
        numbers = CaptureConfig.of("", position=position, blocks=blocks, chat=False, source="", dtype="",
                                   engine_args=None, local=False).blocks  # fmt: skip
        remedy = "Leave it out, for example with blocks='1-29'"
        require_writable(Path(out), force=force, blocks=numbers, site=site, remedy=remedy)
    with start_capturing(
        model,
        source=pairs.source or "pairs",
        position=position,
        blocks=blocks,
        site=site,
        **engine,
    ) as run:
        keep_rows_of = num_pairs_to_keep(method, len(pairs), run.facts)
        rows = CapturedRows()
        with run.shown.counting("capturing", total=len(pairs), unit="pairs") as advance:
            for chunk in run.engines.capture_pairs(pairs, keep_rows_of=keep_rows_of):
                rows.add(chunk)
                advance(chunk.positive.count)
    manifest = DumpManifest.of(run.config.model, run.config, run.facts, from_pairs(pairs))
    vector = rows.fit(method, run.facts.blocks, manifest.vector_metadata(method))
    if out is not None:
        save(vector, Path(out))
    return vector


def require_writable(
    out: Path, *, force: bool, blocks: tuple[int, ...] | None, site: str = "block", remedy: str
) -> None:
    """Raise DerivationError, before minutes of work, if a vector cannot be written to `out`.

    blocks: those that the vector will have; None for all. remedy: how to leave out block 0.
    """
    if out.suffix == ".gguf" and site_named(site) is not Site.BLOCK:
        raise DerivationError(
            f"{out}: a GGUF control vector applies to the stream after a block, not to site {site!r}; write "
            ".safetensors."
        )
    if out.suffix not in SUFFIXES:
        raise DerivationError(f"{out}: the output's name must end in {' or '.join(SUFFIXES)}.")
    if out.suffix == ".gguf" and (blocks is None or 0 in blocks):
        raise DerivationError(
            f"{out}: llama.cpp rejects a control vector with a direction for block 0. {remedy}, or write .safetensors."
        )
    require_absent(out, force=force)


def require_absent(out: Path, *, force: bool) -> None:
    """Raise DerivationError if a file exists and `force` is not given, or if none can be written there."""
    folder = next(each for each in out.absolute().parents if each.exists())  # missing folders are made
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise DerivationError(f"{out}: {folder} is not a folder that can be written to; choose another place.")
    if out.exists() and not force:
        raise DerivationError(
            f"{out}: this file exists already; choose another name, or --force to replace it (in Python, force=True)."
        )


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
