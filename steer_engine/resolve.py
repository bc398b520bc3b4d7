"""From what a request says to what it means: names become digests, every number is checked against the model.

After this a name cannot come to mean something else, and nothing that a client wrote is left unchecked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from steer_engine.capture import PARAM, Positions
from steer_engine.containment import check_dose, check_held
from steer_engine.edit import ALL, GENERATION, PROMPT, Edit, GateBounds, Scope, canonical_order, sha256_of
from steer_engine.errors import SteeringRequestError, UnknownVectorError
from steer_engine.program import ProgramTemplate
from steer_engine.settings import Limits
from steer_engine.spec import CaptureSpec, EditSpec, Op, Span, SteeringSpec, parse_blocks, shown
from steer_engine.vectors import ControlVector

MAX_RUNS_SHOWN = 8

VectorSource = Callable[[str], ControlVector]
"""Name or `sha256:...` digest -> vector; raises UnknownVectorError."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The facts of a served model that a spec is checked against."""

    hidden_size: int
    num_blocks: int
    armed_blocks: tuple[int, ...]
    ops: tuple[Op, ...]
    rows: int
    dtype: str
    """The stream's dtype: "float32", "float16" or "bfloat16"."""
    bank_rows: int | None = None
    """Rows of a bank that can be full; None where every request finds room."""
    capture_blocks: tuple[int, ...] = ()
    """Where the stream can be read; empty where reading is off."""


@dataclass(frozen=True, kw_only=True)
class ResolvedEdit:
    """What was asked, and what it is."""

    asked: EditSpec
    edit: Edit

    def report(self) -> dict[str, Any]:
        """What the answer says about this edit."""
        asked, edit = self.asked, self.edit
        named = isinstance(asked.vector, str) and not asked.vector.startswith("sha256:")
        entry: dict[str, Any] = {"name": asked.vector} if named else {}
        entry |= {
            "vector": edit.vector,
            "op": asked.op.value,
            "scale": asked.scale,
            "unit": asked.unit,
            "blocks": list(edit.blocks),
            "scope": asked.scope if isinstance(asked.scope, str) else asked.scope.model_dump(),
            "digest": edit.digest,
        }
        extras = {"lo": asked.lo, "hi": asked.hi, "target": asked.target}
        entry |= {key: value for key, value in extras.items() if value is not None}
        if asked.gate is not None and edit.gate is not None:
            entry["gate"] = asked.gate.model_dump(exclude_none=True) | {"vector": edit.gate.vector}
        return entry

    def by_digest(self) -> EditSpec:
        """The same request with vectors named by content and blocks spelled out."""
        update: dict[str, Any] = {"vector": self.edit.vector, "blocks": list(self.edit.blocks)}
        if self.asked.gate is not None and self.edit.gate is not None:
            update["gate"] = self.asked.gate.model_copy(update={"vector": self.edit.gate.vector})
        return self.asked.model_copy(update=update)


@dataclass(frozen=True, kw_only=True)
class ResolvedCapture:
    """What is to be read, its blocks checked."""

    blocks: tuple[int, ...]
    positions: Positions
    after: bool

    def report(self) -> dict[str, Any]:
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        return {"blocks": list(self.blocks), "positions": positions, "after": self.after}


@dataclass(frozen=True, kw_only=True)
class ResolvedSpec:
    """A whole spec, resolved. Specs that steer alike have one digest, whatever their vectors are called."""

    edits: tuple[ResolvedEdit, ...]
    preserve_norm: bool = False
    preset: str | None = None
    capture: ResolvedCapture | None = None
    template: ProgramTemplate = field(repr=False)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Digests of the vectors that an engine needs for this spec, sorted."""
        return self.template.vectors

    @cached_property
    def digest(self) -> str:
        placed = [[edit.digest, edit.scope.wire] for edit in self.template.edits]
        return sha256_of([placed, self.preserve_norm and bool(placed)])

    def to_wire(self) -> str:
        """The edits by digests only, as compact JSON: what travels to the compile step, which reads it as a spec."""
        spec = SteeringSpec(edits=[edit.by_digest() for edit in self.edits], preserve_norm=self.preserve_norm)
        return spec.model_dump_json(exclude_defaults=True)

    def report(self) -> dict[str, Any]:
        """The `steering` object of an answer's body; edits that do nothing are left out."""
        body: dict[str, Any] = {"digest": self.digest}
        if self.preset is not None:
            body["preset"] = self.preset
        body["edits"] = [edit.report() for edit in self.edits if not edit.edit.does_nothing]
        return body if self.capture is None else body | {"capture": self.capture.report()}


def resolve(
    spec: SteeringSpec, vectors: VectorSource, model: ModelShape, limits: Limits, *, preset: str | None = None
) -> ResolvedSpec:
    """Check `spec` against the model and the limits, and name its vectors by content.

    Raises:
        UnknownVectorError: a vector or the preset is not registered.
        SteeringRequestError: anything else that the request asks wrongly; `param` says where.
    """
    if spec.preset is not None:
        raise UnknownVectorError(f"There is no preset named {shown(spec.preset)}.", "steering.preset")
    asked = spec.edits or []
    if len(asked) > limits.max_edits:
        raise SteeringRequestError(
            f"{len(asked)} edits asked, at most {limits.max_edits} are allowed in one request.", "steering.edits"
        )
    if spec.preserve_norm and model.ops == (Op.ADD,):
        raise SteeringRequestError(
            "Preserving norms needs more than op 'add' armed (--steering-ops).", "steering.preserve_norm"
        )
    edits = tuple(
        ResolvedEdit(asked=edit, edit=_resolve_edit(edit, f"steering.edits[{i}]", vectors, model, limits))
        for i, edit in enumerate(asked)
    )
    canonical = canonical_order([edit.edit for edit in edits])
    template = ProgramTemplate.compile(canonical, keep_norm=spec.preserve_norm)
    if len(template.vectors) > limits.max_request_vectors:
        raise SteeringRequestError(
            f"The edits name {len(template.vectors)} different vectors; one request may name at most "
            f"{limits.max_request_vectors}.",
            "steering.edits",
        )
    if template.rows > model.rows:
        raise SteeringRequestError(
            f"The edits need {template.rows} rows at one block; this server has room for {model.rows} "
            "(--steering-rows). Give edits of op 'add' the same scope, or fewer edits the same blocks.",
            "steering.edits",
        )
    if model.bank_rows is not None and template.num_bank_rows > model.bank_rows:
        raise SteeringRequestError(
            f"The edits need {template.num_bank_rows} rows over all blocks; this server's bank has {model.bank_rows} "
            "(--steering-bank-rows). Steer at fewer blocks, or by fewer vectors.",
            "steering.edits",
        )
    return ResolvedSpec(
        edits=edits,
        preserve_norm=spec.preserve_norm,
        preset=preset,
        capture=resolve_capture(spec.capture, model),
        template=template,
    )


def resolve_capture(asked: CaptureSpec | None, model: ModelShape) -> ResolvedCapture | None:
    """Check what is to be read against what this engine reads.

    Raises:
        SteeringRequestError: reading is off, or off at these blocks.
    """
    if asked is None:
        return None
    if not model.capture_blocks:
        raise SteeringRequestError(
            "Reading the residual stream is switched off on this server (--steering-capture).", PARAM
        )
    blocks = parse_blocks(asked.blocks) or model.capture_blocks
    unread = tuple(sorted(set(blocks) - set(model.capture_blocks)))
    if unread:
        raise SteeringRequestError(
            f"Blocks {describe_blocks(unread)} cannot be read here; these can: "
            f"{describe_blocks(model.capture_blocks)} (--steering-capture).",
            f"{PARAM}.blocks",
        )
    positions = asked.positions if isinstance(asked.positions, str) else tuple(asked.positions)
    return ResolvedCapture(blocks=blocks, positions=positions, after=asked.after)


def _resolve_edit(asked: EditSpec, param: str, vectors: VectorSource, model: ModelShape, limits: Limits) -> Edit:
    if asked.op not in model.ops:
        armed = ", ".join(op.value for op in model.ops)
        raise SteeringRequestError(
            f"Operation {asked.op.value!r} is not armed here; armed: {armed} (--steering-ops).", f"{param}.op"
        )
    if asked.gate is not None and model.ops == (Op.ADD,):
        raise SteeringRequestError("Gates need more than op 'add' armed (--steering-ops).", f"{param}.gate")
    if abs(asked.scale) > limits.max_abs_scale:
        raise SteeringRequestError(
            f"scale {asked.scale:g} is out of bounds: |scale| may be at most {limits.max_abs_scale:g}.",
            f"{param}.scale",
        )
    if not isinstance(asked.vector, str):
        raise SteeringRequestError("Inline vectors are not supported by this server yet.", f"{param}.vector")
    vector = _lookup(asked.vector, f"{param}.vector", vectors, model)
    blocks = parse_blocks(asked.blocks) or vector.blocks
    _check_blocks(blocks, vector, f"{param}.blocks", model)
    edit = Edit(
        op=asked.op,
        vector=vector.digest,
        blocks=blocks,
        scales=_scales(asked, vector, blocks, param),
        scope=_scope(asked.scope),
        lo=asked.target if asked.op is Op.SET else asked.lo,
        hi=asked.target if asked.op is Op.SET else asked.hi,
        gate=_gate(asked, blocks, param, vectors, model),
    )
    if edit.op is not Op.ADD:
        _check_direction(vector, blocks, f"{param}.vector")
    check_held(edit, vector, param, model.dtype, limits)
    check_dose(edit, vector, param, limits)
    return edit


def _gate(
    asked: EditSpec, blocks: tuple[int, ...], param: str, vectors: VectorSource, model: ModelShape
) -> GateBounds | None:
    if asked.gate is None:
        return None
    vector = _lookup(asked.gate.vector, f"{param}.gate.vector", vectors, model)
    _check_blocks(blocks, vector, f"{param}.gate.vector", model)
    _check_direction(vector, blocks, f"{param}.gate.vector")
    bounds = {"min_cos": asked.gate.min_cos, "max_cos": asked.gate.max_cos}
    return GateBounds(vector=vector.digest, **{key: value for key, value in bounds.items() if value is not None})


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
    unarmed = tuple(sorted(set(blocks) - set(model.armed_blocks)))
    if unarmed:
        raise SteeringRequestError(
            f"Blocks {describe_blocks(unarmed)} are not armed here; armed: {describe_blocks(model.armed_blocks)} "
            "(--steering-blocks).",
            param,
        )
    absent = tuple(sorted(set(blocks) - set(vector.blocks)))
    if absent:
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


def _scales(asked: EditSpec, vector: ControlVector, blocks: tuple[int, ...], param: str) -> tuple[float, ...]:
    if asked.unit == "vector":
        return (float(asked.scale),) * len(blocks)
    norms = vector.metadata.residual_norms
    unknown = tuple(block for block in blocks if not norms.get(block))
    if unknown:
        raise SteeringRequestError(
            f"unit 'residual' needs the residual norms of blocks {describe_blocks(unknown)}, which the vector's "
            "file does not carry.",
            f"{param}.unit",
        )
    _check_direction(vector, blocks, f"{param}.vector")
    return tuple(float(asked.scale) * norms[block] / vector.norms[block] for block in blocks)


def _scope(scope: str | Span) -> Scope:
    if isinstance(scope, Span):
        return Scope.span(scope.start, scope.end)
    return {"all": ALL, "prompt": PROMPT, "generation": GENERATION}[scope]


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
