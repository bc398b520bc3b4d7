"""Resolving a capture: checked against what the engine captures."""

from __future__ import annotations

import uuid

from steer_engine.capture import PARAM, CaptureRequest
from steer_engine.errors import SteeringRequestError
from steer_engine.fields import parse_blocks
from steer_engine.model_shape import ModelShape, describe_blocks
from steer_engine.resolve_vectors import check_site
from steer_engine.settings import Limits
from steer_engine.site import points_at
from steer_engine.spec import CaptureSpec


def resolve_capture(requested: CaptureSpec | None, model: ModelShape, limits: Limits) -> CaptureRequest | None:
    """Check a capture against what this engine captures, and give it a key.

    Raises:
        SteeringRequestError: capture is off on this server, at these blocks or at this site.
    """
    if requested is None:
        return None
    if not model.capture_blocks:
        raise SteeringRequestError("Capture is switched off on this server (--steering-capture).", PARAM)
    check_rows_known(model)
    check_site(requested.site, f"{PARAM}.site", model)
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
        points=points_at(blocks, requested.site),
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
