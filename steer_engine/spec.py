"""What a request asks: an ordered list of edits with scopes. The public schema of the `steering` field."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from steer_engine.errors import SteeringRequestError

MAX_BLOCK_NUMBER = 65_535
MAX_NAME_CHARS = 128
MAX_ECHO_CHARS = 80
"""How much of a client's text an error message repeats."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Position = Annotated[int, Field(ge=-(2**30), le=2**30)]


class Op(StrEnum):
    """One thing done to the residual stream x with the vector v (DESIGN: what an edit computes)."""

    ADD = "add"
    """x + scale * v"""
    ADD_RELATIVE = "add_relative"
    """x + scale * |x| * v/|v|, with |x| of this very row"""
    ABLATE = "ablate"
    """remove the component along v, by `scale` (1 = all of it)"""
    CLAMP = "clamp"
    """hold the component along v in [lo, hi]"""
    SET = "set"
    """the component along v becomes `target`"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Span(_Strict):
    """Positions start <= p < end; negative numbers count from the prompt's end, as Python slices do; null = open."""

    start: Position | None = None
    end: Position | None = None


class Gate(_Strict):
    """Apply an edit only where cos(x, vector) lies in [min_cos, max_cos]."""

    vector: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    min_cos: Annotated[Finite, Field(ge=-1, le=1)] | None = None
    max_cos: Annotated[Finite, Field(ge=-1, le=1)] | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> Gate:
        if self.min_cos is None and self.max_cos is None:
            raise ValueError("a gate needs min_cos or max_cos")
        if self.min_cos is not None and self.max_cos is not None and self.min_cos > self.max_cos:
            raise ValueError(f"min_cos {self.min_cos} is above max_cos {self.max_cos}")
        return self


class InlineVector(_Strict):
    """A control vector in the request itself: base64 of a safetensors file."""

    data: Annotated[str, Field(min_length=1)]


class EditSpec(_Strict):
    """One edit: `op` with `vector` at `blocks`, over the positions of `scope`.

    scale: in units of the vector, or of the block's mean residual norm with `unit: "residual"` (op add);
    of the row's own norm (add_relative); the part that is removed (ablate).
    """

    vector: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)] | InlineVector
    scale: Finite = 1.0
    op: Annotated[Op, Field(strict=False)] = Op.ADD
    unit: Literal["vector", "residual"] = "vector"
    blocks: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | int | Annotated[list[int], Field(max_length=1024)] = (
        "all"
    )
    scope: Literal["all", "prompt", "generation"] | Span = "all"
    gate: Gate | None = None
    lo: Finite | None = None
    hi: Finite | None = None
    target: Finite | None = None

    @field_validator("blocks")
    @classmethod
    def _readable_blocks(cls, blocks: str | int | list[int]) -> str | int | list[int]:
        parse_blocks(blocks)
        return blocks

    @model_validator(mode="after")
    def _fields_of_the_operation(self) -> EditSpec:
        if self.op is Op.CLAMP:
            if self.lo is None and self.hi is None:
                raise ValueError("op 'clamp' needs lo, hi or both")
            if self.lo is not None and self.hi is not None and self.lo > self.hi:
                raise ValueError(f"lo {self.lo} is above hi {self.hi}")
        elif self.lo is not None or self.hi is not None:
            raise ValueError(f"lo and hi belong to op 'clamp', not to {self.op.value!r}")
        if (self.op is Op.SET) != (self.target is not None):
            raise ValueError("op 'set' needs a target, and only 'set' takes one")
        if self.op in (Op.CLAMP, Op.SET) and self.scale != 1.0:
            raise ValueError(f"op {self.op.value!r} takes no scale")
        if self.unit == "residual" and self.op is not Op.ADD:
            raise ValueError("unit 'residual' belongs to op 'add'")
        return self


class SteeringSpec(_Strict):
    """The `steering` field of a request: edits in order, or the name of a preset."""

    edits: Annotated[list[EditSpec], Field(min_length=1, max_length=1024)] | None = None
    preserve_norm: bool = False
    preset: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)] | None = None

    @model_validator(mode="after")
    def _edits_or_preset(self) -> SteeringSpec:
        if (self.edits is None) == (self.preset is None):
            raise ValueError("give either edits or the name of a preset")
        if self.preset is not None and self.preserve_norm:
            raise ValueError("a preset says itself whether norms are preserved")
        return self


def parse_blocks(blocks: str | int | list[int]) -> tuple[int, ...] | None:
    """Block numbers, ascending without repeats; None for `"all"`. Raises ValueError with the valid forms."""
    if isinstance(blocks, str):
        if blocks == "all":
            return None
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", blocks, flags=re.ASCII)
        if match is None:
            raise ValueError(f"blocks {blocks[:MAX_ECHO_CHARS]!r} is none of 'all', '8-22', '14', [8, 9], 14")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ValueError(f"blocks {blocks!r} runs backwards; write '{last}-{first}'")
        numbers = list(range(first, last + 1))
    else:
        numbers = [blocks] if isinstance(blocks, int) else blocks
    if not numbers:
        raise ValueError("blocks is an empty list; leave it out for all blocks of the vector")
    if min(numbers) < 0 or max(numbers) > MAX_BLOCK_NUMBER:
        raise ValueError(f"block numbers run from 0; got {min(numbers)} to {max(numbers)}")
    return tuple(sorted(set(numbers)))


def parse_spec(raw: Any) -> SteeringSpec | None:
    """Read a request's steering: a mapping, its JSON text, or None/False for "not asked".

    Raises:
        SteeringRequestError: with `param` naming the first field that is wrong.
    """
    if raw is None or raw is False:
        return None
    if isinstance(raw, SteeringSpec):
        return raw
    if isinstance(raw, str):
        try:
            raw = json.loads(raw, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise SteeringRequestError(f"steering is not valid JSON: {error}"[:200], "steering") from None
        if raw is None or raw is False:
            return None
    if not isinstance(raw, dict):
        raise SteeringRequestError(
            f"steering must be an object with 'edits' or 'preset', not {type(raw).__name__}.", "steering"
        )
    try:
        return SteeringSpec.model_validate(raw)
    except ValidationError as error:
        raise _first_error(error) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


_FIELDS = {*SteeringSpec.model_fields, *EditSpec.model_fields, *Gate.model_fields, *Span.model_fields, "data"}


def _first_error(error: ValidationError) -> SteeringRequestError:
    # A union (name or inline vector, scope word or span) reports every branch; the deepest one is the one meant.
    first = max(
        error.errors(include_url=False),
        key=lambda item: (item["loc"][:3] == error.errors()[0]["loc"][:3], len(item["loc"])),
    )
    param = "steering"
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part in _FIELDS or (first["type"] == "extra_forbidden" and part == first["loc"][-1]):
            param += f".{str(part)[:MAX_ECHO_CHARS]}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    return SteeringRequestError(f"{param}: {message}.", param)
