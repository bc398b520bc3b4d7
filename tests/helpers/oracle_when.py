"""When an edit applies, for the oracle: from the definitions, position by position, without the product's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def covered(scope: Any, tokens: Sequence[int], prompt_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [T]: the positions of a scope. int [T]: the first position of the window that each of them is in."""
    num_tokens = len(tokens)
    positions = range(num_tokens)
    if not isinstance(scope, dict):
        start, end = {
            "all": (0, num_tokens),
            "prompt": (0, prompt_len),
            "generation": (prompt_len - 1, num_tokens),
            "last_prompt_token": (prompt_len - 1, prompt_len),
        }[scope]
    elif scope.get("from") == "generation":
        start = prompt_len - 1 + (scope.get("start") or 0)
        end = num_tokens if scope.get("end") is None else prompt_len - 1 + scope["end"]
    else:
        start, end = scope.get("start"), scope.get("end")
        start = 0 if start is None else start if start >= 0 else max(0, prompt_len + start)
        end = num_tokens if end is None else end if end >= 0 else max(0, prompt_len + end)
    inside = [start <= p < end for p in positions]
    first = [start] * num_tokens
    if isinstance(scope, dict):
        if "after" in scope or "until" in scope:
            for p in positions:
                window = window_at(scope, tokens, p)
                inside[p] &= window is not None
                first[p] = window if window is not None else 0
        if "except" in scope:
            for p in positions:
                inside[p] &= window_at(scope["except"], tokens, p) is None
    return torch.tensor(inside), torch.tensor(first)


def window_at(trigger: dict[str, Any], tokens: Sequence[int], position: int) -> int | None:
    """The first position of the window that `position` is in; None outside all windows."""
    opened: int | None = None if "after" in trigger else 0
    closed = False
    for p in range(position + 1):
        # The token before p may have opened a window; the token at p may close one.
        opens = "after" in trigger and p > 0 and _ends(trigger["after"], tokens, p - 1)
        if opens and (opened is None or trigger.get("each", False)):
            opened, closed = p, False
        if "until" in trigger and _ends(trigger["until"], tokens, p) and opened is not None:
            closed = True
    if opened is None or closed or position - opened >= trigger.get("tokens", 10**9):
        return None
    return opened


def _ends(sequence: int | list[int], tokens: Sequence[int], position: int) -> bool:
    wanted = [sequence] if isinstance(sequence, int) else sequence
    start = position - len(wanted) + 1
    return start >= 0 and list(tokens[start : position + 1]) == wanted


def share(schedule: dict[str, Any] | None, since_T: torch.Tensor) -> torch.Tensor:
    """float64 [T]: the factor of an edit, `since_T` tokens after the first of its window."""
    if schedule is None:
        return torch.ones(len(since_T), dtype=torch.float64)
    part_T = (since_T.double() / schedule["over"]).clamp(max=1.0)
    if schedule["kind"] == "linear":
        return 1.0 + (schedule["to"] - 1.0) * part_T
    return torch.tensor(schedule["to"], dtype=torch.float64) ** part_T


def conditions_of(when: dict[str, Any]) -> list[dict[str, Any]]:
    for key in ("any", "all"):
        if key in when:
            return list(when[key])
    return [when]


class Decisions:
    """What the conditions of a spec measure, in the order of the blocks."""

    def __init__(self, spec: dict[str, Any], prompt_len: int) -> None:
        self.spec, self.prompt_len = spec, prompt_len
        self.numbers: dict[str, dict[int, torch.Tensor]] = {}
        """By condition and block, the numbers of all prompt tokens."""

    def when_of(self, edit: dict[str, Any]) -> dict[str, Any] | None:
        return edit.get("when", self.spec.get("when"))

    def blocks_of(self, condition: dict[str, Any], vectors: Any) -> list[int]:
        wanted = condition.get("blocks", "all")
        if wanted == "all":
            return list(vectors[condition["vector"]].blocks)
        return [wanted] if isinstance(wanted, int) else list(wanted)

    def decided_at(self, when: dict[str, Any], vectors: Any) -> int:
        return max(max(self.blocks_of(condition, vectors)) for condition in conditions_of(when))

    def measure(self, x_TD: torch.Tensor, block: int, vectors: Any, site: str) -> None:
        for edit in self.spec["edits"]:
            for condition in conditions_of(self.when_of(edit) or {"all": []}):
                if condition.get("site", "block") == site and block in self.blocks_of(condition, vectors):
                    self._measure(condition, x_TD[: self.prompt_len].double(), block, vectors)

    def _measure(self, condition: dict[str, Any], x_PD: torch.Tensor, block: int, vectors: Any) -> None:
        v_D = torch.tensor(vectors[condition["vector"]].directions[block].tolist(), dtype=torch.float64)
        dot_P = x_PD @ v_D
        if condition.get("measure", "cosine") == "cosine":
            dot_P = dot_P / (x_PD.norm(dim=1) * v_D.norm())
        self.numbers.setdefault(str(condition), {})[block] = dot_P

    def value(self, condition: dict[str, Any]) -> float:
        numbers_BP = torch.stack(list(self.numbers[str(condition)].values()))
        match condition.get("at", "last_prompt_token"):
            case "last_prompt_token":
                return float(numbers_BP[:, -1].mean())
            case "mean_prompt":
                return float(numbers_BP.mean())
        return float(numbers_BP.max())

    def holds(self, when: dict[str, Any]) -> bool:
        held = []
        for condition in conditions_of(when):
            value = self.value(condition)
            held.append(condition.get("above", -1e30) < value < condition.get("below", 1e30))
        return any(held) if "any" in when else all(held)
