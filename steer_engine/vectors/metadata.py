"""What is known about a control vector besides its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from steer_engine.errors import VectorFileError

MAX_BLOCKS = 1024
"""More blocks than any known model has; bounds block numbers, and with them headers and allocations."""

MAX_HIDDEN_SIZE = 65536
"""Four times the widest known residual stream."""

MAX_TEXT = 1024
"""Characters of one short field, such as a model's name."""

MAX_NOTES = 16384
"""Characters of the free text."""

MAX_EXTRA = 64
"""Entries of `extra` and of `created_with`."""

Text = Annotated[str, Field(max_length=MAX_TEXT)]
Key = Annotated[str, Field(min_length=1, max_length=128)]
Block = Annotated[int, Field(ge=0, lt=MAX_BLOCKS)]


class VectorMetadata(BaseModel):
    """Provenance and calibration of a control vector. Empty text and None mean "not known".

    residual_norms: block -> mean Euclidean norm of a token row of the residual stream there, measured where the vector
        was derived. It is what `unit: "residual"` multiplies, so it counts as content (it enters the digest).
    separation: block -> how often the direction there, derived from other pairs, ranked a positive above a negative
        (AUROC; 0.5 is chance).
    explained_variance: block -> share of the squared differences of the pairs that lies along the direction.
    dataset_digest: "sha256:..." of the contrast pairs.
    created_with: package -> version.
    extra: keys of other tools, kept as they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: Text = ""
    architecture: Text = ""
    hidden_size: Annotated[int, Field(ge=1, le=MAX_HIDDEN_SIZE)] | None = None
    num_blocks: Annotated[int, Field(ge=1, le=MAX_BLOCKS)] | None = None
    method: Text = ""
    position: Text = ""
    residual_norms: dict[Block, float] = Field(default_factory=dict)
    separation: dict[Block, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    explained_variance: dict[Block, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
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
        """Build from untrusted fields; VectorFileError names the first field that is wrong."""
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise VectorFileError(f"The vector's metadata field {where!r} is not usable: {first['msg']}.") from None

    def joined(self, other: VectorMetadata) -> VectorMetadata:
        """Metadata of a sum of two vectors; symmetric. What both agree on stays, the rest becomes "not known".

        Residual norms of a block that both measured are averaged: each estimates the same property of the model.
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
