"""Options that several commands of derivation share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
