"""The dose that an evaluation chose, kept with the vector."""

from __future__ import annotations

from steer_engine.evaluate.outcome import Outcome
from steer_engine.vectors.control_vector import ControlVector


def calibrated(vector: ControlVector, outcome: Outcome) -> ControlVector:
    """The vector with what was found in its metadata: `suggested_blocks`, `suggested_scale`, `suggested_unit`,
    `suggested_scope`, and `suggested_because` with the test split's numbers, significant or not.
    """
    (verdict,) = (each for each in outcome.verdicts if each.digest == vector.digest)
    trial, facts = verdict.main, outcome.facts
    because = (
        f"{facts['task']}: {100 * trial.paired.before:.1f} % to {100 * trial.paired.after:.1f} % of "
        f"{facts['sizes']['test']} test items (p = {trial.p_holm:.2g} after Holm), KL {trial.neutral_kl:.3g} nats on "
        f"neutral texts"
    )
    found = {
        "suggested_blocks": verdict.blocks,
        "suggested_scale": f"{verdict.alpha:g}",
        "suggested_unit": str(facts["unit"]),
        "suggested_scope": str(facts["scope"]),
        "suggested_because": because,
    }
    return vector.with_metadata(extra={**vector.metadata.extra, **found})
