"""What a request asks: an ordered list of edits with scopes. The public schema of the `steering` field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError

MAX_ECHO_CHARS = 80
"""How much of a client's text an error message repeats."""

_VALUE_HELPS = re.compile(r"_type$|^(wrong_kind|literal_error|enum|finite_number|greater_than_equal|less_than_equal)$")
_REWORDED = {"model_type": "must be an object", "list_type": "must be a list"}


def shown(value: Any) -> str:
    """A client's value as a message repeats it: printable, and at most MAX_ECHO_CHARS long."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str):
        text = repr(value[:MAX_ECHO_CHARS])
        cut = len(value) > MAX_ECHO_CHARS or len(text) > MAX_ECHO_CHARS
        return f"{text[: MAX_ECHO_CHARS - 4]}...{text[0]}" if cut else text
    if isinstance(value, int):
        return str(value) if abs(value) < 2**63 else "a huge number"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return f"a {type(value).__name__}"[:MAX_ECHO_CHARS]


def wrong_field(field: str, message: str) -> PydanticCustomError:
    """What a validator of a whole object raises, so that the error can name the field."""
    return PydanticCustomError("wrong_field", "{message}", {"field": field, "message": message})


def told_apart(tag_of: Callable[[Any], str | None], valid: str) -> Discriminator:
    """Tells the branches of a union apart by the kind of the value, so that an error is about the one that was meant.

    Tags stand in angle brackets: no field is called so.
    """
    return Discriminator(tag_of, custom_error_type="wrong_kind", custom_error_message=f"must be {valid}")


def request_error(error: ValidationError, objects: Mapping[str, type[BaseModel]]) -> SteeringRequestError:
    """The first error, with the path of its field.

    objects: the model that each field holds ("steering": the root), to say which fields there are.
    """
    first = error.errors(include_url=False)[0]
    kind, location = first["type"], list(first["loc"])
    message = _REWORDED.get(kind, first["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    if _VALUE_HELPS.search(kind):
        message += f", not {shown(first['input'])}"
    unknown = ""
    if kind == "extra_forbidden":
        field = shown(location.pop())
        holder = next((str(part) for part in reversed(location) if part in objects), "steering")
        message = f"unknown field {field}; there are {', '.join(objects[holder].model_fields)}"
        unknown = f".{field[1:-1]}"
    elif kind == "invalid_key":
        location.pop()
    elif kind == "wrong_field":
        location.append(first["ctx"]["field"])
    param = "steering"
    for part in location:
        if isinstance(part, int):
            param += f"[{part}]"
        elif not part.startswith("<"):
            param += f".{part}"
    return SteeringRequestError(f"{param}: {message}.", param + unknown)


MAX_BLOCK_NUMBER = 1023
"""The last block that any model may have (vectors are bounded alike)."""
MAX_NAME_CHARS = 128
MAX_EDITS = 1024
"""What the schema reads; `Limits.max_edits` says how many a server takes."""
MAX_SPEC_CHARS = 65_536
"""Of a spec as JSON text; eight edits that spell out all blocks fit."""
MAX_POSITIONS = 1024
"""Token numbers that a capture may list."""
MAX_FIELDS = 32
"""Of one object. More than any has, and few enough that naming the unknown ones costs nothing."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Position = Annotated[int, Field(ge=-(2**30), le=2**30)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


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

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise ValueError(f"{len(fields)} fields given; there are {', '.join(cls.model_fields)}")
        return fields


class Span(_Strict):
    """Positions start <= p < end; negative numbers count from the prompt's end, as Python slices do; null = open."""

    start: Position | None = None
    end: Position | None = None


class Gate(_Strict):
    """Apply an edit only where cos(x, vector) lies in [min_cos, max_cos]."""

    vector: Name
    min_cos: Annotated[Finite, Field(ge=-1, le=1)] | None = None
    max_cos: Annotated[Finite, Field(ge=-1, le=1)] | None = None

    @model_validator(mode="after")
    def _some_bound(self) -> Gate:
        if self.min_cos is None and self.max_cos is None:
            raise ValueError("a gate needs min_cos or max_cos")
        if self.min_cos is not None and self.max_cos is not None and self.min_cos > self.max_cos:
            raise wrong_field("min_cos", f"min_cos {self.min_cos:g} is above max_cos {self.max_cos:g}")
        return self


class InlineVector(_Strict):
    """A control vector in the request itself: base64 of a safetensors file."""

    data: Annotated[str, Field(min_length=1)]


def _tag_of_vector(vector: Any) -> str | None:
    return "<name>" if isinstance(vector, str) else "<inline>" if isinstance(vector, dict | InlineVector) else None


def _tag_of_blocks(blocks: Any) -> str | None:
    if isinstance(blocks, str):
        return "<range>"
    if isinstance(blocks, list):
        return "<list>"
    return "<number>" if isinstance(blocks, int) and not isinstance(blocks, bool) else None


def _tag_of_scope(scope: Any) -> str | None:
    return "<word>" if isinstance(scope, str) else "<span>" if isinstance(scope, dict | Span) else None


def _tag_of_positions(positions: Any) -> str | None:
    return "<word>" if isinstance(positions, str) else "<list>" if isinstance(positions, list) else None


VectorField = Annotated[
    Annotated[Name, Tag("<name>")] | Annotated[InlineVector, Tag("<inline>")],
    told_apart(_tag_of_vector, "a vector's name, its digest 'sha256:...', or {'data': base64 of a safetensors file}"),
]
BlocksField = Annotated[
    Annotated[str, Field(max_length=MAX_NAME_CHARS), Tag("<range>")]
    | Annotated[int, Tag("<number>")]
    | Annotated[list[int], Field(max_length=MAX_BLOCK_NUMBER + 1, fail_fast=True), Tag("<list>")],
    told_apart(_tag_of_blocks, "'all', a range such as '8-22', a block's number, or a list of numbers"),
]
PositionsField = Annotated[
    Annotated[Literal["last", "mean", "all"], Tag("<word>")]
    | Annotated[list[Position], Field(min_length=1, max_length=MAX_POSITIONS, fail_fast=True), Tag("<list>")],
    told_apart(_tag_of_positions, "'last', 'mean', 'all', or a list of token numbers (negative: from the end)"),
]
ScopeField = Annotated[
    Annotated[Literal["all", "prompt", "generation"], Tag("<word>")] | Annotated[Span, Tag("<span>")],
    told_apart(_tag_of_scope, "'all', 'prompt', 'generation', or {'start': a, 'end': b}"),
]


class EditSpec(_Strict):
    """One edit: `op` with `vector` at `blocks`, over the positions of `scope`.

    scale: in units of the vector, or of the block's mean residual norm with `unit: "residual"` (op add);
    of the row's own norm (add_relative); the part that is removed (ablate).
    """

    vector: VectorField
    scale: Finite = 1.0
    op: Annotated[Op, Field(strict=False)] = Op.ADD
    unit: Literal["vector", "residual"] = "vector"
    blocks: BlocksField = "all"
    scope: ScopeField = "all"
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
        op = self.op.value
        if self.op is Op.CLAMP:
            if self.lo is None and self.hi is None:
                raise wrong_field("lo", "op 'clamp' needs lo, hi or both")
            if self.lo is not None and self.hi is not None and self.lo > self.hi:
                raise wrong_field("lo", f"lo {self.lo:g} is above hi {self.hi:g}")
        elif self.lo is not None or self.hi is not None:
            raise wrong_field("hi" if self.lo is None else "lo", f"lo and hi belong to op 'clamp', not to {op!r}")
        if self.op is Op.SET and self.target is None:
            raise wrong_field("target", "op 'set' needs a target")
        if self.op is not Op.SET and self.target is not None:
            raise wrong_field("target", f"a target belongs to op 'set', not to {op!r}")
        if self.op in (Op.CLAMP, Op.SET) and self.scale != 1.0:
            raise wrong_field("scale", f"op {op!r} takes no scale")
        if self.unit == "residual" and self.op is not Op.ADD:
            raise wrong_field("unit", f"unit 'residual' belongs to op 'add', not to {op!r}")
        return self


class CaptureSpec(_Strict):
    """Return the residual stream of the prompt's tokens, where the operator allows it.

    blocks: "all" = all that the server reads. positions: tokens of the prompt; "mean" is one row, the mean of all.
    after: the stream as the block's edit leaves it, not as it finds it.
    """

    blocks: BlocksField = "all"
    positions: PositionsField = "last"
    after: bool = False

    @field_validator("blocks")
    @classmethod
    def _readable_blocks(cls, blocks: str | int | list[int]) -> str | int | list[int]:
        parse_blocks(blocks)
        return blocks


class SteeringSpec(_Strict):
    """The `steering` field of a request: edits in order, or the name of a preset; and what is read, which may be all
    that is asked.
    """

    edits: Annotated[list[EditSpec], Field(min_length=1, max_length=MAX_EDITS, fail_fast=True)] | None = None
    preserve_norm: bool = False
    preset: Name | None = None
    capture: CaptureSpec | None = None

    @model_validator(mode="after")
    def _edits_or_preset(self) -> SteeringSpec:
        both = self.edits is not None and self.preset is not None
        if both or (self.edits is None and self.preset is None and self.capture is None):
            raise ValueError("give either edits or the name of a preset")
        if self.edits is None and self.preset is None and self.preserve_norm:
            raise wrong_field("preserve_norm", "without edits no norm changes")
        if self.preset is not None and self.preserve_norm:
            raise wrong_field("preserve_norm", "a preset says itself whether norms are preserved")
        return self


def parse_blocks(blocks: str | int | list[int]) -> tuple[int, ...] | None:
    """Block numbers, ascending without repeats; None for `"all"`. Raises ValueError with the valid forms."""
    if isinstance(blocks, str):
        if blocks == "all":
            return None
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", blocks, flags=re.ASCII)
        if match is None:
            raise ValueError(f"{shown(blocks)} is none of 'all', '8-22', '14', [8, 9], 14")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ValueError(f"{shown(blocks)} runs backwards; write '{last}-{first}'")
        ends = [first, last]
    else:
        ends = [blocks] if isinstance(blocks, int) else blocks
    if not ends:
        raise ValueError("an empty list; leave it out for all blocks of the vector")
    if wrong := [number for number in (min(ends), max(ends)) if not 0 <= number <= MAX_BLOCK_NUMBER]:
        raise ValueError(f"{shown(wrong[0])} is no block's number; they run from 0 to {MAX_BLOCK_NUMBER} at most")
    return tuple(range(first, last + 1)) if isinstance(blocks, str) else tuple(sorted(set(ends)))


def parse_spec(raw: Any) -> SteeringSpec | None:
    """Read a request's steering: a mapping, its JSON text, or None/False for "not asked".

    Raises:
        SteeringRequestError: with `param` naming the first field that is wrong.
        PayloadTooLargeError: JSON text of more than MAX_SPEC_CHARS.
    """
    if raw is None or raw is False:
        return None
    if isinstance(raw, SteeringSpec):
        return raw
    if isinstance(raw, str):
        raw = _from_json(raw)
        if raw is None or raw is False:
            return None
    if not isinstance(raw, dict):
        raise SteeringRequestError(
            f"steering must be an object with 'edits' or 'preset', not {shown(raw)}.", "steering"
        )
    try:
        return SteeringSpec.model_validate(raw)
    except ValidationError as error:
        raise request_error(error, _OBJECTS) from None


def _from_json(text: str) -> Any:
    if len(text) > MAX_SPEC_CHARS:
        raise PayloadTooLargeError(
            f"steering is JSON text of {len(text)} characters; at most {MAX_SPEC_CHARS} are read.", "steering"
        )
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        reason = "it is nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
    except ValueError as error:
        reason = str(error) if "is not a JSON number" in str(error) else "a number in it has too many digits"
    raise SteeringRequestError(f"steering is not valid JSON: {reason}.", "steering")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


_OBJECTS: dict[str, type[BaseModel]] = {
    "steering": SteeringSpec,
    "edits": EditSpec,
    "vector": InlineVector,
    "scope": Span,
    "gate": Gate,
    "capture": CaptureSpec,
}
"""The object that a field holds, to say which fields it has."""
