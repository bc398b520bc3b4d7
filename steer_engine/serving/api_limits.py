"""How much a client may send; `GET /v1/steering` publishes every number."""

from __future__ import annotations

from pydantic import Field

from steer_engine.limits import NamedLimits


class ApiLimits(NamedLimits):
    """Of one API process."""

    max_body_bytes: int = Field(default=64 * 2**20, ge=1)
    """Body of any request; vLLM itself has no limit."""
    max_upload_bytes: int = Field(default=64 * 2**20, ge=1)
    """Body of a vector that is put: 80 blocks of 8192 are 2.6 MB."""
    max_uploads: int = Field(default=4, ge=1)
    """Uploads at once; another one is asked to come again."""
    max_bank_queue: int = Field(default=256, ge=1)
    """Steered requests that may wait in the engine before the next one is sent away; where the bank is smaller than all
    requests could need (--steering-bank-rows)."""
