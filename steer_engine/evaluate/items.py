"""One question of a task, and the three disjoint sets of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from steer_engine.errors import EvaluationError

Kind = Literal["choice", "exact"]

SPLITS = ("derive", "validation", "test")

SEPARATOR = "\n\n"
"""Between the examples of a few-shot prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A prompt and what may follow it.

    answers: texts that continue the prompt, each with its leading space. One alone asks for an exact match of what the
        model generates; more are alternatives of a choice. correct: which of them is right.
    where: file and line, or name and number, for messages.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    correct: int = 0
    where: str = ""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise EvaluationError(f"{self.where or self.id}: the prompt is empty.")
        if not self.answers or any(not answer.strip() for answer in self.answers):
            raise EvaluationError(f"{self.where or self.id}: an answer is missing or empty.")
        if len(set(self.answers)) < len(self.answers):
            raise EvaluationError(f"{self.where or self.id}: an answer is there twice: {list(self.answers)}.")
        if not 0 <= self.correct < len(self.answers):
            raise EvaluationError(
                f"{self.where or self.id}: 'correct' is {self.correct}; with {len(self.answers)} answers valid are 0 "
                f"to {len(self.answers) - 1}."
            )

    @property
    def target(self) -> str:
        return self.answers[self.correct]

    @property
    def wrong(self) -> tuple[str, ...]:
        return tuple(answer for i, answer in enumerate(self.answers) if i != self.correct)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Items of each split."""

    derive: int = 200
    validation: int = 200
    test: int = 1000

    def __post_init__(self) -> None:
        for name in SPLITS:
            if getattr(self, name) < 2:
                raise EvaluationError(f"{name}: {getattr(self, name)} item(s); at least 2 are needed.")

    @property
    def total(self) -> int:
        return self.derive + self.validation + self.test


@dataclass(frozen=True, kw_only=True)
class Task:
    """Items to derive a vector from, to choose block and strength on, and to report on. No item is in two of them."""

    name: str
    derive: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    about: str = ""

    def __post_init__(self) -> None:
        kinds = {len(item.answers) > 1 for item in self.items}
        if len(kinds) > 1:
            raise EvaluationError(f"Task {self.name}: some items have one answer and some several; use one kind.")
        seen: dict[tuple[str, tuple[str, ...]], Item] = {}
        for item in self.items:
            if (other := seen.setdefault((item.prompt, item.answers), item)) is not item:
                raise EvaluationError(
                    f"Task {self.name}: {item.where or item.id} repeats {other.where or other.id}; "
                    "an item that is there twice would count twice, or leak between splits."
                )
        if self.kind == "choice" and len({item.target for item in self.items}) == 1:
            raise EvaluationError(
                f"Task {self.name}: the right answer is {self.items[0].target!r} in every item; a constant would score "
                "100 %. Give items with different right answers."
            )

    @property
    def kind(self) -> Kind:
        return "choice" if len(self.items[0].answers) > 1 else "exact"

    @property
    def items(self) -> tuple[Item, ...]:
        return (*self.derive, *self.validation, *self.test)

    @cached_property
    def digest(self) -> str:
        """`"sha256:..."` over all items in their order."""
        sha = hashlib.sha256(b"steer-engine task v1\n")
        for name in SPLITS:
            for item in getattr(self, name):
                line = json.dumps([name, item.prompt, item.answers, item.correct], separators=(",", ":"))
                sha.update(line.encode() + b"\n")
        return f"sha256:{sha.hexdigest()}"

    def with_shots(self, count: int) -> Task:
        """The same task, each prompt after `count` solved examples of the derive split, which then are left out there.

        Raises:
            EvaluationError: the derive split is too small.
        """
        if count == 0:
            return self
        if count > len(self.derive) - 2:
            raise EvaluationError(f"{count} examples per prompt leave too little of {len(self.derive)} derive items.")
        examples = "".join(item.prompt + item.target + SEPARATOR for item in self.derive[:count])
        return Task(
            name=f"{self.name}, {count} shots",
            derive=_prefixed(self.derive[count:], examples),
            validation=_prefixed(self.validation, examples),
            test=_prefixed(self.test, examples),
            about=self.about,
        )


def _prefixed(items: Sequence[Item], examples: str) -> tuple[Item, ...]:
    return tuple(
        Item(id=item.id, prompt=examples + item.prompt, answers=item.answers, correct=item.correct, where=item.where)
        for item in items
    )
