"""Activation dump in, control vector out: Ray actors take a block each.

An actor goes through the shards in canonical order and keeps what one block needs, so results depend neither on how
many actors there are nor on how the shards were cut.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from steer_engine.derive.block_fit import BlockFit, BlockFitter
from steer_engine.derive.dump_folder import DumpFolder
from steer_engine.derive.fit import Fit, require_directions, vector_of
from steer_engine.derive.methods import require_method
from steer_engine.derive.progress import Progress
from steer_engine.derive.workers import Workers, ray_session
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Matrix products round differently with another number of threads; with one, bits are equal and actors share cores."""


def fit_dump(
    folder: str | os.PathLike[str],
    *,
    method: str = "diffmean",
    actors: int | None = None,
    ray_address: str | None = None,
    progress: bool = True,
) -> ControlVector:
    """Fit a method to a dump.

    Args:
        folder: a whole dump. On a cluster every node must see it under this path.
        method: one of `methods.METHODS`.
        actors: processes that work side by side (default: one per core of this machine, at most one per block).
        ray_address: cluster to run them on (None: a local Ray for this call).

    Raises:
        DerivationError: the dump is incomplete, or a shard is missing, truncated or damaged (names the file), or its
            texts give no direction.
    """
    require_method(method)
    path = Path(folder).absolute()
    dump = DumpFolder.open(path)
    shards = dump.require_complete()
    blocks = dump.manifest.blocks
    count = actors if actors is not None else min(len(blocks), len(os.sched_getaffinity(0)))
    if count < 1:
        raise DerivationError(f"{count} actors cannot fit anything; at least 1 is needed.")
    with Progress(enabled=progress) as shown, ray_session(ray_address, num_cpus=count) as ray:
        resources = {"num_cpus": 0.0 if ray_address is None else 1.0}
        fitters = Workers(ray, BlockFitter, (str(path),), count=count, resources=resources, env=_ONE_THREAD)
        try:
            with shown.counting("checking", total=len(shards), unit="shards") as advance:
                for _ in fitters.ordered("check", [(shard.index.name,) for shard in shards]):
                    advance(1)
            fits: list[BlockFit] = []
            with shown.counting("fitting", total=len(blocks), unit="blocks") as advance:
                for fitted in fitters.ordered("fit", [(block, method) for block in blocks]):
                    fits.append(fitted)
                    advance(1)
        finally:
            fitters.stop()
    directions_LD = np.stack([fitted.direction_D for fitted in fits])
    require_directions(directions_LD, np.array([fitted.residual_norm for fitted in fits]), blocks)
    together = Fit(
        directions={fitted.block: fitted.direction_D.astype(np.float32) for fitted in fits},
        residual_norms={fitted.block: fitted.residual_norm for fitted in fits},
        separation={fitted.block: fitted.separation for fitted in fits if fitted.separation is not None},
        explained={fitted.block: fitted.explained for fitted in fits if fitted.explained is not None},
    )
    return vector_of(together, dump.manifest, method)
