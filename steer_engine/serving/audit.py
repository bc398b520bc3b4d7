"""A line of JSON in the log for each change of the registry: what a name stands for now, and which request said so."""

from __future__ import annotations

import json
import logging

from fastapi import Request

logger = logging.getLogger("steer_engine.registry")

MAX_REQUEST_ID = 128


def log_change(request: Request, change: str, what: str, name: str, digest: str) -> None:
    """change: put, replace or delete; what: vector or preset; digest: of what is there now, or was."""
    line = {"change": change, what: name, "digest": digest}
    if request_id := request.headers.get("x-request-id"):
        line["request_id"] = request_id[:MAX_REQUEST_ID]
    logger.info("changed %s", json.dumps(line, separators=(",", ":")))
