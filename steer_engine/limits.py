"""Limits with names: each can be set by the environment, and `GET /v1/steering` publishes all of them."""

from __future__ import annotations

import os
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from steer_engine.errors import UnsupportedEngineError

PREFIX = "STEER_ENGINE_"


class NamedLimits(BaseModel):
    """A group of limits; `STEER_ENGINE_MAX_EDITS=4` in the environment sets the field `max_edits`, and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def variable(cls, name: str) -> str:
        """The environment variable of a field."""
        return PREFIX + name.upper()

    @classmethod
    def from_environment(cls) -> Self:
        """Defaults, and what the environment says otherwise. Raises UnsupportedEngineError for a bad number."""
        named = {name: os.environ.get(cls.variable(name)) for name in cls.model_fields}
        try:
            return cls.model_validate({name: value for name, value in named.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            raise UnsupportedEngineError(f"{cls.variable(str(first['loc'][0]))}: {first['msg']}.") from None
