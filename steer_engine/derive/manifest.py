"""What an activation dump is: whose rows, of which texts, read how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer_engine.derive.stored_dtype import StoredDType
from steer_engine.errors import DerivationError

NAME = "manifest.json"


class Manifest(BaseModel):
    """`manifest.json` of a dump folder, written before its first shard.

    blocks: sites, ascending; block l = the output of block l, from 0. dataset: digest of the texts. weights: digest of
    the checkpoint, or its commit on a hub. edits: rows are read before any edit of their block, and nothing is edited.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["activation-dump"] = "activation-dump"
    format_version: Literal[1] = 1
    model: str
    weights: str
    architecture: str
    hidden_size: Annotated[int, Field(ge=1)]
    num_blocks: Annotated[int, Field(ge=1)]
    blocks: Annotated[list[int], Field(min_length=1)]
    dtype: str
    stored: StoredDType
    position: str
    chat: bool
    edits: Literal["none"] = "none"
    dataset: str
    source: str
    num_texts: Annotated[int, Field(ge=2)]
    paired: bool
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        return self.model_dump_json(indent=2).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DerivationError(f"{where}: not the manifest of a dump ({field}: {first['msg']}).") from None

    def require_same(self, other: Manifest, where: str) -> None:
        """Raise DerivationError unless `other` would write the same rows; names the first field that differs."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name != "source" and mine != theirs:
                raise DerivationError(
                    f"{where} is the dump of something else: its {name} is {str(mine)[:120]}, now it would be "
                    f"{str(theirs)[:120]}. Choose another folder, or repeat the first run's settings to resume it."
                )
