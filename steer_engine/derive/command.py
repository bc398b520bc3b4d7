"""`steer-engine derive`: a control vector from contrast pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steer_engine.derive import options
from steer_engine.derive.options import say


def derive_command(
    model: options.Model,
    pairs: Annotated[
        str,
        typer.Option(
            help="JSONL file with `positive` and `negative` per line, hf:DATASET?positive=COLUMN&negative=COLUMN, "
            "or `sentiment`."
        ),
    ],
    out: options.Out,
    method: options.Method = "diffmean",
    blocks: options.Blocks = "all",
    position: Annotated[
        str, typer.Option(help="Token rows that stand for a text: `last`, `mean`, or numbers such as `-1,-2`.")
    ] = "last",
    chat: options.Chat = False,
    dtype: options.DType = "auto",
    actors: options.Actors = 1,
    ray_address: options.RayAddress = None,
    gpus_per_actor: options.GpusPerActor = None,
    tensor_parallel_size: options.TensorParallelSize = 1,
    max_model_len: options.MaxModelLen = None,
    keep_dump: Annotated[
        Path | None,
        typer.Option(help="Folder to keep the activations in, as `dump` does (default: only sums are kept)."),
    ] = None,
    force: options.Force = False,
) -> None:
    """Derive a control vector from contrast pairs, on the engine that will serve it.

    Example: steer-engine derive smollm2-135m --pairs sentiment --blocks 8-19 --out cheerful.safetensors
    """
    from steer_engine.derive.derive import derive
    from steer_engine.derive.dump import dump
    from steer_engine.derive.fit_dump import fit_dump
    from steer_engine.derive.methods import require_method
    from steer_engine.derive.output import require_writable, summary
    from steer_engine.vectors.files import save

    require_writable(out, force=force)
    require_method(method)
    settings: dict[str, Any] = {
        "blocks": blocks,
        "position": position,
        "chat": chat,
        "dtype": dtype,
        "actors": actors,
        "ray_address": ray_address,
        "gpus_per_actor": gpus_per_actor,
        "engine_args": options.engine_args(tensor_parallel_size, max_model_len),
    }
    if keep_dump is None:
        vector = derive(model, pairs, method=method, **settings)
    else:
        dump(model, pairs, keep_dump, **settings)
        vector = fit_dump(keep_dump, method=method, ray_address=ray_address)
    save(vector, out)
    say(summary(out, vector))
