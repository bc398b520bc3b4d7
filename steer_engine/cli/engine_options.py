"""Command-line options of the engine that a command starts, shared by the commands that start one.

Each name is a type for one parameter of a typer command; its default stands in the command:

    def command(model: Model, chat: Chat = False) -> None: ...

Commands that start one engine have all options of `EngineChoice` as one parameter, `engine` (`@starts_engine`), and
those that capture texts all of `CaptureOptions`:

    @captures
    def command(model: Model, *, capture: CaptureOptions) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steer_engine.derive.capture_config import EngineOptions


def _require_room(max_model_len: int | None) -> int | None:
    if max_model_len in (0, 1):
        raise typer.BadParameter(f"{max_model_len} is too short; give at least 2 tokens, or -1.")
    return max_model_len


Model = Annotated[str, typer.Argument(help="Path, Hugging Face id, or a packaged model.", metavar="MODEL")]
ModelOption = Annotated[str, typer.Option("--model", help="Path, Hugging Face id, or a packaged model.")]
SiteOption = Annotated[
    str,
    typer.Option(
        "--site", help="What to capture in each block: block (the stream after it), attn or mlp (their output)."
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to the texts.")]

DType = Annotated[str, typer.Option(help="The engine's dtype: auto, float32, bfloat16, float16.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        min=-1,
        callback=_require_room,
        help="Longest sequence in tokens; -1: what fits in memory (default: -1; for evaluation: the model's limit).",
    ),
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=1.0,
        help="Share of the device's memory that the engine may use; of RAM on a CPU (default: vLLM's).",
    ),
]
TensorParallelSize = Annotated[int, typer.Option(min=1, help="GPUs that one engine is split over.")]

Actors = Annotated[int, typer.Option(min=1, help="Number of engines that run in parallel.")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster to run on, such as `auto` or `ray://head:10001` (default: start a local Ray)."),
]
GpusPerActor = Annotated[
    float | None, typer.Option(min=0, help="GPUs of one engine (default: 1 if Ray has enough, else 0).")
]


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """Options of the commands that start one engine, in the order of their help."""

    dtype: DType = "auto"
    max_model_len: MaxModelLen = None
    gpu_memory_utilization: GpuMemoryUtilization = None
    tensor_parallel_size: TensorParallelSize = 1

    @property
    def engine_args(self) -> dict[str, Any]:
        """Keyword arguments of `steer_engine.LLM`. An option that was not given is left out."""
        given: dict[str, Any] = {"dtype": self.dtype, "tensor_parallel_size": self.tensor_parallel_size}
        optional = {"max_model_len": self.max_model_len, "gpu_memory_utilization": self.gpu_memory_utilization}
        return given | {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(EngineChoice):
    """Options of the commands whose engines capture texts."""

    chat: Chat = False
    actors: Actors = 1
    ray_address: RayAddress = None
    gpus_per_actor: GpusPerActor = None

    @property
    def arguments(self) -> EngineOptions:
        """Keyword arguments of the functions of `steer_engine.derive` that start engines."""
        return {
            "chat": self.chat,
            "dtype": self.dtype,
            "actors": self.actors,
            "ray_address": self.ray_address,
            "gpus_per_actor": self.gpus_per_actor,
            "engine_args": self.engine_args,
        }


def starts_engine(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command: its parameter `engine` becomes one option per field of `EngineChoice`."""
    return _with_options(command, "engine", EngineChoice)


def captures(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of a command: its parameter `capture` becomes one option per field of `CaptureOptions`."""
    return _with_options(command, "capture", CaptureOptions)


def _with_options(command: Callable[..., None], parameter: str, kind: type[EngineChoice]) -> Callable[..., None]:
    """The command with one option per field of `kind`, which it gets as one argument.

    Typer reads options from a signature, so that of the result lists the fields in the parameter's place.
    """
    signature = inspect.signature(command, eval_str=True)
    options = inspect.signature(kind, eval_str=True).parameters.values()
    listed = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in signature.parameters.values()
        for option in (options if each.name == parameter else [each])
    ]
    names = [field.name for field in fields(kind)]

    @wraps(command)
    def run(**given: Any) -> None:
        chosen = kind(**{name: given.pop(name) for name in names})
        command(**given, **{parameter: chosen})

    run.__signature__ = signature.replace(parameters=listed)  # type: ignore[attr-defined]
    return run
