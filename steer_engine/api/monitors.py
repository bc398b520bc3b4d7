"""Monitors of a server: from the operator's flags to numbers to watch, and from measured numbers to the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from steer_engine.errors import SteeringRequestError, UnsupportedEngineError
from steer_engine.fields import shown
from steer_engine.model_shape import ModelShape
from steer_engine.monitor import FLAG, Monitor, MonitorSpec
from steer_engine.probe_spec import MAX_PROBES
from steer_engine.resolve import resolve
from steer_engine.settings import Limits
from steer_engine.spec import SteeringSpec
from steer_engine.vectors import ControlVector
from steer_engine.vectors.metadata import FittedProbe, ProbeBlock


def resolve_monitors(
    specs: Sequence[MonitorSpec], vectors: Callable[[str], ControlVector], model: ModelShape, limits: Limits
) -> tuple[tuple[Monitor, ...], dict[str, ControlVector]]:
    """The monitors, one for each block, and their vectors by digest.

    A monitor is checked as the same probe of a request would be; the limits of requests on probes do not count.

    Raises:
        UnsupportedEngineError: a vector is unknown, or cannot be measured so on this engine. Names the monitor.
    """
    monitors: list[Monitor] = []
    used: dict[str, ControlVector] = {}
    unbounded = limits.model_copy(update={"max_probes": MAX_PROBES, "max_probe_numbers": MAX_PROBES})
    for spec in specs:
        try:
            vector = vectors(spec.vector)
            blocks = spec.blocks or (_best_block(vector),)
            measure = spec.measure or _usual_measure(vector, blocks)
            probe = {"name": spec.name, "vector": vector.digest, "blocks": list(blocks), "measure": measure}
            spec_of_probe = SteeringSpec.model_validate({"probes": [probe]})
            resolved = resolve(spec_of_probe, {vector.digest: vector}.__getitem__, model, unbounded)
            (checked,) = resolved.template.probes
            platts = checked.platt or (None,) * len(blocks)
            monitors += [
                _with_threshold(
                    Monitor(spec.name, vector.digest, block, measure, platt, site=checked.site), spec.above, vector
                )
                for block, platt in zip(blocks, platts, strict=True)
            ]
        except SteeringRequestError as error:
            raise UnsupportedEngineError(f"{FLAG} {shown(spec.text)}: {error.message}") from None
        used[vector.digest] = vector
    return tuple(monitors), used


def _best_block(vector: ControlVector) -> int:
    """The block with the largest stored AUROC on held-out prompts."""
    fitted = vector.metadata.probe
    if fitted is None:
        raise SteeringRequestError(
            "The vector's file has no trained probe ('steer-engine probe fit'), so say which blocks to watch: "
            "NAME=VECTOR:BLOCKS."
        )
    return max(fitted.blocks, key=lambda block: fitted.blocks[block].auroc or 0.0)


def _fitted(fitted: FittedProbe | None, block: int) -> ProbeBlock:
    return (fitted and fitted.blocks.get(block)) or ProbeBlock()


def _usual_measure(vector: ControlVector, blocks: Sequence[int]) -> str:
    """What a trained probe is read by, and "cosine" for other vectors."""
    fitted = vector.metadata.probe
    if all(_fitted(fitted, block).platt is not None for block in blocks):
        return "probability"
    return "cosine" if fitted is None else "dot"


def _with_threshold(monitor: Monitor, above: float | None, vector: ControlVector) -> Monitor:
    """With the threshold that the operator gave, or else with that of the trained probe."""
    if above is not None:
        if monitor.measure == "probability" and not 0 < above < 1:
            raise SteeringRequestError(f"above {above:g} is not a probability between 0 and 1.")
        return monitor._replace(above=above)
    stored = _fitted(vector.metadata.probe, monitor.block).threshold
    if stored is None or monitor.measure == "cosine":
        return monitor
    # Where the number falls as the probability rises, or does not matter to it, the two thresholds are not the same.
    if monitor.platt is not None:
        return monitor._replace(above=monitor.platt.probability(stored)) if monitor.platt.a > 0 else monitor
    return monitor._replace(above=stored)


class MonitorCounts:
    """Counts the numbers of monitors in the metrics. For API processes: vLLM chooses the metrics mode before this."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        from steer_engine.api import metrics

        self._monitors = tuple(monitors)
        self._series = [metrics.MonitorSeries(each.name, each.block, each.measure, each.above) for each in monitors]

    def __call__(self, parts: Sequence[np.ndarray]) -> None:
        """parts: float32 [tokens, monitors] of several sequences. A number that is not finite is not counted."""
        numbers_NM = np.concatenate(parts).astype(np.float64)
        for column, (monitor, series) in enumerate(zip(self._monitors, self._series, strict=True)):
            numbers_N = numbers_NM[:, column]
            numbers_N = numbers_N[np.isfinite(numbers_N)]
            if not len(numbers_N):
                continue
            if monitor.platt is not None:
                numbers_N = np.array([monitor.platt.probability(dot) for dot in numbers_N.tolist()])
            series.count(numbers_N)
