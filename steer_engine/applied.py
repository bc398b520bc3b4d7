"""What steering did to the sequences of an answer: how many tokens each edit covered, and how conditions were decided.

All of it follows from the tokens and from what the engine measured, so nothing is counted on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer_engine.edit import Condition
from steer_engine.resolve import ResolvedSpec
from steer_engine.template import covered_by, triggers_of
from steer_engine.trigger import Windows


class Applied:
    """Adds up the sequences of one answer, and writes the totals into its report (`ResolvedSpec.report`)."""

    def __init__(self, resolved: ResolvedSpec, report: dict[str, Any]) -> None:
        self._conditions = resolved.template.conditions
        self._edits = [edit.edit for edit in resolved.edits if not edit.edit.does_nothing]
        self._triggers = triggers_of(self._edits)
        self._report = report

    def add(self, prompt: Sequence[int], tokens: Sequence[int], measured: Sequence[float]) -> None:
        """Add a finished sequence.

        prompt, tokens: of the prompt and of the answer. measured: the sums, or largest numbers, of the conditions, in
        the order of the program; empty if the engine returned none.
        """
        prompt_len = len(prompt)
        # The last token was sampled, and never computed.
        num_computed = prompt_len + max(0, len(tokens) - 1)
        windows = [Windows(trigger) for trigger in self._triggers]
        for each in windows:
            each.extend([*prompt, *tokens])
        held = self._decide(prompt_len, measured)
        for entry, edit in zip(self._report["edits"], self._edits, strict=True):
            applies = edit.when is None or edit.when.holds([held.get(each, False) for each in edit.when.conditions])
            covered = covered_by(edit, self._triggers, prompt_len) if applies else None
            parts = [] if covered is None else covered.within(0, num_computed, windows)
            entry["applied_tokens"] = entry.get("applied_tokens", 0) + sum(last - first for first, last in parts)

    def _decide(self, prompt_len: int, measured: Sequence[float]) -> dict[Condition, bool]:
        """Whether each condition held; empty if that is unknown. Written into the report as well."""
        held: dict[Condition, bool] = {}
        if len(measured) != len(self._conditions):
            return held
        for entry, condition, number in zip(
            self._report.get("conditions", ()), self._conditions, measured, strict=True
        ):
            held[condition] = condition.measured_at(prompt_len).holds(number)
            _append(entry, "value", number / condition.numbers(prompt_len))
            _append(entry, "held", held[condition])
        return held


def _append(entry: dict[str, Any], key: str, value: Any) -> None:
    """The value of one sequence as it is; those of several as a list."""
    if key not in entry:
        entry[key] = value
    elif isinstance(entry[key], list):
        entry[key].append(value)
    else:
        entry[key] = [entry[key], value]
