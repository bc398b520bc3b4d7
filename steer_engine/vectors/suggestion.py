"""Suggests a range of blocks and a scale to start with for a vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from steer_engine.errors import VectorFileError
from steer_engine.vectors.control_vector import ControlVector

GENTLE, STRONG = 0.25, 0.5
"""Doses, summed over the blocks. Measured on one model only, SmolLM2-135M (blocks 8-19 of 30, cheerful against gloomy):
0.24 changed the mood, 0.48 changed it fully with fluent text, 0.95 broke the text."""

FIRST, LAST = 0.25, 0.65
"""Range of the suggested blocks, as a share of the depth. Earlier blocks represent words, later ones the next token."""

WORSE = 0.05
"""Blocks whose separation is below the best one by more than this are left out."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Blocks `first` to `last`, and the scales for a gentle and a strong effect."""

    first: int
    last: int
    gentle: float
    strong: float

    def __str__(self) -> str:
        return f"blocks {self.first}-{self.last}, scale {self.gentle:.2g} (gentle) to {self.strong:.2g} (strong)"


def doses(vector: ControlVector) -> dict[int, float]:
    """Block -> |v| / |x|, the dose of scale 1, for blocks whose mean residual norm |x| is known."""
    streams = vector.metadata.residual_norms
    return {block: norm / streams[block] for block, norm in vector.norms.items() if block in streams}


def suggest(vector: ControlVector) -> Suggestion:
    """The longest run of middle blocks that separate well, and scales that give the doses above.

    Raises:
        VectorFileError: the metadata lacks the residual norms or the number of blocks, or all directions are zero.
    """
    num_blocks = vector.metadata.num_blocks
    known = doses(vector)
    if num_blocks is None or not known:
        raise VectorFileError("The vector's metadata lacks num_blocks or residual_norms, so no suggestion can be made.")
    middle = [block for block in known if FIRST * num_blocks <= block < LAST * num_blocks] or list(known)
    separation = vector.metadata.separation
    best = max((separation[block] for block in middle if block in separation), default=0.0)
    good = [block for block in middle if separation.get(block, best) >= best - WORSE]
    run = max(_runs(good), key=len)
    total = sum(known[block] for block in run)
    if total == 0.0:
        raise VectorFileError("The vector's directions are zero, so no scale has an effect.")
    return Suggestion(first=run[0], last=run[-1], gentle=GENTLE / total, strong=STRONG / total)


def starting_point(vector: ControlVector) -> dict[str, Any] | None:
    """What to try first, as fields of an edit: `blocks`, `scale`, `unit`, `scope`, and `because`, the reason in words.

    A vector that `steer-engine calibrate` measured has its result. Another one with known doses has the scale in the
    middle between gentle and strong. None if neither is known, or the stored result is not usable.
    """
    stored = vector.metadata.extra
    if "suggested_scale" in stored:
        blocks, because = stored.get("suggested_blocks", "all"), stored.get("suggested_because", "calibrated")
        unit, scope = stored.get("suggested_unit", "vector"), stored.get("suggested_scope", "all")
        try:
            scale = float(stored["suggested_scale"])
        except ValueError:
            return None
    else:
        try:
            found = suggest(vector)
        except VectorFileError:
            return None
        blocks, unit, scope = f"{found.first}-{found.last}", "vector", "all"
        scale = float(f"{(found.gentle + found.strong) / 2:.2g}")
        because = f"adds {(GENTLE + STRONG) / 2:.2g} residual norms over the blocks that separate best"
    if not math.isfinite(scale) or unit not in ("vector", "residual"):
        return None
    return {"blocks": blocks, "scale": scale, "unit": unit, "scope": scope, "because": because}


def shown_blocks(vector: ControlVector) -> tuple[int, ...]:
    """Up to three blocks to show: both ends of the suggested run, and the block in it that separates best."""
    try:
        suggestion = suggest(vector)
    except VectorFileError:
        return (vector.blocks[len(vector.blocks) // 2],)
    run = [block for block in vector.blocks if suggestion.first <= block <= suggestion.last]
    best = max(run, key=lambda block: vector.metadata.separation.get(block, 0.0))
    return tuple(sorted({run[0], best, run[-1]}))


def _runs(blocks: list[int]) -> list[list[int]]:
    """Maximal runs of consecutive numbers of an ascending list."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
