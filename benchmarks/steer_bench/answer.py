"""The answer to a question: table rows, claims with their targets, and facts about the setup."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steer_bench.ratio import Ratio, Target


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One row of the targets table. mode: compiled or eager, runner, load and operations, as text."""

    what: str
    mode: str
    value: float
    low: float
    high: float
    target: str = ""
    verdict: str = ""
    unit: str = ""
    note: str = ""

    @classmethod
    def of_ratio(cls, what: str, ratio: Ratio, target: Target | None = None, *, mode: str, note: str = "") -> Claim:
        return cls(
            what=what, mode=mode, value=ratio.median, low=ratio.low, high=ratio.high, note=note,
            target=str(target or ""), verdict=target.verdict(ratio.low, ratio.high) if target else "",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """claims: ratios and other figures, with targets. rows: all measurements, in order. facts: setup of the arms."""

    question: str
    claims: list[Claim]
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the answer atomically as JSON. `about` describes machine and settings."""
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        staged.write_text(json.dumps({"about": dict(about), **asdict(self)}, indent=1) + "\n")
        staged.replace(path)

    @classmethod
    def load(cls, path: Path) -> tuple[Answer, dict[str, Any]]:
        """Returns the saved answer and its `about`."""
        raw = json.loads(path.read_text())
        about = raw.pop("about")
        return cls(**{**raw, "claims": [Claim(**claim) for claim in raw["claims"]]}), about


def claims_of(folder: Path) -> list[Claim]:
    """Claims of all answers in a folder, sorted by file name."""
    return [claim for path in sorted(folder.glob("*.json")) for claim in Answer.load(path)[0].claims]
