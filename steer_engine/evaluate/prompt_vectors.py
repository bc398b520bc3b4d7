"""Vectors from prompts: which two prompts each recipe contrasts, and the mean difference at their last token.

A recipe makes pairs of prompts in token ids. Both are captured at their last token, where the model decides its answer.
The vector is applied at the same place (scope `last_prompt_token`).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from steer_engine.derive.fit import CapturedRows
from steer_engine.derive.moments import Chunk, Sample, summarise
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.encode import Encoder, Question
from steer_engine.evaluate.items import SEPARATOR, Item
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import VectorMetadata

if TYPE_CHECKING:
    from steer_engine.llm import LLM

Side = list[Sample]
"""The captured residual stream of the positives, or of the negatives."""

IdPair = tuple[list[int], list[int]]
"""Token ids of a positive and of a negative text."""

Kind = Literal["shots", "labels", "format", "instruction", "correct", "bias", "answer"]

ABOUT: dict[Kind, str] = {
    "shots": "N solved examples before the prompt, minus the prompt alone: an in-context task vector",
    "labels": "N solved examples, minus the same examples with random answers of their own items",
    "format": "N examples with random answers, minus the prompt alone: the form of an answer without its rule",
    "instruction": "an instruction before the prompt, minus the prompt alone",
    "correct": "prompts that the model answers correctly, minus prompts that it answers incorrectly",
    "bias": "prompts where the model chooses another answer than its favourite class, minus prompts with the favourite",
    "answer": "the prompt with its right answer, minus the prompt with a wrong answer",
}
"""Recipe -> what it contrasts."""

KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_SETS = 4
"""Different sets of solved examples. Prompts of one set share their prefix in the KV cache."""

INSTRUCTION = "Read the text carefully. Answer the question with one word from the text.\n\n"

_FILE_NAME_LETTERS = frozenset(string.ascii_letters + string.digits + "._-")

PAIRS_PER_BATCH = 64
"""Contrast pairs captured per call of the engine."""


def shots_of(items: Sequence[Item], random: Random | None = None) -> str:
    """Solved examples, as they stand before a prompt. random: give each a random answer of its own item instead."""
    return "".join(item.prompt + (random.choice(item.answers) if random else item.target) + SEPARATOR for item in items)


def split_pool(items: Sequence[Item], shots: int) -> tuple[list[Sequence[Item]], Sequence[Item]]:
    """Divide the derive items into sets of `shots` solved examples, and the queries that follow them.

    At most half of the items become examples, and at most `MAX_SETS` sets are made.

    Raises:
        EvaluationError: there are too few items.
    """
    sets = min(MAX_SETS, len(items) // (2 * shots))
    if sets < 1:
        raise EvaluationError(
            f"{len(items)} derive items are too few for {shots} examples per prompt; at least {2 * shots} are needed "
            "(--derive-items, --shots)."
        )
    return [items[number * shots : (number + 1) * shots] for number in range(sets)], items[sets * shots :]


def prompt_pairs(
    kind: Kind,
    items: Sequence[Item],
    encoder: Encoder,
    *,
    shots: int,
    chosen: Mapping[str, int],
    gold: Mapping[str, int],
    instruction: str = INSTRUCTION,
    seed: int = 0,
) -> list[IdPair]:
    """The pairs of prompts of a recipe, from the derive items.

    chosen, gold: id of an item -> class that the model chose without steering, and class of the right answer.

    Raises:
        EvaluationError: there are too few items, or the model's own answers do not differ.
    """
    if kind == "answer":
        random = Random(f"answer {seed}")
        return [
            (encoder.ids(item.prompt, item.target), encoder.ids(item.prompt, random.choice(item.wrong)))
            for item in items
        ]
    if kind in ("correct", "bias"):
        return _own_answers(kind, items, encoder, chosen, gold)
    if kind == "instruction":
        return [(_ids(encoder, item, instruction), _ids(encoder, item)) for item in items]
    examples, queries = split_pool(items, shots)
    solved = [shots_of(each) for each in examples]
    shuffled = [shots_of(each, Random(f"labels {seed} {number}")) for number, each in enumerate(examples)]
    positive = shuffled if kind == "format" else solved
    negative = shuffled if kind == "labels" else [""] * len(examples)
    # All prompts of one set of examples are adjacent, so that their prefix is computed once.
    return [
        (_ids(encoder, item, positive[number]), _ids(encoder, item, negative[number]))
        for number in range(len(examples))
        for item in queries[number :: len(examples)]
    ]


def _ids(encoder: Encoder, item: Item, before: str = "") -> list[int]:
    """Token ids of a prompt up to the token that decides the answer. before: text in front of the prompt."""
    return list(encoder.question(item.after(before)).prompt_ids)


def _own_answers(
    kind: Kind, items: Sequence[Item], encoder: Encoder, chosen: Mapping[str, int], gold: Mapping[str, int]
) -> list[IdPair]:
    choices = [chosen[item.id] for item in items]
    favourite = max(set(choices), key=choices.count)
    one: list[Item] = []
    other: list[Item] = []
    for item in items:
        positive = chosen[item.id] == gold[item.id] if kind == "correct" else chosen[item.id] != favourite
        (one if positive else other).append(item)
    if min(len(one), len(other)) < 2:
        what = "answers correctly" if kind == "correct" else "answers otherwise than with its favourite"
        raise EvaluationError(
            f"The model {what} in {len(one)} of {len(items)} derive items; the recipe {kind!r} needs at least 2 of "
            "each kind. Leave it out (--recipe), or give more --derive-items."
        )
    return [(_ids(encoder, a), _ids(encoder, b)) for a, b in zip(one, other, strict=False)]


def with_shuffled_sides(sides: tuple[Side, Side], *, seed: int = 0) -> tuple[Side, Side]:
    """The same captured pairs, with positive and negative swapped in a random half of them."""
    positive, negative = list(sides[0]), list(sides[1])
    for i in Random(f"shuffled labels {seed}").sample(range(len(positive)), len(positive) // 2):
        positive[i], negative[i] = negative[i], positive[i]
    return positive, negative


def capture_sides(
    llm: LLM, pairs: Sequence[IdPair], advance: Callable[[int], None] = lambda steps: None
) -> tuple[Side, Side]:
    """Capture the residual stream at the last token of every positive and every negative, at all blocks."""
    positive: Side = []
    negative: Side = []
    for start in range(0, len(pairs), PAIRS_PER_BATCH):
        batch = pairs[start : start + PAIRS_PER_BATCH]
        texts = [ids for pair in batch for ids in pair]
        samples = [summarise(rows_LTD, skip_first=False) for rows_LTD in llm.capture(texts, "last")]
        positive += samples[::2]
        negative += samples[1::2]
        advance(len(batch))
    return positive, negative


def vector_of(llm: LLM, sides: tuple[Side, Side], method: str, *, model: str, notes: str) -> ControlVector:
    """Fit a vector to the captured sides, at all blocks of the model.

    Raises:
        DerivationError: the sides do not differ.
    """
    rows = CapturedRows()
    rows.add(Chunk.of(*sides, keep_rows=True))
    metadata = VectorMetadata(
        model=model,
        hidden_size=llm.hidden_size,
        num_blocks=llm.num_blocks,
        method=method,
        position="last",
        notes=notes,
    )
    return rows.fit(method, llm.capture_blocks, metadata)


def digest_name(vector: ControlVector) -> str:
    """A name that no other vector has. Conditions use the digest, which is available while a name has its vector."""
    return vector.digest.replace(":", "-")


def safe_name(name: str) -> str:
    """The name with every letter replaced that a registry or file name does not allow."""
    return "".join(letter if letter in _FILE_NAME_LETTERS else "-" for letter in name)[:120]


def mean_tokens(questions: Sequence[Question]) -> float:
    """Mean length of the prompts in tokens."""
    return float(np.mean([len(question.prompt_ids) for question in questions]))
