"""What steering did to the sequences of an answer: how many tokens each edit covered, and how conditions were decided.

All of it follows from the tokens and from what the engine measured, so nothing is counted on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

from steer_engine.edit import Condition
from steer_engine.resolve import ResolvedSpec
from steer_engine.template import covered_by, triggers_of
from steer_engine.trigger import Windows


class Decided(NamedTuple):
    """How a condition was decided for one sequence. value: a mean, or the largest number; None if it is not finite,
    since JSON has no such number."""

    value: float | None
    held: bool


Decisions = dict[tuple[int, int], list[Decided]]
"""(number of the prompt, number of its choice) -> its conditions, in the order of the report."""


class Applied:
    """Adds up the sequences of one prompt, and writes the totals into the report of its answer (`ResolvedSpec.report`).

    number: of the prompt in the answer. decisions: shared by the prompts of the answer, which finish in any order.
    """

    def __init__(
        self, resolved: ResolvedSpec, report: dict[str, Any], number: int = 0, decisions: Decisions | None = None
    ) -> None:
        self._number = number
        self._decisions: Decisions = {} if decisions is None else decisions
        self._conditions = resolved.template.conditions
        self._edits = [edit.edit for edit in resolved.edits if not edit.edit.does_nothing]
        self._triggers = triggers_of(self._edits)
        self._report = report

    @property
    def has_conditions(self) -> bool:
        """Whether `add` needs measured numbers."""
        return bool(self._conditions)

    def add(self, prompt: Sequence[int], tokens: Sequence[int], measured: Sequence[float], choice: int = 0) -> None:
        """Add a finished sequence.

        prompt, tokens: of the prompt and of the answer. measured: the sums, or largest numbers, of the conditions, in
        the order of the program; empty if the engine returned none. choice: number of the sequence.
        """
        prompt_len = len(prompt)
        # The last token was sampled, and never computed.
        num_computed = prompt_len + max(0, len(tokens) - 1)
        windows = [Windows(trigger) for trigger in self._triggers]
        for each in windows:
            each.extend([*prompt, *tokens])
        held = self._decide(prompt_len, measured, choice)
        for entry, edit in zip(self._report["edits"], self._edits, strict=True):
            covered = covered_by(edit, self._triggers, prompt_len)
            if edit.when is not None and covered is not None:
                if not held:
                    continue  # unknown
                if not edit.when.holds([held[each] for each in edit.when.conditions]):
                    covered = None
            parts = [] if covered is None else covered.within(0, num_computed, windows)
            entry["applied_tokens"] = entry.get("applied_tokens", 0) + sum(last - first for first, last in parts)

    def _decide(self, prompt_len: int, measured: Sequence[float], choice: int) -> dict[Condition, bool]:
        """Whether each condition held; empty if that is unknown. Written into the report as well."""
        if len(measured) != len(self._conditions):
            return {}
        decided = [
            Decided(
                number / condition.numbers(prompt_len) if isfinite(number) else None,
                condition.measured_at(prompt_len).holds(number),
            )
            for condition, number in zip(self._conditions, measured, strict=True)
        ]
        self._decisions[self._number, choice] = decided
        of_sequences = [self._decisions[key] for key in sorted(self._decisions)]
        for number, entry in enumerate(self._report.get("conditions", ())):
            found = [sequence[number] for sequence in of_sequences]
            entry["value"] = _single([each.value for each in found])
            entry["held"] = _single([each.held for each in found])
        return {condition: each.held for condition, each in zip(self._conditions, decided, strict=True)}


def _single(values: list[Any]) -> Any:
    """The value of one sequence as it is; those of several as a list."""
    return values[0] if len(values) == 1 else values
