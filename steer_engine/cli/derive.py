"""`steer-engine derive`, `dump` and `fit`. Nothing heavy loads before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer_engine.cli.checks import check_capture
from steer_engine.cli.engine_options import CaptureOptions, Model, RayAddress, SiteOption, captures
from steer_engine.errors import DerivationError
from steer_engine.fields import parse_blocks

if TYPE_CHECKING:
    from steer_engine.vectors import ControlVector

Method = Annotated[str, typer.Option(help="diffmean, mean, mean_centred, pca, pca_centred, lat, logistic, lda.")]
Blocks = Annotated[str, typer.Option(help="Blocks to capture, from 0: `all`, `8-22`, `14`.")]
Out = Annotated[Path, typer.Option(help="File to write: .safetensors, or .gguf for llama.cpp.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")]

_MIB = 1 << 20


def say(line: str) -> None:
    """Print one line on standard error."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(line, markup=False, highlight=False)


def parsed_blocks(blocks: str) -> tuple[int, ...] | None:
    try:
        return parse_blocks(blocks)
    except ValueError as error:
        raise DerivationError(f"--blocks: {error}.") from None


def summary(out: Path, vector: ControlVector) -> str:
    """Number of blocks, range of doses, best held-out AUROC, and digest; and what a server needs for another site."""
    norms, streams = vector.norms, vector.metadata.residual_norms
    doses = sorted(norms[block] / streams[block] for block in vector.blocks)
    site = vector.metadata.site.value
    needs = "" if site == "block" else f"\nIt applies at site {site!r}: serve it with --steering-sites {site}"
    return (
        f"{out}: {len(vector.blocks)} blocks, {doses[0]:.1%} to {doses[-1]:.1%} of the residual norm at scale 1, "
        f"{_separation(vector.metadata.separation)}{vector.digest}{needs}"
    )


def _separation(by_block: dict[int, float]) -> str:
    if not by_block:
        return ""
    best = max(by_block, key=lambda block: by_block[block])
    return f"held-out AUROC up to {by_block[best]:.3f} (block {best}), "


@captures
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
    site: SiteOption = "block",
    position: Annotated[
        str, typer.Option(help="Token rows that represent a text: `last`, `mean`, or numbers such as `-1,-2`.")
    ] = "last",
    *,
    capture: CaptureOptions,
    keep_dump: Annotated[
        Path | None,
        typer.Option(help="Folder to store the activations in, as `dump` does (default: do not store them)."),
    ] = None,
    force: Force = False,
) -> None:
    """Derive a control vector from contrast pairs, on the engine that will serve it.

    Example: steer-engine derive smollm2-135m --pairs sentiment --blocks 8-19 --out cheerful.safetensors
    """
    from steer_engine.derive.derivation import derive, require_writable
    from steer_engine.derive.dump_fitter import fit_dump
    from steer_engine.derive.dump_writer import dump
    from steer_engine.derive.methods import require_method
    from steer_engine.derive.texts import load_pairs
    from steer_engine.vectors.files import save

    remedy = "Leave it out, for example with --blocks 1-29 for a model of 30 blocks"
    require_writable(out, force=force, blocks=parsed_blocks(blocks), site=site, remedy=remedy)
    require_method(method)
    loaded = load_pairs(pairs)
    check_capture(model, blocks, ray_address=capture.ray_address)
    settings: dict[str, Any] = {"blocks": blocks, "site": site, "position": position, **capture.arguments}
    if keep_dump is None:
        vector = derive(model, loaded, method=method, **settings)
    else:
        dump(model, loaded, keep_dump, **settings)
        vector = fit_dump(keep_dump, method=method, ray_address=capture.ray_address)
    save(vector, out)
    say(summary(out, vector))


@captures
def dump_command(
    model: Model,
    texts: Annotated[
        str,
        typer.Option(
            "--texts",
            "--pairs",
            help="JSONL file with `positive` and `negative` per line, or with `text` and optionally `label`, `pair`; "
            "or hf:DATASET?column=..., or `sentiment`.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write. An unfinished run with the same settings is resumed.")],
    blocks: Blocks = "all",
    site: SiteOption = "block",
    position: Annotated[
        str, typer.Option(help="Token rows to keep of a text: `last`, `mean`, `all`, or numbers such as `-1,-2`.")
    ] = "last",
    store: Annotated[str, typer.Option(help="dtype of the rows: auto (the engine's), float32, bfloat16, float16.")] = (
        "auto"
    ),
    shard_mib: Annotated[int, typer.Option(min=1, max=768, help="Size at which a shard is written.")] = 256,
    *,
    capture: CaptureOptions,
) -> None:
    """Store the residual stream of texts in a folder. After a crash, the same command resumes.

    Example: steer-engine dump smollm2-135m --pairs sentiment --blocks 8-19 --out sentiment.dump
    """
    from steer_engine.derive.capture_config import site_named
    from steer_engine.derive.dump_writer import dump
    from steer_engine.derive.texts import load_texts

    loaded = load_texts(texts)
    check_capture(model, blocks, ray_address=capture.ray_address)
    for sentence in loaded.duplicates():
        say(f"warning: {sentence}")
    folder = dump(
        model,
        loaded,
        out,
        blocks=blocks,
        site=site_named(site),
        position=position,
        store=store,
        shard_bytes=shard_mib * _MIB,
        **capture.arguments,
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
        int | None, typer.Option(min=1, help="Number of processes that run in parallel (default: one per core).")
    ] = None,
    ray_address: RayAddress = None,
    force: Force = False,
) -> None:
    """Fit a control vector to an activation dump. No engine is started.

    Example: steer-engine fit sentiment.dump --method pca --out cheerful-pca.safetensors
    """
    from steer_engine.derive.derivation import require_writable
    from steer_engine.derive.dump_fitter import fit_dump
    from steer_engine.derive.dump_folder import DumpFolder
    from steer_engine.vectors.files import save

    remedy = "Make a dump of the blocks from 1 (dump --blocks)"
    manifest = DumpFolder.open(dump).manifest
    require_writable(out, force=force, blocks=tuple(manifest.blocks), site=manifest.site, remedy=remedy)
    vector = fit_dump(dump, method=method, actors=actors, ray_address=ray_address)
    save(vector, out)
    say(summary(out, vector))
