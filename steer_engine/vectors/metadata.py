"""Metadata of a control vector, and its form as text in files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from steer_engine.errors import ModelMismatchError, VectorFileError
from steer_engine.fields import shown
from steer_engine.probe import Platt
from steer_engine.site import Site

MAX_BLOCKS = 1024
"""More blocks than any known model has. Limits block numbers, headers and allocations."""

MAX_HIDDEN_SIZE = 65536
"""Four times the widest known residual stream."""

MAX_TEXT = 1024
"""Characters of a short field, such as a model's name."""

MAX_NOTES = 16384
"""Characters of the free text field."""

MAX_EXTRA = 64
"""Entries of `extra` and of `created_with`."""

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Key = Annotated[str, Field(min_length=1, max_length=128)]
Block = Annotated[int, Field(ge=0, lt=MAX_BLOCKS)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]

Measure = Literal["cosine", "dot"]
"""The number of one prompt token: cos(x, v), or <x, v> with v as it is in the file."""

At = Literal["last_prompt_token", "mean_prompt", "max_prompt"]
"""Which prompt tokens the value of a condition covers: the last one, the mean over all, or the largest of all."""


ProbeAt = Literal["last_prompt_token", "mean_prompt", "every_prompt_token"]
"""Which rows of a prompt a probe is trained on: the last token's, the mean of all, or each token's."""

HeldOut = dict[Literal["positive", "negative"], Annotated[int, Field(ge=0, lt=2**31)]]
"""Class -> number of prompts that a quality was measured on."""


class FittedCondition(BaseModel):
    """When to steer: a threshold on the projection of the prompt's residual stream, fitted to prompts of two classes.

    It holds for a prompt if the value is above `above` and below `below`. It is valid for exactly these directions.

    blocks: where the value is measured, ascending; each has a direction. f1, precision, recall, accuracy, auroc:
        measured on held-out prompts that neither the blocks nor the threshold were chosen on.
    held_out: class -> number of those prompts. chat: the prompts were in the model's chat template.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    blocks: Annotated[tuple[Block, ...], Field(strict=False, min_length=1, max_length=MAX_BLOCKS)]
    measure: Measure
    at: At
    above: Number | None = None
    below: Number | None = None
    f1: Share | None = None
    precision: Share | None = None
    recall: Share | None = None
    accuracy: Share | None = None
    auroc: Share | None = None
    held_out: HeldOut = Field(default_factory=dict)
    chat: bool = False

    @model_validator(mode="after")
    def _check(self) -> FittedCondition:
        if list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"the blocks {shown(str(list(self.blocks)))} are not ascending")
        if self.above is None and self.below is None:
            raise ValueError("a condition needs above or below")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"nothing is above {self.above:g} and below {self.below:g}")
        return self

    def when(self, vector: str) -> dict[str, Any]:
        """The value of `when` in a request. vector: the vector's name on the server."""
        fields = self.model_dump(include={"measure", "at", "above", "below"}, exclude_none=True)
        return {"vector": vector, "blocks": list(self.blocks), **fields}

    def __str__(self) -> str:
        bounds = [f"{name} {value:g}" for name in ("above", "below") if (value := getattr(self, name)) is not None]
        blocks = f"block{'s' if len(self.blocks) > 1 else ''} {', '.join(map(str, self.blocks))}"
        known = "" if self.f1 is None else f"; held-out F1 {self.f1:.3f}"
        counts = f" of {sum(self.held_out.values())} prompts" if known and self.held_out else ""
        return f"{self.measure} {' and '.join(bounds)} at {self.at}, {blocks}{known}{counts}"


def _require_object(value: object) -> object:
    if not isinstance(value, Platt | dict):
        raise ValueError("it is not an object with a and b")
    return value


StoredPlatt = Annotated[
    Platt,
    BeforeValidator(_require_object),
    PlainSerializer(lambda platt: platt._asdict(), return_type=dict[str, float]),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        }
    ),
]
"""In files an object, `{"a": 1.5, "b": -2.0}`."""


class ProbeBlock(BaseModel):
    """How to read the number `<x, v>` of one block.

    threshold: the probe fires above it. platt: calibration of the number; None if it was not calibrated.
    auroc, true_positive_rate, false_positive_rate: measured on held-out prompts, the rates at the threshold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    auroc: Share | None = None
    threshold: Number | None = None
    true_positive_rate: Share | None = None
    false_positive_rate: Share | None = None
    platt: StoredPlatt | None = None


class FittedProbe(BaseModel):
    """A trained probe: its directions were fitted to prompts of two classes. It is valid for exactly these directions.

    blocks: block -> how to read its number; ascending.
    at: the tokens that it was trained on: the last one of a prompt, the mean over all, or each token by itself.
    target_false_positive_rate: share of negatives above the threshold that was asked for.
    held_out: class -> number of prompts that the quality was measured on. chat: they were in the model's chat template.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    blocks: Annotated[dict[Block, ProbeBlock], Field(min_length=1, max_length=MAX_BLOCKS)]
    at: ProbeAt
    target_false_positive_rate: Share | None = None
    held_out: HeldOut = Field(default_factory=dict)
    chat: bool = False

    @field_validator("blocks", mode="before")
    @classmethod
    def _numbers(cls, blocks: object) -> object:
        """The keys of a JSON object are text."""
        if not isinstance(blocks, Mapping):
            return blocks
        numbered = {
            _block_key(key, "blocks of the probe") if isinstance(key, str) else key: each
            for key, each in blocks.items()
        }
        return dict(sorted(numbered.items()))

    def at_blocks(self, blocks: Iterable[int]) -> FittedProbe | None:
        """The probe at some of its blocks; None if it has none of them."""
        kept = {block: each for block in sorted(set(blocks)) if (each := self.blocks.get(block)) is not None}
        return self.model_copy(update={"blocks": kept}) if kept else None

    def __str__(self) -> str:
        areas = {block: each.auroc for block, each in self.blocks.items() if each.auroc is not None}
        blocks = f"{len(self.blocks)} block{'s' if len(self.blocks) > 1 else ''}, trained on {self.at}"
        if not areas:
            return blocks
        best = max(areas, key=lambda block: areas[block])
        counts = f" of {sum(self.held_out.values())} prompts" if self.held_out else ""
        return f"{blocks}; held-out AUROC up to {areas[best]:.3f} (block {best}){counts}"


class VectorMetadata(BaseModel):
    """Provenance and calibration of a control vector. Empty text and None mean "unknown".

    site: where it was derived, and where it applies unless a request says otherwise; so it is content and part of the
        digest. "block" is the stream after a block.
    residual_norms: block -> mean Euclidean norm of a token row of the residual stream there, measured while the
        vector was derived. `unit: "residual"` multiplies by it, so it is content and part of the digest. Of the stream
        after the block for every site.
    separation: block -> AUROC of the direction on pairs it was not derived from: how often it ranked a positive above a
        negative (0.5 is chance).
    explained_variance: block -> share of the squared differences of the pairs that lies along the direction.
    condition: when to steer, fitted to prompts by `steer-engine condition fit`; None if it was not.
    probe: thresholds and calibration of a vector that `steer-engine probe fit` trained; None for others.
    dataset_digest: "sha256:..." of the contrast pairs.
    created_with: package -> version.
    extra: keys of other tools, unchanged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: Text = ""
    architecture: Text = ""
    hidden_size: Annotated[int, Field(ge=1, le=MAX_HIDDEN_SIZE)] | None = None
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)] | None = None
    method: Text = ""
    position: Text = ""
    site: Annotated[Site, Field(strict=False)] = Site.BLOCK
    residual_norms: dict[Block, float] = Field(default_factory=dict)
    separation: dict[Block, Share] = Field(default_factory=dict)
    explained_variance: dict[Block, Share] = Field(default_factory=dict)
    condition: FittedCondition | None = None
    probe: FittedProbe | None = None
    dataset_digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    created_with: Annotated[dict[Key, Text], Field(max_length=MAX_EXTRA)] = Field(default_factory=dict)
    notes: Annotated[str, Field(max_length=MAX_NOTES)] = ""
    extra: Annotated[dict[Key, Text], Field(max_length=MAX_EXTRA)] = Field(default_factory=dict)

    @field_validator("residual_norms")
    @classmethod
    def _finite_and_sorted(cls, norms: dict[int, float]) -> dict[int, float]:
        for block, norm in norms.items():
            if not (math.isfinite(norm) and norm > 0.0):
                raise ValueError(f"the residual norm of block {block} is {norm}; it must be positive and finite")
        return dict(sorted(norms.items()))

    @field_validator("separation", "explained_variance")
    @classmethod
    def _sorted(cls, shares: dict[int, float]) -> dict[int, float]:
        return dict(sorted(shares.items()))

    @classmethod
    def checked(cls, fields: Mapping[str, object]) -> VectorMetadata:
        """Build from untrusted fields. Raises VectorFileError, which names the first invalid field."""
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            first = error.errors()[0]
            where = shown(".".join(str(part) for part in first["loc"]))
            raise VectorFileError(f"The vector's metadata field {where} is not usable: {first['msg']}.") from None

    def joined(self, other: VectorMetadata) -> VectorMetadata:
        """Metadata of a sum of two vectors of one site; symmetric. Equal fields stay, other fields become unknown.

        Residual norms that both have for a block are averaged, because both estimate the same property of the model.
        Condition and probe are left out, because the sum has other directions than those that they were fitted for.
        """
        mine, theirs = self.residual_norms, other.residual_norms
        norms = {
            block: 0.5 * mine.get(block, theirs.get(block, 0.0)) + 0.5 * theirs.get(block, mine.get(block, 0.0))
            for block in mine.keys() | theirs.keys()
        }
        return VectorMetadata(
            model=_agreed(self.model, other.model),
            architecture=_agreed(self.architecture, other.architecture),
            hidden_size=self.hidden_size if self.hidden_size == other.hidden_size else None,
            num_blocks=self.num_blocks if self.num_blocks == other.num_blocks else None,
            method=_agreed(self.method, other.method),
            position=_agreed(self.position, other.position),
            site=self.site,
            residual_norms=norms,
            separation=self.separation if self.separation == other.separation else {},
            explained_variance=self.explained_variance if self.explained_variance == other.explained_variance else {},
            dataset_digest=_agreed(self.dataset_digest, other.dataset_digest),
            created_with=dict(sorted(self.created_with.items() & other.created_with.items())),
            notes=_agreed(self.notes, other.notes),
            extra=dict(sorted(self.extra.items() & other.extra.items())),
        )


def _agreed(mine: str, theirs: str) -> str:
    return mine if mine == theirs else ""


FORMAT = "control-vector"
FORMAT_VERSION = "1"
ROW_SET_VERSION = "2"
"""Format version of files with a row set."""

BLOCK_FIELDS = ("residual_norms", "separation", "explained_variance")
JSON_FIELDS = (*BLOCK_FIELDS, "condition", "probe", "created_with", "extra")
NUMBER_FIELDS = ("hidden_size", "num_blocks")
TEXT_FIELDS = ("model", "architecture", "method", "position", "site", "dataset_digest", "notes")


def require_fit(
    noun: str, part: str, width: int, last_block: int, metadata: VectorMetadata, *, hidden_size: int, num_blocks: int
) -> None:
    """Raise ModelMismatchError unless a vector or row set fits a model of this width and depth.

    noun, part: what the message calls it, and what it has for a block. width: its hidden size.
    """
    made_for = f"it was made for {shown(metadata.model) if metadata.model else 'another model'}."
    if width != hidden_size:
        raise ModelMismatchError(f"The {noun} has hidden size {width} but the model has {hidden_size}; {made_for}")
    if last_block >= num_blocks:
        raise ModelMismatchError(
            f"The {noun} has {part} for block {last_block} but the model's last is {num_blocks - 1}; {made_for}"
        )


def metadata_to_text(metadata: VectorMetadata, version: str = FORMAT_VERSION) -> dict[str, str]:
    """The `__metadata__` map, text to text. Unknown fields are left out; mappings are written as JSON."""
    text = {"format": FORMAT, "format_version": version}
    for name, value in metadata.model_dump(exclude_none=True).items():
        if name in JSON_FIELDS:
            if value:
                entries = {str(key): entry for key, entry in value.items()}
                text[name] = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
        elif value != "" and (name != "site" or value is not Site.BLOCK):
            text[name] = str(value)
    return text


def format_version(text: Any) -> str:
    """The version of a file by its `__metadata__`. Raises VectorFileError if it is not a file of this format."""
    if not isinstance(text, dict) or not all(isinstance(value, str) for value in text.values()):
        raise VectorFileError("The file's `__metadata__` is missing or is not a map of text to text.")
    if text.get("format") != FORMAT:
        raise VectorFileError(f"The file's metadata does not say `format: {FORMAT}`; this is not a control vector.")
    found: str = text.get("format_version", "none")
    if found not in (FORMAT_VERSION, ROW_SET_VERSION):
        raise VectorFileError(
            f"Format version {found[:32]!r} is not supported; this release reads {FORMAT_VERSION!r} and "
            f"{ROW_SET_VERSION!r}."
        )
    return found


def metadata_from_text(text: Any, version: str = FORMAT_VERSION) -> VectorMetadata:
    """Inverse of `metadata_to_text`. Other keys are kept in `extra`. Raises VectorFileError."""
    if (found := format_version(text)) != version:
        wanted, is_one = (
            ("a control vector is needed", "features or a low-rank edit")
            if version == FORMAT_VERSION
            else ("features or a low-rank edit are needed", "a control vector")
        )
        raise VectorFileError(f"The file contains {is_one} (format version {found}), but {wanted}.")
    fields: dict[str, Any] = {name: text[name] for name in TEXT_FIELDS if name in text}
    for name in NUMBER_FIELDS:
        if name in text:
            if re.fullmatch(r"[0-9]{1,9}", text[name]) is None:
                raise VectorFileError(f"The metadata field {name} is {text[name][:32]!r}; a whole number is needed.")
            fields[name] = int(text[name])
    for name in JSON_FIELDS:
        if name in text:
            fields[name] = parse_json_object(text[name], f"the metadata field {name}")
    for name in BLOCK_FIELDS:
        if name in fields:
            fields[name] = {_block_key(key, name): _as_float(value) for key, value in fields[name].items()}
    foreign = text.keys() - {"format", "format_version", *TEXT_FIELDS, *NUMBER_FIELDS, *JSON_FIELDS}
    if foreign:
        fields["extra"] = {**{name: text[name] for name in sorted(foreign)}, **fields.get("extra", {})}
    return VectorMetadata.checked(fields)


def parse_json_object(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys, NaN and infinity. Raises VectorFileError; `what` names the text."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise VectorFileError(f"{what.capitalize()} has the same key twice.")
        return found

    def no_constant(name: str) -> NoReturn:
        raise VectorFileError(f"{what.capitalize()} has the value {name}, which is not valid JSON.")

    try:
        parsed = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except VectorFileError:
        raise
    except (ValueError, RecursionError):  # broken JSON, an integer of thousands of digits, deep nesting
        raise VectorFileError(f"{what.capitalize()} is not valid JSON.") from None
    if not isinstance(parsed, dict):
        raise VectorFileError(f"{what.capitalize()} is not a JSON object.")
    return parsed


def _block_key(key: str, name: str) -> int:
    if re.fullmatch(r"0|[1-9][0-9]{0,3}", key) is None:
        raise VectorFileError(f"The metadata's {name} contain block {key[:32]!r}, which is not a block number.")
    return int(key)


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int and abs(value) < 2**53 else value
