"""Rows in the dtype that a dump keeps them in, as little-endian bytes."""

from __future__ import annotations

from typing import Literal

import numpy as np

from steer_engine.derive.moments import Rows
from steer_engine.errors import DerivationError

StoredDType = Literal["float32", "bfloat16", "float16"]
CODES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}


def encode(rows: Rows, code: str) -> bytes:
    """Round to nearest, ties to even.

    Raises:
        DerivationError: a value is too large for the dtype.
    """
    if code == "F32":
        return rows.astype("<f4", copy=False).tobytes()
    if code == "F16":
        with np.errstate(over="ignore"):
            stored = rows.astype("<f2")
        fits = bool(np.isfinite(stored).all())
    else:
        bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.uint32).astype(np.uint64)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        fits = bool(((stored & 0x7F80) != 0x7F80).all())
    if not fits:
        raise DerivationError(f"Values up to {np.abs(rows).max():.3g} do not fit {code}; keep float32 (--store).")
    return stored.tobytes()


def decode(raw: bytes | memoryview, code: str) -> Rows:
    """Inverse of `encode`, flat."""
    if code == "BF16":
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, dtype="<f4" if code == "F32" else "<f2").astype(np.float32)
