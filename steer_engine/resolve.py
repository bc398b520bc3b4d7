"""Resolving a spec: names become digests, and every number is checked against the model and the limits.

A spec is resolved exactly once per request, in the API process. The `ResolvedSpec` then travels inside
`SamplingParams.extra_args` to the point where the prompt length is known and the program is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from steer_engine.capture import CaptureRequest
from steer_engine.containment import check_dose, check_growth, check_measurable, check_representable
from steer_engine.edit import Edit, GateBounds, canonical_order
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.fields import parse_blocks, shown
from steer_engine.model_shape import ModelShape, describe_blocks
from steer_engine.probe import Probe, StopRule
from steer_engine.resolve_capture import resolve_capture
from steer_engine.resolve_probes import resolve_probes, resolve_stops
from steer_engine.resolve_when import check_counts, resolve_schedule, resolve_scope, resolve_when
from steer_engine.room import check_room
from steer_engine.scope import WhenField
from steer_engine.settings import Limits
from steer_engine.spec import EditSpec, Op, SteeringSpec
from steer_engine.template import ProgramTemplate
from steer_engine.vectors import ControlVector
from steer_engine.vocabulary import Vocabulary

NO_VOCABULARY = Vocabulary(None, 2**31, lambda name: "there is no tokenizer.")
"""Token ids only."""

VectorSource = Callable[[str], ControlVector]
"""Name or `sha256:...` digest -> vector. Raises UnknownVectorError."""


@dataclass(frozen=True, kw_only=True)
class ResolvedEdit:
    """One edit as requested, and as resolved."""

    requested: EditSpec
    edit: Edit

    def report(self) -> dict[str, Any]:
        """This edit in the `steering` object of an answer."""
        requested, edit = self.requested, self.edit
        named = isinstance(requested.vector, str) and not requested.vector.startswith("sha256:")
        entry: dict[str, Any] = {"name": requested.vector} if named else {}
        entry |= {
            "vector": edit.vector,
            "op": requested.op.value,
            "scale": requested.scale,
            "unit": requested.unit,
            "blocks": list(edit.blocks),
            "scope": requested.scope if isinstance(requested.scope, str) else requested.scope.report(),
            "digest": edit.digest,
        }
        extras = {"lo": requested.lo, "hi": requested.hi, "target": requested.target}
        entry |= {key: value for key, value in extras.items() if value is not None}
        if requested.gate is not None and edit.gate is not None:
            entry["gate"] = requested.gate.model_dump(exclude_none=True) | {"vector": edit.gate.vector}
        if requested.schedule is not None:
            entry["schedule"] = requested.schedule.model_dump()
        return entry


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedSpec:
    """A whole spec, resolved. Specs that steer alike have equal digests, whatever their vectors are called.

    num_preset_probes: so many of the probes, the first ones, are the preset's.
    vectors: every vector that an engine needs, by digest; kept with the request, so that no cache can evict them
        before they are shipped.
    """

    edits: tuple[ResolvedEdit, ...] = ()
    preserve_norm: bool = False
    preset: str | None = None
    num_preset_probes: int = 0
    capture: CaptureRequest | None = None
    template: ProgramTemplate = field(default_factory=lambda: ProgramTemplate.compile(()), repr=False)
    vectors: Mapping[str, ControlVector] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> ResolvedSpec:
        """vLLM copies the sampling parameters of each request; a resolved spec never changes, so it is shared."""
        return self

    @property
    def digest(self) -> str:
        return self.template.digest

    def without_numbers(self) -> ResolvedSpec:
        """The same edits and stop rules, for an answer that has no place for the numbers of probes.

        The digest stays the same. Probes that no stop rule needs are not measured.
        """
        stops = self.template.stops
        probes = tuple(probe._replace(returns="none") for probe in self.template.probes) if stops else ()
        edits = tuple(each.edit for each in self.edits)
        template = _template(edits, self.preserve_norm, probes, stops)
        return replace(self, template=template, vectors={digest: self.vectors[digest] for digest in template.vectors})

    def report(self) -> dict[str, Any]:
        """The `steering` object of an answer. Edits without effect are left out.

        `applied.Applied` adds what was done: `applied_tokens` of each edit, `value` and `held` of each condition.
        """
        body: dict[str, Any] = {"digest": self.digest}
        if self.preset is not None:
            body["preset"] = self.preset
        body["edits"] = [edit.report() for edit in self.edits if not edit.edit.does_nothing]
        if conditions := self.template.conditions:
            body["conditions"] = [condition.report() for condition in conditions]
            for entry, edit in zip(body["edits"], (e.edit for e in self.edits if not e.edit.does_nothing), strict=True):
                if edit.when is not None:
                    asked = [conditions.index(each) for each in edit.when.conditions if each in conditions]
                    entry["when"] = {"any" if edit.when.any else "all": asked}
        if self.template.probes:
            body["probes"] = [probe.report() for probe in self.template.probes]
        return body if self.capture is None else body | {"capture": self.capture.report()}


def resolve(
    spec: SteeringSpec,
    vectors: VectorSource,
    model: ModelShape,
    limits: Limits,
    *,
    vocabulary: Vocabulary = NO_VOCABULARY,
    preset: str | None = None,
) -> ResolvedSpec:
    """Check `spec` against the model and the limits, and name its vectors by digest.

    vocabulary: for triggers. preset: the name of the preset that `spec` was expanded from.

    Raises:
        UnknownVectorError: a vector or the preset is not registered.
        SteeringRequestError: any other error of the request; `param` names the field.
    """
    if spec.preset is not None:
        raise UnknownVectorError(f"There is no preset named {shown(spec.preset)}.", "steering.preset")
    requested = spec.edits or []
    if len(requested) > limits.max_edits:
        raise SteeringRequestError(
            f"{len(requested)} edits requested; one request may have at most {limits.max_edits}.", "steering.edits"
        )
    if spec.preserve_norm and model.ops == (Op.ADD,):
        raise SteeringRequestError(
            "preserve_norm needs more than op 'add' armed (--steering-ops).", "steering.preserve_norm"
        )
    used: dict[str, ControlVector] = {}

    def lookup(name: str) -> ControlVector:
        vector = vectors(name)
        used[vector.digest] = vector
        return vector

    edits = tuple(
        ResolvedEdit(
            requested=edit,
            edit=_resolve_edit(edit, spec.when, f"steering.edits[{i}]", lookup, model, limits, vocabulary),
        )
        for i, edit in enumerate(requested)
    )
    base = ResolvedSpec(
        edits=edits,
        preserve_norm=spec.preserve_norm,
        preset=preset,
        capture=resolve_capture(spec.capture, model, limits),
        vectors=used,
    )
    return with_probes(base, spec, vectors, model, limits, vocabulary=vocabulary)


def with_probes(
    base: ResolvedSpec,
    spec: SteeringSpec,
    vectors: VectorSource,
    model: ModelShape,
    limits: Limits,
    *,
    vocabulary: Vocabulary = NO_VOCABULARY,
) -> ResolvedSpec:
    """`base` with the probes and stop rules of `spec` added to its own, and its program compiled.

    Raises:
        UnknownVectorError, SteeringRequestError: as `resolve`.
    """
    used = dict(base.vectors)

    def lookup(name: str, param: str) -> ControlVector:
        vector = _measurable("Probes", name, param, vectors, model)
        used[vector.digest] = vector
        return vector

    probes = resolve_probes(
        spec.probes or (),
        lookup,
        lambda vector, blocks, param: _check_measured(vector, blocks, param, model),
        limits,
        vocabulary,
        base.template.probes,
    )
    stops = (*base.template.stops, *resolve_stops(spec.stop or (), probes))
    edits = tuple(each.edit for each in base.edits)
    check_counts(edits, probes, limits)
    template = _template(edits, base.preserve_norm, probes, stops)
    check_room(
        template,
        rows=model.rows,
        num_armed_blocks=len(model.armed_blocks),
        bank_rows=model.bank_rows,
        limits=limits,
    )
    named = {digest: used[digest] for digest in template.vectors}
    check_growth(template.edits, named, preserve_norm=base.preserve_norm, dtype=model.dtype)
    return replace(base, template=template, vectors=named)


@lru_cache(maxsize=512)
def _template(
    edits: tuple[Edit, ...], keep_norm: bool, probes: tuple[Probe, ...], stops: tuple[StopRule, ...]
) -> ProgramTemplate:
    """Kept for the specs that came last: most requests repeat one, and each digest is computed once."""
    return ProgramTemplate.compile(canonical_order(edits), keep_norm=keep_norm, probes=probes, stops=stops)


def _resolve_edit(
    requested: EditSpec,
    when: WhenField | None,
    param: str,
    vectors: VectorSource,
    model: ModelShape,
    limits: Limits,
    vocabulary: Vocabulary,
) -> Edit:
    """when: the condition of the whole request."""
    if requested.op not in model.ops:
        armed = ", ".join(op.value for op in model.ops)
        raise SteeringRequestError(
            f"Operation {requested.op.value!r} is not armed here; armed: {armed} (--steering-ops).", f"{param}.op"
        )
    if requested.gate is not None and model.ops == (Op.ADD,):
        raise SteeringRequestError("Gates need more than op 'add' armed (--steering-ops).", f"{param}.gate")
    if abs(requested.scale) > limits.max_abs_scale:
        raise SteeringRequestError(
            f"scale {requested.scale:g} is out of bounds: |scale| may be at most {limits.max_abs_scale:g}.",
            f"{param}.scale",
        )
    assert isinstance(requested.vector, str), "inline vectors are registered and named by digest before"
    vector = _lookup(requested.vector, f"{param}.vector", vectors, model)
    blocks = parse_blocks(requested.blocks) or vector.blocks
    _check_blocks(blocks, vector, f"{param}.blocks", model)
    edit = Edit(
        op=requested.op,
        vector=vector.digest,
        blocks=blocks,
        scales=_scales(requested, vector, blocks, param),
        scope=resolve_scope(requested.scope, f"{param}.scope", vocabulary, limits),
        lo=requested.target if requested.op is Op.SET else requested.lo,
        hi=requested.target if requested.op is Op.SET else requested.hi,
        gate=_gate(requested, blocks, param, vectors, model),
        schedule=resolve_schedule(requested.schedule),
        when=resolve_when(
            requested.when or when,
            f"{param}.when" if requested.when else "steering.when",
            blocks[-1],
            lambda name, param: _deciding(name, param, vectors, model),
            lambda vector, blocks, param: _check_measured(vector, blocks, param, model),
        ),
    )
    if edit.op is not Op.ADD:
        _check_direction(vector, blocks, f"{param}.vector")
    check_representable(edit, vector, param, model.dtype, limits)
    check_dose(edit, vector, param, limits)
    return edit


def _gate(
    requested: EditSpec, blocks: tuple[int, ...], param: str, vectors: VectorSource, model: ModelShape
) -> GateBounds | None:
    if requested.gate is None:
        return None
    vector = _lookup(requested.gate.vector, f"{param}.gate.vector", vectors, model)
    _check_blocks(blocks, vector, f"{param}.gate.vector", model)
    _check_direction(vector, blocks, f"{param}.gate.vector")
    bounds = {"min_cos": requested.gate.min_cos, "max_cos": requested.gate.max_cos}
    return GateBounds(vector=vector.digest, **{key: value for key, value in bounds.items() if value is not None})


def _measurable(what: str, name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector:
    """The vector of a condition or probe. what: these. param: path of the one that names it."""
    if model.ops == (Op.ADD,):
        raise SteeringRequestError(f"{what} need more than op 'add' armed (--steering-ops).", param)
    return _lookup(name, f"{param}.vector", vectors, model)


def _deciding(name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector:
    """The vector of a condition: a decision made in a late stage of a pipeline would have to reach the early ones."""
    if model.is_pipeline:
        raise SteeringRequestError("Conditions are not supported with pipeline parallelism.", param)
    return _measurable("Conditions", name, param, vectors, model)


def _check_measured(vector: ControlVector, blocks: tuple[int, ...], param: str, model: ModelShape) -> None:
    _check_blocks(blocks, vector, param, model)
    _check_direction(vector, blocks, param)
    check_measurable(vector, blocks, param, model.dtype)


def _lookup(name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector:
    try:
        vector = vectors(name)
    except SteeringRequestError as error:  # unknown, or a row set
        raise type(error)(error.message, param) from None
    if vector.hidden_size != model.hidden_size:
        raise SteeringRequestError(
            f"Vector {shown(name)} has hidden size {vector.hidden_size}, the model has "
            f"{model.hidden_size}: it was made for another model.",
            param,
        )
    return vector


def _check_blocks(blocks: tuple[int, ...], vector: ControlVector, param: str, model: ModelShape) -> None:
    if blocks[-1] >= model.num_blocks:
        raise SteeringRequestError(
            f"Block {blocks[-1]} does not exist: the model has blocks 0 to {model.num_blocks - 1}.", param
        )
    wanted = frozenset(blocks)
    if unarmed := tuple(sorted(wanted - model.armed)):
        raise SteeringRequestError(
            f"Blocks {describe_blocks(unarmed)} are not armed here; armed: {describe_blocks(model.armed_blocks)} "
            "(--steering-blocks).",
            param,
        )
    if absent := tuple(sorted(wanted - vector.directions.keys())):
        raise SteeringRequestError(
            f"The vector has no direction at blocks {describe_blocks(absent)}; it has "
            f"{describe_blocks(vector.blocks)}.",
            param,
        )


def _check_direction(vector: ControlVector, blocks: tuple[int, ...], param: str) -> None:
    flat = tuple(block for block in blocks if vector.norms[block] == 0.0)
    if flat:
        raise SteeringRequestError(
            f"The vector is zero at blocks {describe_blocks(flat)}: it has no direction there.", param
        )


def _scales(requested: EditSpec, vector: ControlVector, blocks: tuple[int, ...], param: str) -> tuple[float, ...]:
    if requested.unit == "vector":
        return (float(requested.scale),) * len(blocks)
    norms = vector.metadata.residual_norms
    unknown = tuple(block for block in blocks if not norms.get(block))
    if unknown:
        raise SteeringRequestError(
            f"unit 'residual' needs the residual norms of blocks {describe_blocks(unknown)}, which the vector's "
            "file does not carry.",
            f"{param}.unit",
        )
    _check_direction(vector, blocks, f"{param}.vector")
    return tuple(float(requested.scale) * norms[block] / vector.norms[block] for block in blocks)
