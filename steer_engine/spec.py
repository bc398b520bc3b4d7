"""The public schema of a request's `steering` field. `steer_engine.parse` reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from steer_engine.fields import (
    BlocksField,
    Finite,
    InlineVector,
    Name,
    Position,
    Strict,
    VectorField,
    by_kind,
    field_error,
)
from steer_engine.probe_spec import MAX_PROBES, MAX_STOPS, ProbeSpec, StopSpec
from steer_engine.scope import AnySpec, ConditionSpec, ScheduleSpec, ScopeField, SiteField, WhenField, conditions_of
from steer_engine.site import Site

MAX_EDITS = 1024
"""The schema's own limit; `Limits.max_edits` is the limit of a server."""
MAX_SPEC_CHARS = 65_536
"""Length of a spec as JSON text. Eight edits that list every block fit."""
MAX_POSITIONS = 1024
"""Token positions that a capture may list."""


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
    FEATURE = "feature"
    """Change the activation of features of a sparse autoencoder."""
    LOW_RANK = "low_rank"
    """x + scale * R^T (W x + b - R x): the edit that LoReFT trains."""
    ROTATE = "rotate"
    """Rotate x in the plane of two vectors."""


DIRECTIONAL = (Op.ADD, Op.ADD_RELATIVE, Op.ABLATE, Op.CLAMP, Op.SET)
"""Operations with the one direction per block of a control vector."""


FeatureNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""The number of a feature in its dictionary."""
MAX_FEATURES = 64
"""The schema's own limit of the features of an edit; `Limits.max_rank` is the limit of a server."""


class Gate(Strict):
    """Apply an edit only where cos(x, vector) is in [min_cos, max_cos], or <x, vector> in [min_dot, max_dot].

    feature: the vector is a file of features; min_dot and max_dot bound <x, e> + b of this one, e its encoder row.
    """

    vector: Name
    feature: FeatureNumber | None = None
    min_cos: Annotated[Finite, Field(ge=-1, le=1)] | None = None
    max_cos: Annotated[Finite, Field(ge=-1, le=1)] | None = None
    min_dot: Finite | None = None
    max_dot: Finite | None = None

    @property
    def is_dot(self) -> bool:
        return self.min_dot is not None or self.max_dot is not None

    @model_validator(mode="after")
    def _check_bounds(self) -> Gate:
        is_cosine = self.min_cos is not None or self.max_cos is not None
        if is_cosine and self.is_dot:
            raise ValueError("a gate tests the cosine (min_cos, max_cos) or the dot product (min_dot, max_dot)")
        if not is_cosine and not self.is_dot:
            raise ValueError("a gate needs min_cos or max_cos, or min_dot or max_dot")
        if self.feature is not None and is_cosine:
            raise field_error("feature", "a gate on a feature needs min_dot or max_dot")
        for low, high in (("min_cos", "max_cos"), ("min_dot", "max_dot")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise field_error(low, f"{low} {least:g} is above {high} {most:g}")
        return self


def _tag_of_feature(feature: Any) -> str | None:
    if isinstance(feature, list):
        return "<list>"
    return "<number>" if isinstance(feature, int) and not isinstance(feature, bool) else None


FeatureField = Annotated[
    Annotated[FeatureNumber, Tag("<number>")]
    | Annotated[list[FeatureNumber], Field(min_length=1, max_length=MAX_FEATURES, fail_fast=True), Tag("<list>")],
    by_kind(_tag_of_feature, "the number of a feature, or a list of numbers"),
]


def _tag_of_positions(positions: Any) -> str | None:
    return "<word>" if isinstance(positions, str) else "<list>" if isinstance(positions, list) else None


PositionsField = Annotated[
    Annotated[Literal["last", "mean", "all"], Tag("<word>")]
    | Annotated[list[Position], Field(min_length=1, max_length=MAX_POSITIONS, fail_fast=True), Tag("<list>")],
    by_kind(_tag_of_positions, "'last', 'mean', 'all', or a list of token positions (negative: from the end)"),
]


Degrees = Annotated[Finite, Field(ge=-360, le=360)]


class EditSpec(Strict):
    """One edit: `op` with `vector` at `blocks`, over the positions of `scope`.

    site: what is edited in each block: its output ("block"), or the output of its attention ("attn") or of its MLP
    ("mlp") before this is added to the residual stream. The operator must have armed the site. Default: the site that
    the vector was derived at, which is "block" for most.

    scale: for op add in units of the vector, or in mean residual norms of the block with `unit: "residual"`; for
    add_relative in norms of the same row; for ablate the fraction to remove; for feature a factor on the activation;
    for low_rank a factor on the whole edit. schedule: a factor that changes over the window of the scope. when: apply
    the edit only if the prompt meets a condition; from the last prompt token on.

    feature: with op feature, the numbers of the features whose activation is set to `target`, multiplied by `scale` or
    increased by `add`; the part of x that the dictionary does not explain stays. toward: with op rotate, the vector
    that spans the plane with `vector`; x turns by `degrees` from `vector` toward it, or to the angle `to_degrees`.
    """

    vector: VectorField
    scale: Finite = 1.0
    op: Annotated[Op, Field(strict=False)] = Op.ADD
    unit: Literal["vector", "residual"] = "vector"
    blocks: BlocksField = "all"
    site: SiteField | None = None
    scope: ScopeField = "all"
    gate: Gate | None = None
    schedule: ScheduleSpec | None = None
    when: WhenField | None = None
    lo: Finite | None = None
    hi: Finite | None = None
    target: Finite | None = None
    feature: FeatureField | None = None
    add: Finite | None = None
    toward: VectorField | None = None
    degrees: Degrees | None = None
    to_degrees: Degrees | None = None

    @property
    def features(self) -> tuple[int, ...]:
        """The numbers of the features, each once, in the given order."""
        given = [self.feature] if isinstance(self.feature, int) else self.feature or []
        return tuple(dict.fromkeys(given))

    @model_validator(mode="after")
    def _check_operation_fields(self) -> EditSpec:
        op = self.op.value
        self._check_feature()
        self._check_rotation()
        if self.op is Op.CLAMP:
            if self.lo is None and self.hi is None:
                raise field_error("lo", "op 'clamp' needs lo, hi or both")
            if self.lo is not None and self.hi is not None and self.lo > self.hi:
                raise field_error("lo", f"lo {self.lo:g} is above hi {self.hi:g}")
        elif self.lo is not None or self.hi is not None:
            raise field_error("hi" if self.lo is None else "lo", f"lo and hi apply to op 'clamp', not to {op!r}")
        if self.op is Op.SET and self.target is None:
            raise field_error("target", "op 'set' needs a target")
        if self.op not in (Op.SET, Op.FEATURE) and self.target is not None:
            raise field_error("target", f"target applies to op 'set' and 'feature', not to {op!r}")
        if self.op in (Op.CLAMP, Op.SET, Op.ROTATE) and self.scale != 1.0:
            raise field_error("scale", f"op {op!r} takes no scale")
        if self.unit == "residual" and self.op is not Op.ADD:
            raise field_error("unit", f"unit 'residual' applies to op 'add', not to {op!r}")
        if self.schedule is not None and self.scope == "last_prompt_token":
            raise field_error("schedule", "the scope 'last_prompt_token' is one token; a schedule needs a window")
        if self.schedule is not None and self.op in (Op.CLAMP, Op.SET) and self.schedule.to > 1:
            raise field_error("schedule", f"op {op!r} moves the component by a share of at most 1; 'to' is above it")
        if self.schedule is not None and self.op in (Op.FEATURE, Op.LOW_RANK) and self.schedule.to > 1:
            raise field_error("schedule", f"op {op!r} changes x by a share of at most 1; 'to' is above it")
        if self.schedule is not None and self.op is Op.ROTATE:
            raise field_error("schedule", "a part of a rotation is no rotation; op 'rotate' takes no schedule")
        return self

    def _check_feature(self) -> None:
        if self.op is not Op.FEATURE:
            if self.feature is not None or self.add is not None:
                name = "add" if self.feature is None else "feature"
                raise field_error(name, f"{name} applies to op 'feature', not to {self.op.value!r}")
            return
        if self.feature is None:
            raise field_error("feature", "op 'feature' needs the number of a feature, or a list of numbers")
        if sum([self.target is not None, self.add is not None, self.scale != 1.0]) != 1:
            raise ValueError("op 'feature' needs one of target, add and a scale other than 1 (0 removes the feature)")

    def _check_rotation(self) -> None:
        given = {"toward": self.toward, "degrees": self.degrees, "to_degrees": self.to_degrees}
        if self.op is not Op.ROTATE:
            for name, value in given.items():
                if value is not None:
                    raise field_error(name, f"{name} applies to op 'rotate', not to {self.op.value!r}")
            return
        if self.toward is None:
            raise field_error("toward", "op 'rotate' needs a second vector, toward which it turns")
        if (self.degrees is None) == (self.to_degrees is None):
            raise ValueError("op 'rotate' needs degrees (an angle to turn by) or to_degrees (an angle to turn to)")


class CaptureSpec(Strict):
    """Return the residual stream of the request's tokens. The operator must have enabled capture.

    blocks: "all" means every block that the server captures. site: what is captured in each block, as in an edit; the
    operator must have armed it. scope: "prompt"; "generation", one row for each token of the answer: the position that
    chose it; or "all", both. positions: of the scope; "mean" is one row, the mean of all; token numbers are for the
    prompt only. Default: "last" in the prompt, else "all". after: capture x after its edits instead of before them.
    """

    blocks: BlocksField = "all"
    site: SiteField = Site.BLOCK
    scope: Literal["prompt", "generation", "all"] = "prompt"
    positions: PositionsField | None = None
    after: bool = False

    @model_validator(mode="after")
    def _check_positions(self) -> CaptureSpec:
        if self.scope != "prompt" and isinstance(self.positions, list):
            raise field_error("positions", "token numbers apply to scope 'prompt'; use 'all', 'mean' or 'last'")
        return self


class SteeringSpec(Strict):
    """The `steering` field of a request: edits in order, or the name of a preset.

    when: a condition of every edit. `probes` and `capture` may be added to either, or stand alone. stop: rules on the
    numbers of probes that end the answer.
    """

    edits: Annotated[list[EditSpec], Field(min_length=1, max_length=MAX_EDITS, fail_fast=True)] | None = None
    preserve_norm: bool = False
    when: WhenField | None = None
    preset: Name | None = None
    probes: Annotated[list[ProbeSpec], Field(min_length=1, max_length=MAX_PROBES, fail_fast=True)] | None = None
    stop: Annotated[list[StopSpec], Field(min_length=1, max_length=MAX_STOPS, fail_fast=True)] | None = None
    capture: CaptureSpec | None = None

    @model_validator(mode="after")
    def _check_content(self) -> SteeringSpec:
        both = self.edits is not None and self.preset is not None
        alone = self.probes is None and self.capture is None and self.edits is None and self.preset is None
        if both or alone:
            raise ValueError("specify either edits or the name of a preset")
        if self.stop is not None and self.probes is None and self.preset is None:
            raise field_error("stop", "stop rules need probes")
        if self.edits is None and self.preset is None and self.preserve_norm:
            raise field_error("preserve_norm", "has no effect without edits")
        if self.preset is not None and self.preserve_norm:
            raise field_error("preserve_norm", "the preset itself specifies preserve_norm")
        if self.when is not None and self.edits is None:
            raise field_error("when", "has no effect without edits; a preset specifies its own conditions")
        if self.when is not None and any(edit.when is not None for edit in self.edits or ()):
            raise field_error("when", "is given for the request and for an edit; use one of them")
        return self


def vectors_in(spec: SteeringSpec) -> Iterator[str | InlineVector]:
    """Every vector that a spec names or contains, in its edits, gates, conditions and probes."""
    yield from (probe.vector for probe in spec.probes or ())
    for holder in (spec, *(spec.edits or ())):
        if isinstance(holder, EditSpec):
            yield holder.vector
            if holder.toward is not None:
                yield holder.toward
            if holder.gate is not None:
                yield holder.gate.vector
        if holder.when is not None:
            yield from (condition.vector for _, condition in conditions_of(holder.when))


def with_vectors(spec: SteeringSpec, name_of: Callable[[str | InlineVector, str], str]) -> SteeringSpec:
    """`spec` with every vector of its edits, conditions and probes replaced by a name.

    name_of: called with a vector and the path of the object that has it; only where there is an inline vector at all.
    """

    def conditions(when: Any, param: str) -> Any:
        if isinstance(when, ConditionSpec):
            return when.model_copy(update={"vector": name_of(when.vector, param)})
        name = "any" if isinstance(when, AnySpec) else "all"
        replaced = [conditions(each, f"{param}.{name}[{number}]") for number, each in enumerate(getattr(when, name))]
        return when.model_copy(update={name: replaced})

    if not any(isinstance(vector, InlineVector) for vector in vectors_in(spec)):
        return spec
    replaced = []
    for number, edit in enumerate(spec.edits or ()):
        param = f"steering.edits[{number}]"
        update: dict[str, Any] = {"vector": name_of(edit.vector, param)}
        if edit.toward is not None:
            update["toward"] = name_of(edit.toward, param)
        if edit.when is not None:
            update["when"] = conditions(edit.when, f"{param}.when")
        replaced.append(edit.model_copy(update=update))
    probes = [
        probe.model_copy(update={"vector": name_of(probe.vector, f"steering.probes[{number}]")})
        for number, probe in enumerate(spec.probes or ())
    ]
    changed: dict[str, Any] = {"edits": replaced or None, "probes": probes or None}
    changed["when"] = None if spec.when is None else conditions(spec.when, "steering.when")
    return spec.model_copy(update=changed)
