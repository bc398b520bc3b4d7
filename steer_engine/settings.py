"""All settings: the names of the environment variables, what an engine is armed for, and all limits."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from steer_engine.errors import UnsupportedEngineError
from steer_engine.fields import parse_blocks
from steer_engine.site import SITES_IN_BLOCKS, Site, all_points
from steer_engine.spec import MAX_SPEC_CHARS, Op

# Environment variables of a server. `serve` sets most of them from its flags, so that every process inherits them.

ARMED_ENV = "STEER_ENGINE"
"""1 arms every engine with all defaults, without flags."""
VECTORS_ENV = "STEER_ENGINE_VECTORS"
"""Folder of control vectors and presets."""
STRICT_ENV = "STEER_ENGINE_STRICT"
"""1: refuse to start if a file of the folder is unusable."""
DEFAULT_PRESET_ENV = "STEER_ENGINE_DEFAULT_PRESET"
"""Preset for requests that do not mention steering."""
MONITORS_ENV = "STEER_ENGINE_MONITORS"
"""Monitors of a server, separated by spaces; each as in `--steering-monitor`."""
MIRROR_URL_ENV = "STEER_ENGINE_MIRROR"
"""URL that the folder of vectors is kept in sync with."""
MIRROR_SECONDS_ENV = "STEER_ENGINE_MIRROR_SECONDS"
"""Mirror polling interval in seconds."""
ADMIN_KEYS_ENV = "STEER_ENGINE_ADMIN_KEYS"
"""Admin keys of a server, separated by commas. Two at once let an operator replace one while the other works."""
ADMIN_KEY_FILE_ENV = "STEER_ENGINE_ADMIN_KEY_FILE"
"""A file with one admin key per line, read again whenever it changes."""
WITH_PARENT_ENV = "STEER_ENGINE_END_WITH_PARENT"
"""1: processes that this one starts end when it ends. Set by `serve` and `batch`."""

# Environment variables of commands.

URL_ENV = "STEER_ENGINE_URL"
"""The server that `vectors`, `presets` and `status` talk to."""
ADMIN_KEY_ENV = "STEER_ENGINE_ADMIN_KEY"
"""Key for changes to the registry of that server."""
API_KEY_ENVS = ("STEER_ENGINE_API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY")
"""Key for requests to that server; the first one that is set counts."""
CACHE_ENV = "STEER_ENGINE_CACHE"
"""Folder for converted packaged models."""
ACCEPT_LICENSE_ENV = "STEER_ENGINE_ACCEPT_LICENSE"
"""Packaged models whose licence the user accepts: names, separated by commas."""

CONFIG_KEY = "steer_engine"
"""Key of our settings in vLLM's `additional_config`, which reaches every process and enters the compile-cache key."""

ALL_OPS = tuple(Op)

PIN_SECONDS = 60.0
"""An engine keeps a vector this long after it was shipped or named: its request may not be scheduled yet."""


class SteeringConfig(BaseModel):
    """What an engine is armed for. Only settings that change the compiled graph or device memory belong here.

    blocks: `"all"`, `"8-22"` or a list: blocks that can be steered.
    sites: where edits, probes, conditions and captures may apply besides the outputs of these blocks: "attn", "mlp"
        (default: nowhere else). A model without such a point is refused at startup.
    ops: operations that a request may use. `("add",)` compiles to a graph without reductions.
    rows: bank rows (and program entries) that one request may need per block and site, after adds are merged.
    bank_rows: total rows of the bank. Default: enough for all requests at once. With fewer, requests wait in the
        scheduler.
    capture: blocks whose residual stream, and outputs at the sites, can be captured (empty: none).
    fuse_norm: edit inside the add-and-norm that follows a block, where the model has one (Triton devices). This
        saves one launch per block, but unsteered output then equals plain vLLM's within rounding, not bit for bit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: str | tuple[int, ...] = "all"
    sites: tuple[Site, ...] = ()
    ops: tuple[Op, ...] = ALL_OPS
    rows: int = Field(default=4, ge=1, le=16)
    bank_rows: int | None = Field(default=None, ge=1)
    capture: str | tuple[int, ...] = ()
    fuse_norm: bool = False

    @field_validator("ops")
    @classmethod
    def _some_operation(cls, ops: tuple[Op, ...]) -> tuple[Op, ...]:
        if not ops:
            raise ValueError("at least one operation must be armed; the smallest set is ['add']")
        return tuple(op for op in Op if op in ops)

    @field_validator("sites")
    @classmethod
    def _in_blocks(cls, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in SITES_IN_BLOCKS if site in sites)

    @property
    def adds_only(self) -> bool:
        return self.ops == (Op.ADD,)

    def armed_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The armed block numbers of a model with `num_blocks` blocks, ascending."""
        return _select(self.blocks, num_blocks, "--steering-blocks")

    def armed_points(self, num_blocks: int) -> tuple[int, ...]:
        """The points of the armed blocks at all armed sites, ascending."""
        return all_points(self.armed_blocks(num_blocks), self.sites)

    def capture_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The blocks whose stream can be captured, ascending; a subset of the armed blocks."""
        if self.capture == ():
            return ()
        wanted = _select(self.capture, num_blocks, "capture blocks")
        unarmed = set(wanted) - set(self.armed_blocks(num_blocks))
        if unarmed:
            raise UnsupportedEngineError(
                f"Capture is requested at blocks {sorted(unarmed)}, which are not armed (--steering-blocks)."
            )
        return wanted

    def probe_room(self, num_points: int) -> tuple[int, int]:
        """Probes of a request at one point, and numbers of a token over all points, at most. An engine for op "add"
        alone measures nothing.
        """
        if self.adds_only:
            return 0, 0
        limits = Limits.from_environment()
        return limits.max_probes, min(limits.max_probes * num_points, limits.max_probe_numbers)

    def num_bank_rows(self, num_points: int, max_requests: int) -> int:
        """Rows of the bank of an engine that runs at most `max_requests` at once."""
        most = max_requests * num_points * self.rows
        return most if self.bank_rows is None else min(self.bank_rows, most)

    def to_additional_config(self) -> dict[str, Any]:
        """Plain JSON for `VllmConfig.additional_config`."""
        return {CONFIG_KEY: self.model_dump(mode="json")}

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> SteeringConfig | None:
        """The settings if this engine is armed, otherwise None.

        An engine is armed if `additional_config` has our key, or the environment has STEER_ENGINE=1 (all defaults).

        Raises:
            UnsupportedEngineError: a setting is unknown or has an invalid value.
        """
        raw = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if raw is None:
            return cls() if os.environ.get(ARMED_ENV, "") == "1" else None
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["additional_config", CONFIG_KEY, *(str(part) for part in first["loc"])])
            raise UnsupportedEngineError(f"{where}: {first['msg']}. Valid keys: {sorted(cls.model_fields)}.") from None


def _select(wanted: str | tuple[int, ...], num_blocks: int, what: str) -> tuple[int, ...]:
    if wanted == "all":
        return tuple(range(num_blocks))
    try:
        blocks = parse_blocks(wanted if isinstance(wanted, str) else list(wanted))
    except ValueError as error:
        raise UnsupportedEngineError(f"{what}: {error}") from None
    assert blocks is not None
    if blocks[-1] >= num_blocks:
        raise UnsupportedEngineError(
            f"{what} names block {blocks[-1]}, but the model has {num_blocks} blocks: 0 to {num_blocks - 1}."
        )
    return blocks


def mirror_seconds() -> float:
    """The mirror's polling interval from the environment, 60 s by default.

    Raises:
        UnsupportedEngineError: not a finite number of at least 1.
    """
    given = os.environ.get(MIRROR_SECONDS_ENV) or "60"
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds < math.inf:
        raise UnsupportedEngineError(
            f"{MIRROR_SECONDS_ENV}={given[:80]} (--steering-mirror-seconds) must be a number of seconds, at least 1."
        )
    return seconds


class NamedLimits(BaseModel):
    """A group of limits. `STEER_ENGINE_MAX_EDITS=4` in the environment sets the field `max_edits`, and so on.

    `GET /v1/steering` publishes all limits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def variable(cls, name: str) -> str:
        """The environment variable of a field."""
        return f"STEER_ENGINE_{name.upper()}"

    @classmethod
    def from_environment(cls) -> Self:
        """The defaults, overridden by the environment. Raises UnsupportedEngineError for a bad number."""
        named = {name: os.environ.get(cls.variable(name)) for name in cls.model_fields}
        try:
            return cls.model_validate({name: value for name, value in named.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise UnsupportedEngineError(
                f"{cls.variable(name)}={str(named[name])[:80]} is not valid for the limit {name}: {first['msg']}. The "
                f"default is {cls.model_fields[name].default}."
            ) from None


class Limits(NamedLimits):
    """Limits on one request."""

    max_edits: int = Field(default=8, ge=1)
    max_request_vectors: int = Field(default=32, ge=1)
    """Distinct vectors of one request, including those of gates. An edit of rank k reads 2k of them."""
    max_rank: int = Field(default=8, ge=1, le=8)
    """Rank of a low-rank edit, and features of one edit. The kernels have room for 8."""
    max_abs_scale: float = Field(default=1000.0, gt=0, allow_inf_nan=False)
    max_dose: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Largest |edit| at a block in mean residual norms, where the vector's file has them. Useful doses are below 2."""
    max_spec_bytes: int = Field(default=MAX_SPEC_CHARS, ge=1)
    """Length of a spec as JSON text, inline vectors not counted."""
    max_inline_bytes: int = Field(default=8 * 2**20, ge=0)
    """Decoded bytes of all inline vectors of a request; 0 disables inline vectors."""
    max_triggers: int = Field(default=8, ge=0, le=8)
    """Distinct token triggers of one request."""
    max_trigger_tokens: int = Field(default=8, ge=1, le=8)
    """Tokens of a sequence that opens or closes a window."""
    max_conditions: int = Field(default=8, ge=0, le=8)
    """Distinct conditions of one request."""
    max_probes: int = Field(default=8, ge=0, le=64)
    """Probes of one request; 0 disables probes. Workers allocate room for their numbers."""
    max_probe_numbers: int = Field(default=256, ge=1, le=4096)
    """Numbers per token of one request: pairs of a probe and a block."""
    max_prompt_numbers: int = Field(default=2**18, ge=0)
    """Numbers of one prompt, if a probe measures prompt tokens: its tokens times the numbers per token."""

    @property
    def of_probes(self) -> list[int]:
        """The limits by which workers allocate room for numbers."""
        return [self.max_probes, self.max_probe_numbers]

    max_capture_bytes: int = Field(default=8 * 2**20, ge=1)
    """Captured rows of a request: float32, blocks x positions x hidden size. With --steering-capture only."""
    max_captures: int = Field(default=4, ge=1)
    """Capturing requests of one API process at once; others wait. Bounds the rows that workers keep."""


class EngineLimits(NamedLimits):
    """Limits of one engine. Its processes and the API processes read them from the environment."""

    store_bytes: int = Field(default=4 * 2**30, ge=0)
    """Host memory of each worker for vectors. Vectors that no request names are dropped to make room."""
    max_monitors: int = Field(default=8, ge=0, le=64)
    """Numbers per token of all monitors (--steering-monitor), one per block. `max_probes` stays for clients."""


class ApiLimits(NamedLimits):
    """Limits of one API process."""

    max_body_bytes: int = Field(default=64 * 2**20, ge=1)
    """Body of any request. vLLM itself has no limit."""
    max_other_body_bytes: int = Field(default=4 * 2**20, ge=1)
    """Body of a request to a path that cannot carry steering, such as /tokenize: a million tokens of text fit. Audio
    files have `max_body_bytes`; vLLM takes them up to 25 MB."""
    max_bodies_bytes: int = Field(default=2**30, ge=0)
    """All bodies that are held at once, until their answers end. One above 256 KiB that would exceed it gets 503."""
    max_upload_bytes: int = Field(default=64 * 2**20, ge=1)
    """Body of an uploaded vector. 80 blocks of 8192 numbers are 2.6 MB."""
    max_uploads: int = Field(default=4, ge=1)
    """Concurrent uploads; further ones get 503 (retry later)."""
    max_bank_queue: int = Field(default=256, ge=1)
    """Steered requests that may wait for bank rows (--steering-bank-rows); further ones get 503."""
    loaded_bytes: int = Field(default=2**30, ge=0)
    """Host memory for vectors loaded from the folder. The least recently used are removed first."""


class RegistryLimits(NamedLimits):
    """Limits of a registry's size."""

    max_vectors: int = Field(default=1_000, ge=0)
    max_presets: int = Field(default=1_000, ge=0)
    max_registry_bytes: int = Field(default=10 * 2**30, ge=0)
    max_preset_bytes: int = Field(default=16_384, ge=0)
