"""`steer-engine dump`: the residual stream of texts, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_engine.derive import options
from steer_engine.derive.options import say

_MIB = 1 << 20


def dump_command(
    model: options.Model,
    texts: Annotated[
        str,
        typer.Option(
            "--texts",
            "--pairs",
            help="JSONL file with `positive` and `negative` per line, or with `text` and perhaps `label`, `pair`; "
            "or hf:DATASET?column=..., or `sentiment`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; of an unfinished run with the same settings: to finish.")],
    blocks: options.Blocks = "all",
    position: Annotated[
        str, typer.Option(help="Token rows to keep of a text: `last`, `mean`, `all`, or numbers such as `-1,-2`.")
    ] = "last",
    chat: options.Chat = False,
    dtype: options.DType = "auto",
    store: Annotated[str, typer.Option(help="dtype of the rows: auto (the engine's), float32, bfloat16, float16.")] = (
        "auto"
    ),
    shard_mib: Annotated[int, typer.Option(min=1, max=768, help="Size at which a shard is written.")] = 256,
    actors: options.Actors = 1,
    ray_address: options.RayAddress = None,
    gpus_per_actor: options.GpusPerActor = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    max_model_len: options.MaxModelLen = None,
) -> None:
    """Keep the residual stream of texts in a folder. Run again after a crash, it goes on where it stopped.

    Example: steer-engine dump smollm2-135m --pairs sentiment --blocks 8-19 --out sentiment.dump
    """
    from steer_engine.derive.dump import dump
    from steer_engine.derive.texts import load_texts

    loaded = load_texts(texts)
    for sentence in loaded.duplicates():
        say(f"warning: {sentence}")
    folder = dump(
        model,
        loaded,
        out,
        blocks=blocks,
        position=position,
        chat=chat,
        dtype=dtype,
        store=store,
        shard_bytes=shard_mib * _MIB,
        actors=actors,
        ray_address=ray_address,
        gpus_per_actor=gpus_per_actor,
        engine_args=options.engine_args(tensor_parallel_size, max_model_len),
    )
    shards = folder.require_complete()
    size = sum(shard.head.bytes for shard in shards)
    say(
        f"{out}: {folder.manifest.num_texts} texts at {len(folder.manifest.blocks)} blocks, {len(shards)} shard(s), "
        f"{size / _MIB:.1f} MiB"
    )
