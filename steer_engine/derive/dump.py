"""Texts in, activation dump out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from steer_engine.derive.activations import EngineFacts, Position, ReaderConfig, TextRows
from steer_engine.derive.actors import PAIRS_PER_CHUNK, Pool, pool
from steer_engine.derive.dump_folder import DumpFolder, Manifest
from steer_engine.derive.engine_options import as_blocks, engine_defaults, model_for_actors, model_name
from steer_engine.derive.pairs import Pair, Pairs
from steer_engine.derive.progress import Progress
from steer_engine.derive.shard import CODES
from steer_engine.derive.texts import Text, Texts, from_pairs, load_texts
from steer_engine.errors import DerivationError

TEXTS_PER_CHUNK = 2 * PAIRS_PER_CHUNK
"""As `derive` reads them, so that both see the same batches."""

CHUNK_BYTES = 256 << 20
"""Rows of one chunk, at most, as far as the length of its texts tells beforehand."""

SHARD_BYTES = 256 << 20
MAX_SHARD_BYTES = 768 << 20
"""A shard is written when it has reached its size: with the chunk that filled it, it stays below 1 GiB."""

FLUSH_SECONDS = 60.0
"""A shard is also written when its first rows have waited so long: no more than that is lost when a run is killed."""

MAX_NAMED = 20
"""Bad texts that one error names."""

_EXTRA_TOKENS = 64  # of a chat template and the tokenizer, beside one token per byte of text

Store = Literal["auto", "float32", "bfloat16", "float16"]


def dump(
    model: str,
    texts: str | os.PathLike[str] | Texts | Pairs | Sequence[Pair],
    folder: str | os.PathLike[str],
    *,
    blocks: str | int | Iterable[int] = "all",
    position: str = "last",
    chat: bool = False,
    dtype: str = "auto",
    store: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    actors: int = 1,
    ray_address: str | None = None,
    gpus_per_actor: float | None = None,
    engine_args: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> DumpFolder:
    """Read the residual stream of texts and keep it in a folder; called again, go on where it stopped.

    Arguments as of `derive`, and:
        texts: JSONL file of pairs or texts (see `load_texts`), name of a packaged set, or either in memory.
        folder: where to; new, or of a run with the same settings that did not finish.
        position: also `"all"`, which keeps the row of every token.
        store: dtype of the rows: `"auto"` is the engine's.
        shard_bytes: size at which a shard is written.

    Raises:
        DerivationError: texts or settings are not usable (all texts that are too long or too short are named, before
            anything is read), or the folder is the dump of something else.
    """
    if store not in ("auto", *CODES):
        raise DerivationError(f"store {store!r} is none of auto, {', '.join(CODES)}.")
    if not 1 <= shard_bytes <= MAX_SHARD_BYTES:
        raise DerivationError(f"Shards of {shard_bytes} bytes; 1 to {MAX_SHARD_BYTES} are possible.")
    texts = as_texts(texts)
    config = ReaderConfig(
        model=model_for_actors(model, local=ray_address is None),
        blocks=as_blocks(blocks),
        position=Position(position),
        chat=chat,
        source=texts.source,
        engine_args=tuple({**engine_defaults(), "dtype": dtype, **(engine_args or {})}.items()),
    )
    with (
        Progress(enabled=progress) as shown,
        pool(config, actors=actors, ray_address=ray_address, gpus_per_actor=gpus_per_actor) as engines,
    ):
        with shown.waiting(f"starting {actors} engine{'s' if actors > 1 else ''} for {model}"):
            facts = engines.facts()
        there = DumpFolder.start(Path(folder), manifest_of(model_name(model), config, facts, texts, store))
        fill(there, engines, texts, shown, shard_bytes=shard_bytes)
    return there


def manifest_of(model: str, config: ReaderConfig, facts: EngineFacts, texts: Texts, store: str = "auto") -> Manifest:
    """What a dump of these texts on that engine is."""
    return Manifest.model_validate(
        {
            "model": model,
            "weights": facts.weights,
            "architecture": facts.architecture,
            "hidden_size": facts.hidden_size,
            "num_blocks": facts.num_blocks,
            "blocks": list(facts.blocks),
            "dtype": facts.dtype,
            "stored": facts.dtype if store == "auto" else store,
            "position": config.position.rule,
            "chat": config.chat,
            "dataset": texts.digest,
            "source": texts.source,
            "num_texts": len(texts),
            "paired": texts.paired,
            "versions": dict(facts.versions),
        }
    )


def fill(
    folder: DumpFolder,
    engines: Pool,
    texts: Texts,
    shown: Progress,
    *,
    shard_bytes: int = SHARD_BYTES,
    flush_seconds: float = FLUSH_SECONDS,
) -> None:
    """Read what the folder lacks, and write it."""
    with folder.writing():
        folder.clear_leftovers()
        done = _done(folder, texts)
        missing = [chunk for chunk in chunks(texts, folder.manifest) if chunk.start not in done]
        if not missing:
            return
        position = Position(folder.manifest.position)
        problems = engines.problems([texts[i] for chunk in missing for i in chunk], position)
        if problems:
            named = "\n".join(problems[:MAX_NAMED])
            more = f"\n... and {len(problems) - MAX_NAMED} more." if len(problems) > MAX_NAMED else ""
            raise DerivationError(f"{len(problems)} text(s) cannot be read:\n{named}{more}")
        readings = engines.rows([[texts[i] for i in chunk] for chunk in missing], position)
        with shown.counting("reading", total=len(texts), unit="texts") as advance:
            advance(len(done))
            for first, rows in _gathered(zip(missing, readings, strict=True), shard_bytes, flush_seconds, advance):
                folder.write(first, texts[first : first + len(rows)], rows)


def as_texts(texts: str | os.PathLike[str] | Texts | Pairs | Sequence[Pair]) -> Texts:
    if isinstance(texts, Texts):
        return texts
    if isinstance(texts, str | os.PathLike):
        return load_texts(texts)
    return from_pairs(texts if isinstance(texts, Pairs) else Pairs(tuple(texts)))


def chunks(texts: Sequence[Text], manifest: Manifest) -> list[range]:
    """Places of the texts that are read at once: whole pairs, by the data alone."""
    step = 2 if manifest.paired else 1
    row_bytes = len(manifest.blocks) * manifest.hidden_size * np.dtype(np.float32).itemsize
    every_token = Position(manifest.position).covers_first
    found: list[range] = []
    begin = size = 0
    for at in range(0, len(texts), step):
        unit = texts[at : at + step]
        tokens = sum(len((text.prompt + text.text).encode()) + _EXTRA_TOKENS for text in unit) if every_token else 0
        if at > begin and (at - begin + step > TEXTS_PER_CHUNK or size + tokens * row_bytes > CHUNK_BYTES):
            found.append(range(begin, at))
            begin, size = at, 0
        size += tokens * row_bytes
    return [*found, range(begin, len(texts))]


def _done(folder: DumpFolder, texts: Texts) -> set[int]:
    """Places of the texts that are there."""
    done = set()
    for shard in folder.shards():
        for place, entry in enumerate(shard.entries, start=shard.head.first):
            if texts[place].id != entry.id:
                raise DerivationError(
                    f"{shard.index}: text {place} is {entry.id[:64]!r} there and {texts[place].id[:64]!r} now; "
                    "the ids of the texts have changed. Choose another folder, or the file of the first run."
                )
            done.add(place)
    return done


def _gathered(
    readings: Iterable[tuple[range, list[TextRows]]],
    shard_bytes: int,
    flush_seconds: float,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, list[TextRows]]]:
    """Consecutive chunks, as many as make a shard, with the place of their first text."""
    first = num_bytes = 0
    rows: list[TextRows] = []
    began = time.monotonic()
    for chunk, read in readings:
        if rows and chunk.start != first + len(rows):
            yield first, rows
            rows = []
        if not rows:
            first, num_bytes, began = chunk.start, 0, time.monotonic()
        rows.extend(read)
        num_bytes += sum(text.rows_LPD.nbytes for text in read)
        advance(len(read))
        if num_bytes >= shard_bytes or time.monotonic() - began >= flush_seconds:
            yield first, rows
            rows = []
    if rows:
        yield first, rows
