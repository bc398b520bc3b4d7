"""The building blocks of the public schema: numbers, names, blocks, vectors, and how errors are worded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MAX_ECHO_CHARS = 80
"""How much of a client's text an error message repeats."""
MAX_BLOCK_NUMBER = 1023
"""The highest block number of any model. Vector files have the same limit."""
MAX_NAME_CHARS = 128
MAX_FIELDS = 32
"""Fields of one object. More than any object has, and few enough that reporting unknown ones is cheap."""


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


def without_password(text: str) -> str:
    """A text for an error message, without the user and password of the URLs in it."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def field_error(field: str, message: str) -> PydanticCustomError:
    """For validators of a whole object: an error about one of its fields."""
    return PydanticCustomError("wrong_field", "{message}", {"field": field, "message": message})


def by_kind(tag_of: Callable[[Any], str | None], valid: str) -> Discriminator:
    """Selects the branch of a union by the type of the value, so that an error is about the intended branch.

    tag_of: the tag of a value's branch, None for a value of no branch. Tags are in angle brackets, unlike fields.
    valid: what is valid, for the error message.
    """
    return Discriminator(tag_of, custom_error_type="wrong_kind", custom_error_message=f"must be {valid}")


Finite = Annotated[float, Field(allow_inf_nan=False), AfterValidator(lambda number: number + 0.0)]
"""A finite number; -0.0 becomes 0.0, so that equal numbers have equal digests."""
Position = Annotated[int, Field(ge=-(2**30), le=2**30)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def field_names(cls) -> list[str]:
        """As a client writes them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @model_validator(mode="before")
    @classmethod
    def _check_field_count(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        names = cls.field_names()
        if len(fields) > MAX_FIELDS:
            raise ValueError(f"{len(fields)} fields given; valid fields: {', '.join(names)}")
        # Typed clients send null for what they leave out.
        return {name: value for name, value in fields.items() if value is not None or name not in names}


class InlineVector(Strict):
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


def block_ranges(blocks: Iterable[int]) -> str:
    """Ascending block numbers for a person: `(8, 9, 10, 14)` as `8-10, 14`."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


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


VectorField = Annotated[
    Annotated[Name, Tag("<name>")] | Annotated[InlineVector, Tag("<inline>")],
    by_kind(_tag_of_vector, "a vector's name, its digest 'sha256:...', or {'data': base64 of a safetensors file}"),
]
BlocksField = Annotated[
    Annotated[str, Field(max_length=MAX_NAME_CHARS), Tag("<range>")]
    | Annotated[int, Tag("<number>")]
    | Annotated[list[int], Field(max_length=MAX_BLOCK_NUMBER + 1, fail_fast=True), Tag("<list>")],
    by_kind(_tag_of_blocks, "'all', a range such as '8-22', a block number, or a list of numbers"),
    AfterValidator(_check_blocks),
]
