"""`dump`: texts in, activation dump out. A run that stopped is resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np

from steer_engine.derive.actors import PAIRS_PER_CHUNK, Capturer, start_capturing
from steer_engine.derive.capture_config import EngineOptions, Position
from steer_engine.derive.capture_engine import CapturedText
from steer_engine.derive.dump_folder import DumpFolder, DumpManifest
from steer_engine.derive.progress import Progress
from steer_engine.derive.shard import CODES
from steer_engine.derive.texts import Pair, PairRow, Pairs, Text, Texts, as_pairs, from_pairs, load_texts
from steer_engine.errors import DerivationError

if TYPE_CHECKING:
    from steer_engine.llm import LLM

TEXTS_PER_CHUNK = 2 * PAIRS_PER_CHUNK
"""The texts of a chunk of `derive`, so that both run the same batches."""

CHUNK_BYTES = 256 << 20
"""Limit on the rows of one chunk, estimated from the length of its texts."""

SHARD_BYTES = 256 << 20
MAX_SHARD_BYTES = 768 << 20
"""A shard is written once it has reached its size. With the chunk that filled it, it stays below 1 GiB."""

FLUSH_SECONDS = 60.0
"""A shard is also written when its first rows are this old: a killed run loses no more than that."""

MAX_NAMED = 20
"""Texts that one error lists."""

_EXTRA_TOKENS = 64  # of a chat template and the tokenizer, beside one token per byte of text


def dump(
    model: str | LLM,
    texts: str | os.PathLike[str] | Texts | Pairs | Iterable[Pair | PairRow],
    folder: str | os.PathLike[str],
    *,
    blocks: str | int | Iterable[int] = "all",
    site: str = "block",
    position: str = "last",
    store: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    **engine: Unpack[EngineOptions],
) -> DumpFolder:
    """Capture the residual stream of texts and store it in a folder. A second call resumes a run that stopped.

    Args, `EngineOptions` (see `derive`), and:
        texts: JSONL file of pairs or texts (see `load_texts`), name of a packaged set, or either in memory.
        folder: a new folder, or that of an unfinished run with the same settings.
        position: also `"all"`, which keeps the row of every token.
        store: dtype of the rows: `"auto"` is the engine's.
        shard_bytes: size at which a shard is written.

    Raises:
        DerivationError: texts or settings are unusable (lists all texts that are too long or too short before anything
            is captured), or the folder is the dump of something else.
    """
    if store not in ("auto", *CODES):
        raise DerivationError(f"store {store!r} is none of auto, {', '.join(CODES)}.")
    if not 1 <= shard_bytes <= MAX_SHARD_BYTES:
        raise DerivationError(f"Shards of {shard_bytes} bytes; 1 to {MAX_SHARD_BYTES} are possible.")
    texts = _as_texts(texts)
    with start_capturing(
        model,
        source=texts.source,
        position=position,
        blocks=blocks,
        site=site,
        **engine,
    ) as run:
        started = DumpFolder.start(Path(folder), DumpManifest.of(run.config.model, run.config, run.facts, texts, store))
        fill(started, run.engines, texts, run.shown, shard_bytes=shard_bytes)
    return started


def fill(
    folder: DumpFolder,
    engines: Capturer,
    texts: Texts,
    shown: Progress,
    *,
    shard_bytes: int = SHARD_BYTES,
    flush_seconds: float = FLUSH_SECONDS,
) -> None:
    """Capture the texts that the folder lacks, and write them."""
    with folder.writing():
        folder.clear_leftovers()
        done = _done(folder, texts)
        missing = [chunk for chunk in chunks(texts, folder.manifest) if chunk.start not in done]
        if not missing:
            return
        position = Position(folder.manifest.position)
        errors = engines.text_errors([texts[i] for chunk in missing for i in chunk], position)
        if errors:
            listed = "\n".join(errors[:MAX_NAMED])
            more = f"\n... and {len(errors) - MAX_NAMED} more." if len(errors) > MAX_NAMED else ""
            raise DerivationError(f"{len(errors)} text(s) cannot be captured:\n{listed}{more}")
        captured = engines.capture_texts([[texts[i] for i in chunk] for chunk in missing], position)
        with shown.counting("capturing", total=len(texts), unit="texts") as advance:
            advance(len(done))
            for first, rows in _shards(zip(missing, captured, strict=True), shard_bytes, flush_seconds, advance):
                folder.write(first, texts[first : first + len(rows)], rows)


def _as_texts(texts: str | os.PathLike[str] | Texts | Pairs | Iterable[Pair | PairRow]) -> Texts:
    if isinstance(texts, Texts):
        return texts
    if isinstance(texts, str | os.PathLike):
        return load_texts(texts)
    return from_pairs(as_pairs(texts))


def chunks(texts: Sequence[Text], manifest: DumpManifest) -> list[range]:
    """Indexes of the texts of each chunk: whole pairs. They depend on the data alone."""
    step = 2 if manifest.paired else 1
    row_bytes = len(manifest.blocks) * manifest.hidden_size * np.dtype(np.float32).itemsize
    every_token = Position(manifest.position).includes_first
    found: list[range] = []
    begin = size = 0
    for index in range(0, len(texts), step):
        unit = texts[index : index + step]
        tokens = sum(len((text.prompt + text.text).encode()) + _EXTRA_TOKENS for text in unit) if every_token else 0
        if index > begin and (index - begin + step > TEXTS_PER_CHUNK or size + tokens * row_bytes > CHUNK_BYTES):
            found.append(range(begin, index))
            begin, size = index, 0
        size += tokens * row_bytes
    return [*found, range(begin, len(texts))]


def _done(folder: DumpFolder, texts: Texts) -> set[int]:
    """Indexes of the texts that the folder contains."""
    done = set()
    for shard in folder.shards():
        for index, entry in enumerate(shard.entries, start=shard.head.first):
            if texts[index].id != entry.id:
                raise DerivationError(
                    f"{shard.index}: text {index} is {entry.id[:64]!r} there and {texts[index].id[:64]!r} now; "
                    "the ids of the texts have changed. Choose another folder, or the texts of the first run."
                )
            done.add(index)
    return done


def _shards(
    chunks: Iterable[tuple[range, list[CapturedText]]],
    shard_bytes: int,
    flush_seconds: float,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, list[CapturedText]]]:
    """Index of the first text, and the texts, of each shard to write. A shard joins consecutive chunks."""
    first = num_bytes = 0
    rows: list[CapturedText] = []
    began = time.monotonic()
    for chunk, captured in chunks:
        if rows and chunk.start != first + len(rows):
            yield first, rows
            rows = []
        if not rows:
            first, num_bytes, began = chunk.start, 0, time.monotonic()
        rows.extend(captured)
        num_bytes += sum(text.rows_LPD.nbytes for text in captured)
        advance(len(captured))
        if num_bytes >= shard_bytes or time.monotonic() - began >= flush_seconds:
            yield first, rows
            rows = []
    if rows:
        yield first, rows
