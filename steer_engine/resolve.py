"""Resolving a spec: names become digests, and every number is checked against the model and the limits.

A spec is resolved exactly once per request, in the API process. The `ResolvedSpec` then travels inside
`SamplingParams.extra_args` to the point where the prompt length is known and the program is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from steer_engine.capture import CaptureRequest
from steer_engine.containment import check_dose, check_growth, check_measurable, check_representable
from steer_engine.edit import Edit, canonical_order
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.fields import parse_blocks, shown
from steer_engine.model_shape import ModelShape, describe_blocks
from steer_engine.probe import Probe, StopRule
from steer_engine.resolve_capture import resolve_capture
from steer_engine.resolve_probes import resolve_probes, resolve_stops
from steer_engine.resolve_rows import check_kind, check_terms, feature_blocks, resolve_gate, resolve_terms
from steer_engine.resolve_vectors import (
    Keep,
    Repeated,
    VectorSource,
    check_blocks,
    check_direction,
    lookup,
    lookup_file,
    site_for,
)
from steer_engine.resolve_when import check_counts, resolve_schedule, resolve_scope, resolve_when
from steer_engine.room import check_room
from steer_engine.scope import WhenField
from steer_engine.settings import Limits
from steer_engine.site import Site
from steer_engine.spec import EditSpec, Op, SteeringSpec
from steer_engine.template import ProgramTemplate
from steer_engine.vectors import ControlVector, RowSet
from steer_engine.vocabulary import Vocabulary

NO_VOCABULARY = Vocabulary(None, 2**31, lambda name: "there is no tokenizer.")
"""Token ids only."""


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
        if edit.site is not Site.BLOCK:
            entry["site"] = edit.site.value
        names = ("lo", "hi", "target", "feature", "add", "degrees", "to_degrees")
        extras = {name: getattr(requested, name) for name in names} | {"toward": edit.toward}
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
    repeated: Repeated[ResolvedSpec] | None = None,
) -> ResolvedSpec:
    """Check `spec` against the model and the limits, and name its vectors by digest.

    vocabulary: for triggers. preset: the name of the preset that `spec` was expanded from. repeated: of calls with the
    same model, limits and vocabulary; None = nothing is kept.

    Raises:
        UnknownVectorError: a vector or the preset is not registered.
        SteeringRequestError: any other error of the request; `param` names the field.
    """

    def anew(source: VectorSource) -> ResolvedSpec:
        return _resolve(spec, source, model, limits, vocabulary, preset)

    if repeated is None or spec.capture is not None:  # each capture has a key of its own
        return anew(vectors)
    return repeated.get((spec.model_dump_json(), preset, vocabulary), vectors, anew)


def _resolve(
    spec: SteeringSpec,
    vectors: VectorSource,
    model: ModelShape,
    limits: Limits,
    vocabulary: Vocabulary,
    preset: str | None,
) -> ResolvedSpec:
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

    def keep(vector: ControlVector) -> ControlVector:
        used[vector.digest] = vector
        return vector

    edits = tuple(
        ResolvedEdit(
            requested=edit,
            edit=_resolve_edit(edit, spec.when, f"steering.edits[{i}]", vectors, keep, model, limits, vocabulary),
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
        lambda site, vector, param: site_for(site, vector, param, model),
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
        num_points=model.num_points,
        bank_rows=model.bank_rows,
        is_pipeline=model.is_pipeline,
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
    keep: Keep,
    model: ModelShape,
    limits: Limits,
    vocabulary: Vocabulary,
) -> Edit:
    """when: the condition of the whole request. keep: gets every vector that the edit needs."""
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
    file = lookup_file(requested.vector, f"{param}.vector", vectors, model)
    check_kind(requested, file, f"{param}.vector")
    site = site_for(requested.site, file, f"{param}.site", model)
    blocks = parse_blocks(requested.blocks)
    blocks = feature_blocks(requested, file, blocks, param) if isinstance(file, RowSet) else blocks or file.blocks
    check_blocks(blocks, file, f"{param}.blocks", model)
    toward, terms = resolve_terms(requested, file, blocks, param, vectors, keep, model, limits)
    edit = Edit(
        op=requested.op,
        vector=file.digest,
        toward=None if toward is None else toward.digest,
        blocks=blocks,
        scales=_scales(requested, file, blocks, param) if isinstance(file, ControlVector) else (1.0,) * len(blocks),
        site=site,
        parts=terms.parts if terms else (),
        growth=terms.growth if terms else (),
        scope=resolve_scope(requested.scope, f"{param}.scope", vocabulary, limits),
        lo=requested.target if requested.op is Op.SET else requested.lo,
        hi=requested.target if requested.op is Op.SET else requested.hi,
        gate=resolve_gate(requested, blocks, param, vectors, keep, model),
        schedule=resolve_schedule(requested.schedule),
        when=resolve_when(
            requested.when or when,
            f"{param}.when" if requested.when else "steering.when",
            blocks[-1],
            lambda name, param: keep(_deciding(name, param, vectors, model)),
            lambda site, vector, param: site_for(site, vector, param, model),
            lambda vector, blocks, param: _check_measured(vector, blocks, param, model),
        ),
    )
    if terms is not None and isinstance(file, RowSet):
        check_terms(terms, requested, blocks, file, param, limits)
    if isinstance(file, ControlVector) and terms is None:
        keep(file)
        if edit.op is not Op.ADD:
            check_direction(file, blocks, f"{param}.vector")
        check_representable(edit, file, param, model.dtype, limits)
        check_dose(edit, file, param, limits)
    return edit


def _measurable(what: str, name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector:
    """The vector of a condition or probe. what: these. param: path of the one that names it."""
    if model.ops == (Op.ADD,):
        raise SteeringRequestError(f"{what} need more than op 'add' armed (--steering-ops).", param)
    return lookup(name, f"{param}.vector", vectors, model)


def _deciding(name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector:
    """The vector of a condition: a decision made in a late stage of a pipeline would have to reach the early ones."""
    if model.is_pipeline:
        raise SteeringRequestError("Conditions are not supported with pipeline parallelism.", param)
    return _measurable("Conditions", name, param, vectors, model)


def _check_measured(vector: ControlVector, blocks: tuple[int, ...], param: str, model: ModelShape) -> None:
    check_blocks(blocks, vector, param, model)
    check_direction(vector, blocks, param)
    check_measurable(vector, blocks, param, model.dtype)


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
    check_direction(vector, blocks, f"{param}.vector")
    return tuple(float(requested.scale) * norms[block] / vector.norms[block] for block in blocks)
