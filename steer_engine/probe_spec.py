"""The public schema of probes: which numbers about the residual stream a request asks for, and when they end it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from steer_engine.fields import MAX_BLOCK_NUMBER, BlocksField, Finite, Strict, VectorField, field_error
from steer_engine.scope import ScopeField, SiteField

MAX_PROBES = 64
"""The schema's own limit; `Limits.max_probes` is the limit of a server."""
MAX_STOPS = 16
"""Stop rules of a request."""
MAX_STOP_TOKENS = 4096

ProbeName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.:/-]+$")]


class ProbeSpec(Strict):
    """A number for every token of `scope` at each of `blocks`: the stream's projection on a vector.

    site: what is measured in each block, as in an edit: the stream after it, or the output of its attention or MLP.
    measure: "cosine" of the stream and the vector, their "dot" product, or the "probability" of a probe that was fitted
    (`steer-engine probe fit`). after: measure the stream after the block's edits instead of before. return: the numbers
    of all "tokens", a "summary" of them, or "none" (for stop rules).
    """

    name: ProbeName
    vector: VectorField
    blocks: BlocksField = "all"
    site: SiteField | None = None
    measure: Literal["cosine", "dot", "probability"] = "cosine"
    scope: ScopeField = "generation"
    after: bool = False
    return_: Annotated[Literal["tokens", "summary", "none"], Field(alias="return")] = "tokens"


class StopSpec(Strict):
    """End the answer at the first generated token for which a probe's number is out of bounds.

    block: which of the probe's blocks; may be left out if it has one. above, below: the number must be above, or below,
    or both. for: so many tokens in a row; the last of them ends the answer and is part of it.
    """

    probe: ProbeName
    block: Annotated[int, Field(ge=0, le=MAX_BLOCK_NUMBER)] | None = None
    above: Finite | None = None
    below: Finite | None = None
    for_: Annotated[int, Field(ge=1, le=MAX_STOP_TOKENS, alias="for")] = 1

    @model_validator(mode="after")
    def _check_bounds(self) -> StopSpec:
        if self.above is None and self.below is None:
            raise ValueError("a stop rule needs above or below")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise field_error("above", f"above {self.above:g} is not less than below {self.below:g}")
        return self
