"""One way of steering that is tried on every item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["vector", "residual"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A vector at blocks with a strength; no vector or strength 0 is no steering at all.

    vector: its name, for people. digest: what it is; requests and keys go by it.
    blocks: as in a request, `"all"`, `"8-19"` or `"15"`.
    alpha: in units of the vector, or of the mean residual norm.
    scope: token positions, `"all"`, `"prompt"` or `"generation"`.
    """

    vector: str = ""
    digest: str = ""
    blocks: str = "all"
    alpha: float = 0.0
    unit: Unit = "vector"
    scope: str = "all"
    preserve_norm: bool = False

    @property
    def is_baseline(self) -> bool:
        return not self.digest or self.alpha == 0.0

    @property
    def key(self) -> str:
        """Names the condition in files; equal for conditions that do the same."""
        if self.is_baseline:
            return "baseline"
        norm = "|norm" if self.preserve_norm else ""
        return f"{self.digest}|{self.blocks}|{self.alpha:.6g}|{self.unit}|{self.scope}{norm}"

    @property
    def steering(self) -> dict[str, Any] | None:
        """The `steering` field of a request."""
        if self.is_baseline:
            return None
        edit = {
            "vector": self.digest,
            "scale": self.alpha,
            "unit": self.unit,
            "blocks": self.blocks,
            "scope": self.scope,
        }
        return {"edits": [edit], "preserve_norm": self.preserve_norm}


BASELINE = Condition()
