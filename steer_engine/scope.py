"""The public schema of when an edit applies: scopes, schedules and conditions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from steer_engine.fields import BlocksField, Finite, Position, Strict, VectorField, by_kind, field_error
from steer_engine.site import Site

ScopeWord = Literal["all", "prompt", "generation", "last_prompt_token", "thinking", "answer", "tool_calls"]
TriggerWord = Literal["thinking", "answer", "tool_calls"]
"""Windows between tags that the server's parsers know."""

SiteField = Annotated[Site, Field(strict=False)]

MAX_TEXT_CHARS = 128
"""Length of a trigger that is given as text."""
MAX_TOKENS = 64
"""The schema's own limit on the tokens of a trigger; `Limits.max_trigger_tokens` is the limit of a server."""
MAX_CONDITIONS = 4
"""Conditions in a list."""
MAX_SCHEDULE_TOKENS = 2**24
MAX_FACTOR = 1000.0
"""Of a schedule. The product with the scale has a limit of its own."""

_EXPECTED_SCOPE = (
    "'all', 'prompt', 'generation', 'last_prompt_token', 'thinking', 'answer', 'tool_calls', {'start': a, 'end': b}, "
    "{'from': 'generation', 'start': a, 'end': b} or {'after': tokens, 'until': tokens}"
)


def _tag_of_tokens(tokens: Any) -> str | None:
    if isinstance(tokens, str):
        return "<text>"
    if isinstance(tokens, list):
        return "<list>"
    return "<number>" if isinstance(tokens, int) and not isinstance(tokens, bool) else None


def _tag_of_exception(scope: Any) -> str | None:
    return "<word>" if isinstance(scope, str) else "<trigger>" if isinstance(scope, dict | TriggerSpec) else None


def _tag_of_scope(scope: Any) -> str | None:
    return "<word>" if isinstance(scope, str) else "<span>" if isinstance(scope, dict | ScopeSpec) else None


def _tag_of_when(when: Any) -> str | None:
    if isinstance(when, dict):
        return "<any>" if "any" in when else "<all>" if "all" in when else "<condition>"
    if isinstance(when, ConditionSpec):
        return "<condition>"
    return "<any>" if isinstance(when, AnySpec) else "<all>" if isinstance(when, AllSpec) else None


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokensField = Annotated[
    Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS), Tag("<text>")]
    | Annotated[TokenId, Tag("<number>")]
    | Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKENS, fail_fast=True), Tag("<list>")],
    by_kind(_tag_of_tokens, "text, a token id, or a list of token ids that follow each other"),
]


class TriggerSpec(Strict):
    """Windows of positions: from the token after `after` up to `until`, whose last token is outside.

    after: opens a window; without it, one window opens at the first token of the prompt. until: closes it. each: open
    one after every occurrence of `after`, not only the first. tokens: length of a window at most.
    """

    after: TokensField | None = None
    until: TokensField | None = None
    each: bool = False
    tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @property
    def is_trigger(self) -> bool:
        return self.after is not None or self.until is not None

    def _check_trigger(self) -> None:
        if self.each and self.after is None:
            raise field_error("each", "each needs 'after', the tokens that open a window")
        if self.tokens is not None and not self.is_trigger:
            raise field_error("tokens", "tokens needs 'after', the tokens that open a window")
        if self.after is not None and self.after == self.until:
            raise field_error("until", "after and until are the same")


class ExceptSpec(TriggerSpec):
    """Windows in which an edit does not apply."""

    @model_validator(mode="after")
    def _check_content(self) -> ExceptSpec:
        self._check_trigger()
        if not self.is_trigger:
            raise ValueError("needs 'after', 'until' or both")
        return self


class ScopeSpec(TriggerSpec):
    """Positions start <= p < end, in the windows of a trigger if `after` or `until` is given.

    start, end: negative numbers count from the end of the prompt, null is open, as in a slice. With `from` set to
    "generation" they count generated tokens: position 0 selects the first one. except: windows that are left out.
    """

    from_: Annotated[Literal["generation"] | None, Field(alias="from")] = None
    start: Position | None = None
    end: Position | None = None
    except_: Annotated[
        Annotated[
            Annotated[TriggerWord, Tag("<word>")] | Annotated[ExceptSpec, Tag("<trigger>")],
            by_kind(_tag_of_exception, "'thinking', 'answer', 'tool_calls', or {'after': tokens, 'until': tokens}"),
        ]
        | None,
        Field(alias="except"),
    ] = None

    @model_validator(mode="after")
    def _check_content(self) -> ScopeSpec:
        self._check_trigger()
        if self.from_ is None:
            return self
        for name, bound in (("start", self.start), ("end", self.end)):
            if bound is not None and bound < 0:
                raise field_error(name, f"{bound} is negative; from the generation, positions count from 0")
        if self.end is not None and self.end <= (self.start or 0):
            raise field_error("end", f"end {self.end} is not above start {self.start or 0}: the scope is empty")
        return self

    def report(self) -> dict[str, Any]:
        """As in an answer: `start` and `end` always, other fields where they are given."""
        given = self.model_dump(by_alias=True, exclude_defaults=True)
        return {"start": self.start, "end": self.end} | given


ScopeField = Annotated[
    Annotated[ScopeWord, Tag("<word>")] | Annotated[ScopeSpec, Tag("<span>")],
    by_kind(_tag_of_scope, _EXPECTED_SCOPE),
]


class ScheduleSpec(Strict):
    """The edit changes over its window: in full at the first token, with the factor `to` from token `over` on."""

    kind: Literal["linear", "exponential"]
    over: Annotated[int, Field(ge=1, le=MAX_SCHEDULE_TOKENS)]
    to: Annotated[Finite, Field(ge=0, le=MAX_FACTOR)]

    @model_validator(mode="after")
    def _check_content(self) -> ScheduleSpec:
        if self.kind == "exponential" and self.to == 0:
            raise field_error("to", "an exponential schedule never reaches 0; use a small number, or kind 'linear'")
        return self


class ConditionSpec(Strict):
    """A number about the prompt is above or below a bound: a cosine or dot product of the stream with a vector.

    site: what is measured in each block, as in an edit: the stream after it, or the output of its attention or MLP;
    before it is edited there. `last_prompt_token` is the mean over `blocks`, `mean_prompt` the mean over blocks and
    tokens, `max_prompt` the largest. Without a bound, the vector's suggested condition applies (`steer-engine condition
    fit`).
    """

    vector: VectorField
    blocks: BlocksField | None = None
    site: SiteField | None = None
    above: Finite | None = None
    below: Finite | None = None
    measure: Literal["cosine", "dot"] | None = None
    at: Literal["last_prompt_token", "mean_prompt", "max_prompt"] | None = None

    @property
    def is_bounded(self) -> bool:
        return self.above is not None or self.below is not None

    @model_validator(mode="after")
    def _check_bounds(self) -> ConditionSpec:
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise field_error("above", f"above {self.above:g} is not less than below {self.below:g}")
        return self


ConditionList = Annotated[list[ConditionSpec], Field(min_length=1, max_length=MAX_CONDITIONS, fail_fast=True)]


class AnySpec(Strict):
    """One of the conditions holds."""

    any: ConditionList


class AllSpec(Strict):
    """All conditions hold."""

    all: ConditionList


WhenField = Annotated[
    Annotated[ConditionSpec, Tag("<condition>")] | Annotated[AnySpec, Tag("<any>")] | Annotated[AllSpec, Tag("<all>")],
    by_kind(_tag_of_when, "a condition {'vector': name, 'above': number}, or {'any': [...]} or {'all': [...]}"),
]


def conditions_of(when: ConditionSpec | AnySpec | AllSpec) -> list[tuple[str, ConditionSpec]]:
    """The conditions, each with its path under `when`."""
    match when:
        case ConditionSpec():
            return [("", when)]
        case AnySpec():
            return [(f".any[{number}]", condition) for number, condition in enumerate(when.any)]
        case AllSpec():
            return [(f".all[{number}]", condition) for number, condition in enumerate(when.all)]
