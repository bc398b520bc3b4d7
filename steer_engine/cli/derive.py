"""Options that several commands of derivation share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import SUFFIXES

Model = Annotated[str, typer.Argument(help="Path, Hugging Face id, or a packaged model.", metavar="MODEL")]
Method = Annotated[str, typer.Option(help="diffmean, mean, mean_centred, pca, pca_centred, lat, logistic, lda.")]
Blocks = Annotated[str, typer.Option(help="Blocks to read, from 0: `all`, `8-22`, `14`.")]
Chat = Annotated[bool, typer.Option("--chat", help="Render the texts with the model's chat template.")]
DType = Annotated[str, typer.Option(help="The engine's dtype: auto, float32, bfloat16, float16.")]
Actors = Annotated[int, typer.Option(min=1, help="Engines that read side by side.")]
RayAddress = Annotated[
    str | None, typer.Option(help="Ray cluster to run on, such as `auto` or `ray://head:10001`; else a local Ray.")
]
GpusPerActor = Annotated[
    float | None, typer.Option(min=0, help="GPUs of one engine (default: 1 where Ray has enough).")
]
TensorParallelSize = Annotated[int, typer.Option(min=1, help="GPUs that one engine is split over.")]
MaxModelLen = Annotated[int | None, typer.Option(min=2, help="Longest text in tokens (default: what fits in memory).")]
Out = Annotated[Path, typer.Option(help="File to write: .safetensors, or .gguf for llama.cpp.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output file if there is one.")]


def engine_args(tensor_parallel_size: int, max_model_len: int | None) -> dict[str, Any]:
    """What the engine is told beside its defaults."""
    given = {"tensor_parallel_size": tensor_parallel_size}
    return given if max_model_len is None else given | {"max_model_len": max_model_len}


def say(line: str) -> None:
    """One line of result on standard error."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def require_writable(out: Path, *, force: bool) -> None:
    """Before minutes of reading rather than after them. Raises DerivationError."""
    if out.suffix not in SUFFIXES:
        raise DerivationError(f"{out}: the output's name must end in {' or '.join(SUFFIXES)}.")
    require_absent(out, force=force)


def require_absent(out: Path, *, force: bool) -> None:
    """Raise DerivationError where a file would be replaced unasked."""
    if out.exists() and not force:
        raise DerivationError(f"{out}: there is such a file already; choose another name, or --force to replace it.")


def summary(out: Path, vector: ControlVector) -> str:
    """Blocks, dose, separation and digest in one line."""
    norms, streams = vector.norms, vector.metadata.residual_norms
    doses = sorted(norms[block] / streams[block] for block in vector.blocks)
    return (
        f"{out}: {len(vector.blocks)} blocks, {doses[0]:.1%} to {doses[-1]:.1%} of the residual norm at scale 1, "
        f"{_separation(vector.metadata.separation)}{vector.digest}"
    )


def _separation(by_block: dict[int, float]) -> str:
    if not by_block:
        return ""
    best = max(by_block, key=lambda block: by_block[block])
    return f"held-out AUROC up to {by_block[best]:.3f} (block {best}), "


def derive_command(
    model: Model,
    pairs: Annotated[
        str,
        typer.Option(
            help="JSONL file with `positive` and `negative` per line, hf:DATASET?positive=COLUMN&negative=COLUMN, "
            "or `sentiment`."
        ),
    ],
    out: Out,
    method: Method = "diffmean",
    blocks: Blocks = "all",
    position: Annotated[
        str, typer.Option(help="Token rows that stand for a text: `last`, `mean`, or numbers such as `-1,-2`.")
    ] = "last",
    chat: Chat = False,
    dtype: DType = "auto",
    actors: Actors = 1,
    ray_address: RayAddress = None,
    gpus_per_actor: GpusPerActor = None,
    tensor_parallel_size: TensorParallelSize = 1,
    max_model_len: MaxModelLen = None,
    keep_dump: Annotated[
        Path | None,
        typer.Option(help="Folder to keep the activations in, as `dump` does (default: only sums are kept)."),
    ] = None,
    force: Force = False,
) -> None:
    """Derive a control vector from contrast pairs, on the engine that will serve it.

    Example: steer-engine derive smollm2-135m --pairs sentiment --blocks 8-19 --out cheerful.safetensors
    """
    from steer_engine.derive.derive import derive
    from steer_engine.derive.dump import dump
    from steer_engine.derive.fit_dump import fit_dump
    from steer_engine.derive.methods import require_method
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
        "engine_args": engine_args(tensor_parallel_size, max_model_len),
    }
    if keep_dump is None:
        vector = derive(model, pairs, method=method, **settings)
    else:
        dump(model, pairs, keep_dump, **settings)
        vector = fit_dump(keep_dump, method=method, ray_address=ray_address)
    save(vector, out)
    say(summary(out, vector))


_MIB = 1 << 20


def dump_command(
    model: Model,
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
    blocks: Blocks = "all",
    position: Annotated[
        str, typer.Option(help="Token rows to keep of a text: `last`, `mean`, `all`, or numbers such as `-1,-2`.")
    ] = "last",
    chat: Chat = False,
    dtype: DType = "auto",
    store: Annotated[str, typer.Option(help="dtype of the rows: auto (the engine's), float32, bfloat16, float16.")] = (
        "auto"
    ),
    shard_mib: Annotated[int, typer.Option(min=1, max=768, help="Size at which a shard is written.")] = 256,
    actors: Actors = 1,
    ray_address: RayAddress = None,
    gpus_per_actor: GpusPerActor = None,
    tensor_parallel_size: TensorParallelSize = 1,
    max_model_len: MaxModelLen = None,
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
        engine_args=engine_args(tensor_parallel_size, max_model_len),
    )
    shards = folder.require_complete()
    size = sum(shard.head.bytes for shard in shards)
    say(
        f"{out}: {folder.manifest.num_texts} texts at {len(folder.manifest.blocks)} blocks, {len(shards)} shard(s), "
        f"{size / _MIB:.1f} MiB"
    )


def fit_command(
    dump: Annotated[Path, typer.Argument(help="Folder that `steer-engine dump` wrote.", metavar="DUMP")],
    out: Out,
    method: Method = "diffmean",
    actors: Annotated[
        int | None, typer.Option(min=1, help="Processes that fit side by side (default: one per core).")
    ] = None,
    ray_address: RayAddress = None,
    force: Force = False,
) -> None:
    """Fit a control vector to an activation dump. No engine is started.

    Example: steer-engine fit sentiment.dump --method pca --out cheerful-pca.safetensors
    """
    from steer_engine.derive.fit_dump import fit_dump
    from steer_engine.vectors.files import save

    require_writable(out, force=force)
    vector = fit_dump(dump, method=method, actors=actors, ray_address=ray_address)
    save(vector, out)
    say(summary(out, vector))
