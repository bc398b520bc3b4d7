"""The vector's file that `derive` and `fit` write, and the line that says what it is."""

from __future__ import annotations

from pathlib import Path

from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import SUFFIXES


def require_writable(out: Path, *, force: bool) -> None:
    """Before minutes of reading rather than after them. Raises DerivationError."""
    if out.suffix not in SUFFIXES:
        raise DerivationError(f"{out}: the output's name must end in {' or '.join(SUFFIXES)}.")
    require_absent(out, force=force)


def require_absent(out: Path, *, force: bool) -> None:
    """Raise DerivationError where a file would be replaced unasked."""
    if out.exists() and not force:
        raise DerivationError(f"{out}: there is such a file already; choose another name, or --force to replace it.")


def summary(out: Path, vector: ControlVector) -> str:
    """Blocks, dose, separation and digest in one line."""
    norms, streams = vector.norms, vector.metadata.residual_norms
    doses = sorted(norms[block] / streams[block] for block in vector.blocks)
    return (
        f"{out}: {len(vector.blocks)} blocks, {doses[0]:.1%} to {doses[-1]:.1%} of the residual norm at scale 1, "
        f"{_separation(vector.metadata.separation)}{vector.digest}"
    )


def _separation(by_block: dict[int, float]) -> str:
    if not by_block:
        return ""
    best = max(by_block, key=lambda block: by_block[block])
    return f"held-out AUROC up to {by_block[best]:.3f} (block {best}), "
