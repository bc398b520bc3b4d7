"""`steer-engine fit`: a control vector from an activation dump."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steer_engine.derive import options
from steer_engine.derive.options import say


def fit_command(
    dump: Annotated[Path, typer.Argument(help="Folder that `steer-engine dump` wrote.", metavar="DUMP")],
    out: options.Out,
    method: options.Method = "diffmean",
    actors: Annotated[
        int | None, typer.Option(min=1, help="Processes that fit side by side (default: one per core).")
    ] = None,
    ray_address: options.RayAddress = None,
    force: options.Force = False,
) -> None:
    """Fit a control vector to an activation dump. No engine is started.

    Example: steer-engine fit sentiment.dump --method pca --out cheerful-pca.safetensors
    """
    from steer_engine.derive.fit_dump import fit_dump
    from steer_engine.derive.output import require_writable, summary
    from steer_engine.vectors.files import save

    require_writable(out, force=force)
    vector = fit_dump(dump, method=method, actors=actors, ray_address=ray_address)
    save(vector, out)
    say(summary(out, vector))
