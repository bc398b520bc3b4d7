"""Which token rows stand for a text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from steer_engine.errors import DerivationError

VALID = (
    "'last', 'mean' (of all tokens), 'all', or token numbers such as '-2' or '-1,-2' (averaged; negative: from the end)"
)

_WORDS = ("last", "mean", "all")


@dataclass(frozen=True, slots=True)
class Position:
    """A rule, as the user writes it. `all` and `mean` stand for the same row; a dump of `all` keeps each token's."""

    rule: str

    def __post_init__(self) -> None:
        if self.rule not in _WORDS and re.fullmatch(r"-?[0-9]{1,6}(,-?[0-9]{1,6}){0,63}", self.rule) is None:
            raise DerivationError(f"Position {self.rule[:64]!r} is none of {VALID}.")

    def __str__(self) -> str:
        return self.rule

    @property
    def numbers(self) -> tuple[int, ...]:
        """Token numbers of a rule that lists them."""
        return () if self.rule in _WORDS else tuple(int(part) for part in self.rule.split(","))

    @property
    def of_engine(self) -> str | list[int]:
        """What to ask of `LLM.capture`. For a mean the rows are asked for one by one: their norms are needed too."""
        if self.covers_first:
            return "all"
        return list(self.numbers) or "last"

    @property
    def covers_first(self) -> bool:
        """Whether the rows begin with the text's first token."""
        return self.rule in ("mean", "all")

    def fits(self, num_tokens: int) -> bool:
        """Whether a text of that many tokens has the rows."""
        return num_tokens > 0 and all(-num_tokens <= number < num_tokens for number in self.numbers)
