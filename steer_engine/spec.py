"""The public schema of a request's `steering` field, and its parser.

`parse_spec` turns a mapping or JSON text into a `SteeringSpec`. Every error is a `SteeringRequestError` whose `param`
is the path of the first wrong field. Names of vectors and presets are looked up later, in `steer_engine.resolve`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError

MAX_ECHO_CHARS = 80
"""How much of a client's text an error message repeats."""
MAX_BLOCK_NUMBER = 1023
"""The highest block number of any model. Vector files have the same limit."""
MAX_NAME_CHARS = 128
MAX_EDITS = 1024
"""The schema's own limit; `Limits.max_edits` is the limit of a server."""
MAX_SPEC_CHARS = 65_536
"""Length of a spec as JSON text. Eight edits that list every block fit."""
MAX_POSITIONS = 1024
"""Token positions that a capture may list."""
MAX_FIELDS = 32
"""Fields of one object. More than any object has, and few enough that reporting unknown ones is cheap."""

_SHOW_VALUE = re.compile(r"_type$|^(wrong_kind|literal_error|enum|finite_number|greater_than_equal|less_than_equal)$")
"""Kinds of pydantic errors whose message is clearer with the given value."""
_REWORDED = {"model_type": "must be an object", "list_type": "must be a list"}


def shown(value: Any) -> str:
    """A client's value for an error message: printable, at most MAX_ECHO_CHARS long."""
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


def _field_error(field: str, message: str) -> PydanticCustomError:
    """For validators of a whole object: an error about one of its fields."""
    return PydanticCustomError("wrong_field", "{message}", {"field": field, "message": message})


def _by_kind(tag_of: Callable[[Any], str | None], valid: str) -> Discriminator:
    """Selects the branch of a union by the type of the value, so that an error is about the intended branch.

    tag_of: the tag of a value's branch, None for a value of no branch. Tags are in angle brackets, unlike fields.
    valid: what is valid, for the error message.
    """
    return Discriminator(tag_of, custom_error_type="wrong_kind", custom_error_message=f"must be {valid}")


def _request_error(error: ValidationError) -> SteeringRequestError:
    """The first of pydantic's errors, with the path of its field."""
    first = error.errors(include_url=False)[0]
    kind, location = first["type"], list(first["loc"])
    message = _REWORDED.get(kind, first["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    if _SHOW_VALUE.search(kind):
        message += f", not {shown(first['input'])}"
    unknown = ""
    if kind == "extra_forbidden":
        field = shown(location.pop())
        parent = next((str(part) for part in reversed(location) if part in _OBJECTS), "steering")
        message = f"unknown field {field}; valid fields: {', '.join(_OBJECTS[parent].model_fields)}"
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


Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(lambda number: number + 0.0)]
"""A finite number; -0.0 becomes 0.0, so that equal numbers have equal digests."""
Position = Annotated[int, Field(ge=-(2**30), le=2**30)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class Op(StrEnum):
    """The operation that an edit applies to the residual stream x with a vector v."""

    ADD = "add"
    """x + scale * v"""
    ADD_RELATIVE = "add_relative"
    """x + scale * |x| * v/|v|, where |x| is the norm of the same row"""
    ABLATE = "ablate"
    """Remove the fraction `scale` of the component along v (1 = all of it)."""
    CLAMP = "clamp"
    """Limit the component along v to [lo, hi]."""
    SET = "set"
    """Set the component along v to `target`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_field_count(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        if len(fields) > MAX_FIELDS:
            raise ValueError(f"{len(fields)} fields given; valid fields: {', '.join(cls.model_fields)}")
        # Typed clients send null for what they leave out.
        return {name: value for name, value in fields.items() if value is not None or name not in cls.model_fields}


class Span(_Strict):
    """Positions start <= p < end. Negative numbers count from the end of the prompt; null is open, as in a slice."""

    start: Position | None = None
    end: Position | None = None


class Gate(_Strict):
    """Apply an edit only where cos(x, vector) is in [min_cos, max_cos]."""

    vector: Name
    min_cos: Annotated[Finite, Field(ge=-1, le=1)] | None = None
    max_cos: Annotated[Finite, Field(ge=-1, le=1)] | None = None

    @model_validator(mode="after")
    def _check_bounds(self) -> Gate:
        if self.min_cos is None and self.max_cos is None:
            raise ValueError("a gate needs min_cos or max_cos")
        if self.min_cos is not None and self.max_cos is not None and self.min_cos > self.max_cos:
            raise _field_error("min_cos", f"min_cos {self.min_cos:g} is above max_cos {self.max_cos:g}")
        return self


class InlineVector(_Strict):
    """A control vector inside the request: base64 of a safetensors file."""

    data: Annotated[str, Field(min_length=1)]


def parse_blocks(blocks: str | int | list[int]) -> tuple[int, ...] | None:
    """Block numbers, ascending and without duplicates; None for `"all"`.

    Raises:
        ValueError: not a valid form. The message says which are.
    """
    if isinstance(blocks, str):
        if blocks == "all":
            return None
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", blocks, flags=re.ASCII)
        if match is None:
            raise ValueError(f"{shown(blocks)} is not valid; use 'all', '8-22', '14', [8, 9] or 14")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ValueError(f"{shown(blocks)} runs backwards; write '{last}-{first}'")
        ends = [first, last]
    else:
        ends = [blocks] if isinstance(blocks, int) else blocks
    if not ends:
        raise ValueError("the list is empty; leave it out for all blocks of the vector")
    if wrong := [number for number in (min(ends), max(ends)) if not 0 <= number <= MAX_BLOCK_NUMBER]:
        raise ValueError(f"{shown(wrong[0])} is not a block number; the range is 0 to {MAX_BLOCK_NUMBER}")
    return tuple(range(first, last + 1)) if isinstance(blocks, str) else tuple(sorted(set(ends)))


def _check_blocks(blocks: str | int | list[int]) -> str | int | list[int]:
    parse_blocks(blocks)
    return blocks


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
    _by_kind(_tag_of_vector, "a vector's name, its digest 'sha256:...', or {'data': base64 of a safetensors file}"),
]
BlocksField = Annotated[
    Annotated[str, Field(max_length=MAX_NAME_CHARS), Tag("<range>")]
    | Annotated[int, Tag("<number>")]
    | Annotated[list[int], Field(max_length=MAX_BLOCK_NUMBER + 1, fail_fast=True), Tag("<list>")],
    _by_kind(_tag_of_blocks, "'all', a range such as '8-22', a block number, or a list of numbers"),
    AfterValidator(_check_blocks),
]
PositionsField = Annotated[
    Annotated[Literal["last", "mean", "all"], Tag("<word>")]
    | Annotated[list[Position], Field(min_length=1, max_length=MAX_POSITIONS, fail_fast=True), Tag("<list>")],
    _by_kind(_tag_of_positions, "'last', 'mean', 'all', or a list of token positions (negative: from the end)"),
]
ScopeField = Annotated[
    Annotated[Literal["all", "prompt", "generation"], Tag("<word>")] | Annotated[Span, Tag("<span>")],
    _by_kind(_tag_of_scope, "'all', 'prompt', 'generation', or {'start': a, 'end': b}"),
]


class EditSpec(_Strict):
    """One edit: `op` with `vector` at `blocks`, over the positions of `scope`.

    scale: for op add in units of the vector, or in mean residual norms of the block with `unit: "residual"`; for
    add_relative in norms of the same row; for ablate the fraction to remove.
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

    @model_validator(mode="after")
    def _check_operation_fields(self) -> EditSpec:
        op = self.op.value
        if self.op is Op.CLAMP:
            if self.lo is None and self.hi is None:
                raise _field_error("lo", "op 'clamp' needs lo, hi or both")
            if self.lo is not None and self.hi is not None and self.lo > self.hi:
                raise _field_error("lo", f"lo {self.lo:g} is above hi {self.hi:g}")
        elif self.lo is not None or self.hi is not None:
            raise _field_error("hi" if self.lo is None else "lo", f"lo and hi apply to op 'clamp', not to {op!r}")
        if self.op is Op.SET and self.target is None:
            raise _field_error("target", "op 'set' needs a target")
        if self.op is not Op.SET and self.target is not None:
            raise _field_error("target", f"target applies to op 'set', not to {op!r}")
        if self.op in (Op.CLAMP, Op.SET) and self.scale != 1.0:
            raise _field_error("scale", f"op {op!r} takes no scale")
        if self.unit == "residual" and self.op is not Op.ADD:
            raise _field_error("unit", f"unit 'residual' applies to op 'add', not to {op!r}")
        return self


class CaptureSpec(_Strict):
    """Return the residual stream of the prompt's tokens. The operator must have enabled capture.

    blocks: "all" means every block that the server captures. positions: tokens of the prompt; "mean" is one row, the
    mean of all. after: capture the stream after the block's edit instead of before it.
    """

    blocks: BlocksField = "all"
    positions: PositionsField = "last"
    after: bool = False


class SteeringSpec(_Strict):
    """The `steering` field of a request: edits in order, or the name of a preset.

    `capture` may be added to either, or stand alone.
    """

    edits: Annotated[list[EditSpec], Field(min_length=1, max_length=MAX_EDITS, fail_fast=True)] | None = None
    preserve_norm: bool = False
    preset: Name | None = None
    capture: CaptureSpec | None = None

    @model_validator(mode="after")
    def _check_content(self) -> SteeringSpec:
        both = self.edits is not None and self.preset is not None
        if both or (self.edits is None and self.preset is None and self.capture is None):
            raise ValueError("specify either edits or the name of a preset")
        if self.edits is None and self.preset is None and self.preserve_norm:
            raise _field_error("preserve_norm", "has no effect without edits")
        if self.preset is not None and self.preserve_norm:
            raise _field_error("preserve_norm", "the preset itself specifies preserve_norm")
        return self


def parse_spec(raw: Any, max_chars: int | None = None, max_inline_bytes: int = 0) -> SteeringSpec | None:
    """Parse a request's steering. None, False and their JSON texts mean that no steering is requested.

    raw: a mapping, its JSON text, or a parsed spec. max_chars: of the spec as JSON text without inline vectors; by
    default MAX_SPEC_CHARS for text, and any length for a mapping. max_inline_bytes: of the inline vectors in text.

    Raises:
        SteeringRequestError: `param` names the first field that is wrong.
        PayloadTooLargeError: the spec is longer than `max_chars`.
    """
    if raw is None or raw is False:
        return None
    if isinstance(raw, SteeringSpec):
        return raw
    if isinstance(raw, str):
        # Base64 has four characters for three bytes.
        raw = _from_json(raw, (MAX_SPEC_CHARS if max_chars is None else max_chars) + max_inline_bytes * 4 // 3)
        if raw is None or raw is False:
            return None
    if not isinstance(raw, dict):
        raise SteeringRequestError(
            f"steering must be an object with 'edits' or 'preset', not {shown(raw)}.", "steering"
        )
    if max_chars is not None:
        check_chars(raw, max_chars)
    try:
        return SteeringSpec.model_validate(raw)
    except ValidationError as error:
        raise _request_error(error) from None


def check_chars(spec: dict[str, Any], max_chars: int) -> None:
    """Raise PayloadTooLargeError if a decoded spec is longer as JSON text without spaces and inline vectors.

    Stops at the limit, so that a spec of megabytes costs no more than one at the limit.
    """
    count, pending = 0, list[Any]([spec])
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            count += len(value) + 2
        elif isinstance(value, dict | list):
            count += len(value) * (2 if isinstance(value, dict) else 1) + 1  # brackets, commas, colons
        else:
            # Not `str`, which refuses huge integers. Ten bits are three digits.
            count += max(1, value.bit_length() * 3 // 10) if isinstance(value, int) else len(repr(value))
        if count > max_chars:
            raise _too_long(max_chars)
        if isinstance(value, dict):
            pending += value
            pending += [inner for key, inner in value.items() if key != "data"]
        elif isinstance(value, list):
            pending += value


def _too_long(max_chars: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"steering has more than {max_chars} characters of JSON (max_spec_bytes).", "steering")


def _from_json(text: str, max_chars: int) -> Any:
    if len(text) > max_chars:
        raise _too_long(max_chars)
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
"""The model of each field that is an object, to list its valid fields."""
