"""`steer-engine derive`: a control vector from contrast pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_engine.vectors.files import SUFFIXES


def derive_command(
    model: Annotated[str, typer.Argument(help="Path, Hugging Face id, or a packaged model.", metavar="MODEL")],
    pairs: Annotated[str, typer.Option(help="JSONL file with `positive` and `negative` per line, or `sentiment`.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, or .gguf for llama.cpp.")],
    method: Annotated[str, typer.Option(help="diffmean, mean, mean_centred, pca, pca_centred, lat, logistic, lda.")] = (
        "diffmean"
    ),
    blocks: Annotated[str, typer.Option(help="Blocks to read, from 0: `all`, `8-22`, `14`.")] = "all",
    position: Annotated[
        str, typer.Option(help="Token rows that stand for a text: `last`, `mean`, or numbers such as `-1,-2`.")
    ] = "last",
    chat: Annotated[bool, typer.Option("--chat", help="Render the texts with the model's chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="The engine's dtype: auto, float32, bfloat16, float16.")] = "auto",
    actors: Annotated[int, typer.Option(min=1, help="Engines that read side by side.")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to run on, such as `auto` or `ray://head:10001`; else a local Ray.")
    ] = None,
    gpus_per_actor: Annotated[
        float | None, typer.Option(min=0, help="GPUs of one engine (default: 1 where Ray has enough).")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that one engine is split over.")] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest text in tokens (default: what fits in memory).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if there is one.")] = False,
) -> None:
    """Derive a control vector from contrast pairs, on the engine that will serve it.

    Example: steer-engine derive smollm2-135m --pairs sentiment --blocks 8-19 --out cheerful.safetensors
    """
    from rich.console import Console

    from steer_engine.derive.derive import derive
    from steer_engine.errors import DerivationError
    from steer_engine.vectors.files import save

    # Before minutes of reading rather than after them.
    if out.suffix not in SUFFIXES:
        raise DerivationError(f"{out}: the output's name must end in {' or '.join(SUFFIXES)}.")
    if out.exists() and not force:
        raise DerivationError(f"{out}: there is such a file already; choose another name, or --force to replace it.")
    engine_args = {"tensor_parallel_size": tensor_parallel_size}
    if max_model_len is not None:
        engine_args["max_model_len"] = max_model_len
    vector = derive(
        model,
        pairs,
        method=method,
        blocks=blocks,
        position=position,
        chat=chat,
        dtype=dtype,
        actors=actors,
        ray_address=ray_address,
        gpus_per_actor=gpus_per_actor,
        engine_args=engine_args,
    )
    save(vector, out)
    norms, streams = vector.norms, vector.metadata.residual_norms
    doses = sorted(norms[block] / streams[block] for block in vector.blocks)
    Console(stderr=True, soft_wrap=True).print(
        f"{out}: {len(vector.blocks)} blocks, {doses[0]:.1%} to {doses[-1]:.1%} of the residual norm at scale 1, "
        f"{_separation(vector.metadata.separation)}{vector.digest}",
        markup=False,
        highlight=False,
    )


def _separation(by_block: dict[int, float]) -> str:
    if not by_block:
        return ""
    best = max(by_block, key=lambda block: by_block[block])
    return f"held-out AUROC up to {by_block[best]:.3f} (block {best}), "
