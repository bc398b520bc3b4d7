"""Resolving a spec: names become digests, and every number is checked against the model and the limits.

A spec is resolved exactly once per request, in the API process. The `ResolvedSpec` then travels inside
`SamplingParams.extra_args` to the point where the prompt length is known and the program is compiled.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from steer_engine.capture import PARAM, CaptureRequest
from steer_engine.containment import check_dose, check_growth, check_measurable, check_representable
from steer_engine.edit import Edit, GateBounds, canonical_order
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.fields import parse_blocks, shown
from steer_engine.resolve_when import check_counts, resolve_schedule, resolve_scope, resolve_when
from steer_engine.scope import WhenField
from steer_engine.settings import Limits
from steer_engine.spec import CaptureSpec, EditSpec, Op, SteeringSpec
from steer_engine.template import ProgramTemplate
from steer_engine.vectors import ControlVector
from steer_engine.vocabulary import Vocabulary

MAX_RUNS_SHOWN = 8

NO_VOCABULARY = Vocabulary(None, 2**31, lambda name: "there is no tokenizer.")
"""Token ids only."""

VectorSource = Callable[[str], ControlVector]
"""Name or `sha256:...` digest -> vector. Raises UnknownVectorError."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The facts about a served model that a spec is checked against."""

    hidden_size: int
    num_blocks: int
    armed_blocks: tuple[int, ...]
    ops: tuple[Op, ...]
    rows: int
    """Bank rows that one request may need per block."""
    dtype: str
    """Of the residual stream: "float32", "float16" or "bfloat16"."""
    bank_rows: int | None = None
    """Rows of a bank that can fill up; None if the bank has room for every request."""
    capture_blocks: tuple[int, ...] = ()
    """Where the stream can be captured; empty if capture is off."""
    is_pipeline: bool = False
    """The blocks are spread over the stages of a pipeline."""
    deals_rows_on_device: bool = False
    """The device decides how many drafts of each request a step verifies: the host does not know whose a row is."""

    @cached_property
    def armed(self) -> frozenset[int]:
        return frozenset(self.armed_blocks)


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

    vectors: every vector that an engine needs, by digest; kept with the request, so that no cache can evict them
        before they are shipped.
    """

    edits: tuple[ResolvedEdit, ...] = ()
    preserve_norm: bool = False
    preset: str | None = None
    capture: CaptureRequest | None = None
    template: ProgramTemplate = field(default_factory=lambda: ProgramTemplate.compile(()), repr=False)
    vectors: Mapping[str, ControlVector] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> ResolvedSpec:
        """vLLM copies the sampling parameters of each request; a resolved spec never changes, so it is shared."""
        return self

    @property
    def digest(self) -> str:
        return self.template.digest

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
    check_counts((edit.edit for edit in edits), limits)
    template = _template(tuple(edit.edit for edit in edits), spec.preserve_norm)
    _check_room(template, model, limits)
    named = {digest: used[digest] for digest in template.vectors}
    check_growth(template.edits, named, preserve_norm=spec.preserve_norm, dtype=model.dtype)
    return ResolvedSpec(
        edits=edits,
        preserve_norm=spec.preserve_norm,
        preset=preset,
        capture=resolve_capture(spec.capture, model, limits),
        template=template,
        vectors=named,
    )


@lru_cache(maxsize=512)
def _template(edits: tuple[Edit, ...], keep_norm: bool) -> ProgramTemplate:
    """Kept for the specs that came last: most requests repeat one, and each digest is computed once."""
    return ProgramTemplate.compile(canonical_order(edits), keep_norm=keep_norm)


def resolve_capture(requested: CaptureSpec | None, model: ModelShape, limits: Limits) -> CaptureRequest | None:
    """Check a capture against what this engine captures, and give it a key.

    Raises:
        SteeringRequestError: capture is off on this server, or at these blocks.
    """
    if requested is None:
        return None
    if not model.capture_blocks:
        raise SteeringRequestError("Capture is switched off on this server (--steering-capture).", PARAM)
    check_rows_known(model)
    blocks = parse_blocks(requested.blocks) or model.capture_blocks
    missing = tuple(sorted(set(blocks) - set(model.capture_blocks)))
    if missing:
        raise SteeringRequestError(
            f"Blocks {describe_blocks(missing)} cannot be captured here; available: "
            f"{describe_blocks(model.capture_blocks)} (--steering-capture).",
            f"{PARAM}.blocks",
        )
    row_bytes = 4 * model.hidden_size * len(blocks)  # float32
    positions = requested.positions or ("last" if requested.scope == "prompt" else "all")
    return CaptureRequest(
        key=uuid.uuid4().hex,
        positions=positions if isinstance(positions, str) else tuple(positions),
        scope=requested.scope,
        blocks=blocks,
        after=requested.after,
        max_rows=limits.max_capture_bytes // row_bytes,
    )


def check_rows_known(model: ModelShape) -> None:
    """Raise SteeringRequestError where a captured row could be that of another request."""
    if model.deals_rows_on_device:
        raise SteeringRequestError(
            "Nothing can be captured with enable_adaptive_verification: only the device knows whose each row is. Use a "
            "server without it in its speculative configuration.",
            PARAM,
        )


def _check_room(template: ProgramTemplate, model: ModelShape, limits: Limits) -> None:
    if len(template.vectors) > limits.max_request_vectors:
        raise SteeringRequestError(
            f"The edits name {len(template.vectors)} different vectors; one request may name at most "
            f"{limits.max_request_vectors}.",
            "steering.edits",
        )
    if template.rows > model.rows:
        raise SteeringRequestError(
            f"The edits need {template.rows} rows at one block; this server has room for {model.rows} "
            "(--steering-rows). Each edit takes a row, each gate vector and each condition one more; neighbouring "
            "edits of op 'add' with the same scope share a row. Give edits of op 'add' the same scope, or fewer edits "
            "the same blocks.",
            "steering.edits",
        )
    if model.bank_rows is not None and template.num_bank_rows > model.bank_rows:
        raise SteeringRequestError(
            f"The edits need {template.num_bank_rows} rows over all blocks; this server's bank has {model.bank_rows} "
            "(--steering-bank-rows). Steer at fewer blocks, or with fewer vectors.",
            "steering.edits",
        )


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
            lambda name, param: _measurable(name, param, vectors, model),
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


def _measurable(name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector:
    """The vector of a condition. param: path of the condition."""
    if model.ops == (Op.ADD,):
        raise SteeringRequestError("Conditions need more than op 'add' armed (--steering-ops).", param)
    if model.is_pipeline:
        raise SteeringRequestError("Conditions are not supported with pipeline parallelism.", param)
    return _lookup(name, f"{param}.vector", vectors, model)


def _check_measured(vector: ControlVector, blocks: tuple[int, ...], param: str, model: ModelShape) -> None:
    _check_blocks(blocks, vector, param, model)
    _check_direction(vector, blocks, param)
    check_measurable(vector, blocks, param, model.dtype)


def _lookup(name: str, param: str, vectors: VectorSource, model: ModelShape) -> ControlVector:
    try:
        vector = vectors(name)
    except UnknownVectorError as error:
        raise UnknownVectorError(error.message, param) from None
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


def describe_blocks(blocks: tuple[int, ...]) -> str:
    """`(0, 1, 2, 5)` as "0-2, 5"; the first MAX_RUNS_SHOWN runs of them."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    shown_runs = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:MAX_RUNS_SHOWN]]
    return ", ".join(shown_runs) + (f" and {len(runs) - MAX_RUNS_SHOWN} more" if len(runs) > MAX_RUNS_SHOWN else "")
