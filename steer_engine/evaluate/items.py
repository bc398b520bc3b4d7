"""Items and tasks: a task has three disjoint splits of items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from steer_engine.errors import EvaluationError

Kind = Literal["choice", "exact"]

SPLITS = ("derive", "validation", "test")

SEPARATOR = "\n\n"
"""Text between the examples of a few-shot prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A prompt and its possible answers.

    answers: texts that continue the prompt, each with its leading space. With one answer, the generated text must
        match it exactly; with several, the model chooses between them.
    correct: index of the right answer.
    where: file and line, or task name and number, for error messages.
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
            raise EvaluationError(f"{self.where or self.id}: an answer appears twice: {list(self.answers)}.")
        if not 0 <= self.correct < len(self.answers):
            raise EvaluationError(
                f"{self.where or self.id}: 'correct' is {self.correct}; it must be 0 to {len(self.answers) - 1}."
            )

    @property
    def target(self) -> str:
        return self.answers[self.correct]

    @property
    def wrong(self) -> tuple[str, ...]:
        return tuple(answer for i, answer in enumerate(self.answers) if i != self.correct)

    def after(self, text: str) -> Item:
        """The same item with a text before its prompt."""
        return replace(self, prompt=text + self.prompt)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Number of items of each split."""

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
    """Three disjoint splits of items.

    derive: a vector is derived from these. validation: blocks and strength are chosen on these. test: the result is
    reported on these.

    Raises:
        EvaluationError: an item appears twice, the items are of two kinds, or all have the same right answer.
    """

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
                    "a repeated item would count twice, or leak between splits."
                )
        if self.kind == "choice" and len({item.target for item in self.items}) == 1:
            raise EvaluationError(
                f"Task {self.name}: the right answer is {self.items[0].target!r} in every item; a constant answer "
                "would score 100 %. Give items with different right answers."
            )

    @property
    def kind(self) -> Kind:
        return "choice" if len(self.items[0].answers) > 1 else "exact"

    @property
    def items(self) -> tuple[Item, ...]:
        return (*self.derive, *self.validation, *self.test)

    @cached_property
    def digest(self) -> str:
        """`"sha256:..."` of all items in order."""
        sha = hashlib.sha256(b"steer-engine task v1\n")
        for name in SPLITS:
            for item in getattr(self, name):
                line = json.dumps([name, item.prompt, item.answers, item.correct], separators=(",", ":"))
                sha.update(line.encode() + b"\n")
        return f"sha256:{sha.hexdigest()}"

    def with_shots(self, count: int) -> Task:
        """The same task with `count` solved examples before each prompt.

        The examples are taken from the derive split and removed from it.

        Raises:
            EvaluationError: fewer than 2 items would remain in the derive split.
        """
        if count == 0:
            return self
        if count > len(self.derive) - 2:
            raise EvaluationError(f"{count} examples per prompt leave too few of the {len(self.derive)} derive items.")
        examples = "".join(item.prompt + item.target + SEPARATOR for item in self.derive[:count])
        return Task(
            name=f"{self.name}, {count} shots",
            derive=_prefixed(self.derive[count:], examples),
            validation=_prefixed(self.validation, examples),
            test=_prefixed(self.test, examples),
            about=self.about,
        )


def _prefixed(items: Sequence[Item], examples: str) -> tuple[Item, ...]:
    return tuple(item.after(examples) for item in items)
