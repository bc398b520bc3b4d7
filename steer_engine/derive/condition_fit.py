"""`condition fit`: a vector and prompts of two classes in, a condition for steering out.

Engines capture the residual stream of the prompts and reduce it to one number per prompt and block; rows are not kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, get_args

import numpy as np

from steer_engine.derive.actors import Capturing, start_capturing
from steer_engine.derive.capture_config import EngineOptions, model_name
from steer_engine.derive.condition import MIN_PROMPTS, ConditionFit, Readout, choose, require_enough
from steer_engine.derive.make_pairs import read_words
from steer_engine.derive.moments import Array
from steer_engine.derive.texts import Text, load_texts
from steer_engine.errors import DerivationError
from steer_engine.fields import block_ranges, parse_blocks
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import At, Measure

if TYPE_CHECKING:
    from steer_engine.llm import LLM

PromptSource = str | os.PathLike[str] | Iterable[str]
"""A file as `load_prompts` reads it, or prompts."""

MEASURES: tuple[Measure, ...] = get_args(Measure)
POSITIONS: tuple[At, ...] = get_args(At)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The different prompts of one class in the order of their file. repeated: prompts that were left out."""

    items: tuple[Text, ...]
    label: str
    source: str
    repeated: int = 0


def load_prompts(given: PromptSource, label: str, *, least: int = MIN_PROMPTS, what: str = "condition") -> Prompts:
    """Load the prompts of a class: a `.txt` file with one per line, what `load_texts` reads, or prompts in memory.

    label: `positive` or `negative`. Texts that have the other label, or are the other side of a pair, are left out.
    least: how many are needed; what: what needs them.

    Raises:
        DerivationError: the file cannot be read, a prompt is no text or empty, or the class has too few prompts.
    """
    source = str(given) if isinstance(given, str | os.PathLike) else f"{label} prompts"
    if not isinstance(given, str | os.PathLike):
        texts = list(_in_memory(given, source))
    elif Path(source).suffix == ".txt":
        texts = [Text(id=str(line), text=text, line=line) for line, text in read_words(Path(source), "prompt")]
    else:
        loaded = load_texts(source)
        source = loaded.source
        texts = [text for text in loaded if text.label in ("", label)]
    unique: dict[tuple[str, str], Text] = {}
    for text in texts:
        unique.setdefault((text.prompt, text.text), text)
    require_enough(len(unique), label, source, least=least, what=what)
    return Prompts(items=tuple(unique.values()), label=label, source=source, repeated=len(texts) - len(unique))


def _in_memory(prompts: Iterable[str], source: str) -> Iterator[Text]:
    for number, text in enumerate(prompts, start=1):
        if not isinstance(text, str) or not text.strip():
            raise DerivationError(f"{source}:{number}: a prompt is text that is not empty, and this is {text!r:.64}.")
        yield Text(id=str(number), text=text, line=number)


def require_disjoint(positive: Prompts, negative: Prompts) -> None:
    """Raise DerivationError if a prompt is in both classes; names the lines of the first one."""
    lines = {(text.prompt, text.text): text.line for text in positive.items}
    both = [text for text in negative.items if (text.prompt, text.text) in lines]
    if both:
        first = lines[(both[0].prompt, both[0].text)]
        raise DerivationError(
            f"{len(both)} prompt(s) are in both classes, the first in {positive.source}:{first} and "
            f"{negative.source}:{both[0].line}. Remove them from one file; no threshold can tell them apart."
        )


def candidate_blocks(vector: ControlVector, blocks: str | int | Iterable[int]) -> tuple[int, ...]:
    """The blocks of a vector, or those of them that are requested.

    Raises:
        DerivationError: the vector has no direction at a requested block.
    """
    try:
        numbers = parse_blocks(blocks if isinstance(blocks, str | int) else list(blocks))
    except ValueError as error:
        raise DerivationError(f"--blocks: {error}.") from None
    if numbers is None:
        return vector.blocks
    if lacking := sorted(set(numbers) - set(vector.blocks)):
        raise DerivationError(
            f"--blocks: the vector has no direction at block(s) {block_ranges(lacking)}; "
            f"it has {block_ranges(vector.blocks)}."
        )
    return numbers


def fit_condition(
    model: str | LLM,
    vector: ControlVector,
    positive: PromptSource,
    negative: PromptSource,
    *,
    at: At = "last_prompt_token",
    measure: Measure = "cosine",
    blocks: str | int | Iterable[int] = "all",
    num_blocks: int = 1,
    held_out: float = 0.3,
    seed: int = 0,
    **engine: Unpack[EngineOptions],
) -> ConditionFit:
    """Find the blocks and the threshold at which a vector tells prompts that need steering from those that do not.

    Args, `EngineOptions` (see `derive`), and:
        vector: its directions are compared with the residual stream of the prompts, or with the outputs at its site.
        positive: prompts for which the condition shall hold, as `load_prompts` reads them.
        negative: prompts for which it shall not hold.
        at: `"last_prompt_token"`, `"mean_prompt"` or `"max_prompt"`. measure: `"cosine"` or `"dot"`.
        blocks: candidates, `"all"` for those of the vector. num_blocks: how many of them to combine.
        held_out: share of each class that the result is measured on; seed: of that split.

    Raises:
        DerivationError: prompts or settings are unusable, or no block separates the prompts.
        ModelMismatchError: the vector does not fit the model.
        UnsupportedEngineError: the model cannot be armed.
    """
    for name, value, valid in (("measure", measure, MEASURES), ("at", at, POSITIONS)):
        if value not in valid:
            raise DerivationError(f"--{name} {str(value)[:64]!r} is none of {', '.join(valid)}.")
    candidates = candidate_blocks(vector, blocks)
    if not 1 <= num_blocks <= len(candidates):
        raise DerivationError(f"--num-blocks {num_blocks}: choose 1 to {len(candidates)}, the number of candidates.")
    classes = [load_prompts(positive, "positive"), load_prompts(negative, "negative")]
    require_disjoint(*classes)
    readout = Readout(
        directions_LD=np.stack([vector.directions[block] for block in candidates]), measure=measure, at=at
    )
    with start_capturing(
        model,
        source="prompts",
        position="last",
        blocks=candidates,
        site=vector.metadata.site,
        **engine,
    ) as run:
        vector.check(hidden_size=run.facts.hidden_size, num_blocks=run.facts.num_blocks)
        positive_NL, negative_NL = (_values(run, prompts, readout) for prompts in classes)
    fit = choose(
        positive_NL,
        negative_NL,
        candidates,
        measure=measure,
        at=at,
        num_blocks=num_blocks,
        held_out=held_out,
        seed=seed,
    )
    notes = repeated(classes)
    made_for, name = vector.metadata.model, model_name(run.config.model)
    if made_for and made_for != name:
        notes.append(f"the vector was derived on {made_for[:64]!r}, and {name!r} is another name.")
    return replace(fit, chat=run.config.chat, notes=tuple(notes))


def repeated(classes: Iterable[Prompts]) -> list[str]:
    """A note per class with prompts that occur twice."""
    return [f"{each.source}: {each.repeated} repeated prompt(s) are left out." for each in classes if each.repeated]


def _values(run: Capturing, prompts: Prompts, readout: Readout) -> Array:
    """Values of the prompts of a class, `[N, L]`."""
    parts = []
    with run.shown.counting("capturing", total=len(prompts.items), unit=f"{prompts.label} prompts") as advance:
        for part_NL in run.engines.condition_values(prompts.items, readout, prompts.source):
            parts.append(part_NL)
            advance(len(part_NL))
    return np.concatenate(parts)
