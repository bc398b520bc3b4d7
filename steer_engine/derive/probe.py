"""Train a probe: direction, threshold and calibration per block. NumPy and SciPy, without an engine.

The number of a probe is `<x, v>`, with v as it is in the file. The direction is fitted to the training prompts.
Threshold and calibration are fitted to the same prompts, each scored by a direction that was fitted without it
(`_out_of_fold`). The quality is measured on held-out prompts (`probe_quality`), which had no influence on anything.

Shape suffixes: N rows, P prompts, R resamples, U different values, L blocks, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from steer_engine.derive.condition import (
    Indexes,
    cut_at_rate,
    reachable_rate,
    split,
)
from steer_engine.derive.fit import FOLDS, BlockFit, auroc, vector_of
from steer_engine.derive.methods import FROM_ROWS, mean_difference
from steer_engine.derive.moments import Array, Rows
from steer_engine.derive.probe_quality import ProbeReport, Scores, best_block, report_block, sigmoid
from steer_engine.errors import DerivationError
from steer_engine.probe import Platt
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import FittedProbe, ProbeAt, ProbeBlock, VectorMetadata

METHODS: dict[str, Callable[[Array, Array], Array]] = {
    "diffmean": mean_difference,
    "logistic": FROM_ROWS["logistic"],
    "lda": FROM_ROWS["lda"],
}

MIN_PROMPTS = 10
"""Prompts of a class. With fewer, the calibration would rest on a handful of numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Rows of the prompts of one class. prompt_N: index of each row's prompt, from 0 and ascending.

    norm_L: sum of |x| over `norm_count` token rows.
    """

    rows_NLD: Rows
    prompt_N: Indexes
    norm_L: Array
    norm_count: int

    @property
    def num_prompts(self) -> int:
        return int(self.prompt_N[-1]) + 1

    def at(self, index: int) -> Array:
        """Rows at the block with this index, `[N, D]` in float64."""
        return self.rows_NLD[:, index].astype(np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeFit:
    """A trained probe. auroc: block -> AUROC of the training prompts, each scored by a direction of other prompts.

    vector: directions, with thresholds, calibration and held-out quality in its metadata. held_out: that quality.
    """

    vector: ControlVector
    auroc: Mapping[int, float]
    held_out: ProbeReport

    def require_useful(self) -> None:
        """Raise DerivationError if the best block is not better than chance on the held-out prompts."""
        best = self.held_out.best
        if (area := self.held_out.by_block[best].auroc) <= 0.5:
            raise DerivationError(
                f"The best block ({best}) has a held-out AUROC of {area:.3f}; 0.5 is chance. The probe does not tell "
                "the prompts apart. Choose another --method or --at, other --blocks, or more prompts."
            )


def require_settings(method: str, at: str, positions: Sequence[str], held_out: float, rate: float) -> None:
    """Raise DerivationError if a setting of `fit_blocks` is not valid."""
    for name, value, valid in (("method", method, tuple(METHODS)), ("at", at, tuple(positions))):
        if value not in valid:
            raise DerivationError(f"--{name} {str(value)[:64]!r} is none of {', '.join(valid)}.")
    if not 0.0 < held_out < 1.0:
        raise DerivationError(f"A held-out share of {held_out:g} is not between 0 and 1; 0.3 is usual.")
    if not 0.0 < rate < 1.0:
        raise DerivationError(f"--fpr {rate:g}: a false-positive rate is between 0 and 1, for example 0.01.")


def fit_blocks(
    positive: Examples,
    negative: Examples,
    blocks: Sequence[int],
    metadata: VectorMetadata,
    *,
    at: ProbeAt,
    method: str = "logistic",
    held_out: float = 0.3,
    rate: float = 0.01,
    seed: int = 0,
    chat: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> ProbeFit:
    """Train a probe at every block.

    Args:
        blocks: block numbers, in the order of the rows' second axis.
        metadata: provenance of the vector.
        held_out: share of each class's prompts that the quality is measured on. seed: of that split.
        rate: false-positive rate that the threshold shall keep.
        advance: called with 1 after each block.

    Raises:
        DerivationError: the rows of both classes are the same at a block.
    """
    rng = np.random.default_rng(seed)
    classes = (positive, negative)
    parts = [split(each.num_prompts, held_out, rng) for each in classes]
    trained = [np.isin(each.prompt_N, train_P) for each, (train_P, _) in zip(classes, parts, strict=True)]
    num_folds = min(FOLDS, *(len(train_P) for train_P, _ in parts))
    # Rows of a prompt stay together, in the split and in the folds.
    folds = [
        np.searchsorted(train_P, each.prompt_N[is_trained]) % num_folds
        for each, is_trained, (train_P, _) in zip(classes, trained, parts, strict=True)
    ]
    method_of = METHODS[method]
    fits, areas, reports, probes = [], {}, {}, {}
    for index, block in enumerate(blocks):
        rows = [each.at(index) for each in classes]
        train = [rows_ND[is_trained] for rows_ND, is_trained in zip(rows, trained, strict=True)]
        # As it will be stored: threshold and calibration are those of the rounded direction.
        direction_D = method_of(*train).astype(np.float32).astype(np.float64)
        positive_N, negative_N = _out_of_fold(train, folds, num_folds, direction_D, method_of)
        areas[block] = auroc(positive_N, negative_N)
        threshold = cut_at_rate(positive_N, negative_N, rate).threshold
        probe = ProbeBlock(threshold=threshold, platt=fit_platt(positive_N, negative_N))
        held = [
            Scores(value_N=rows_ND[~is_trained] @ direction_D, prompt_N=_numbered(each.prompt_N[~is_trained]))
            for rows_ND, is_trained, each in zip(rows, trained, classes, strict=True)
        ]
        reports[block] = found = report_block(probe, *held, seed=seed)
        assert found.quality is not None
        probes[block] = probe.model_copy(
            update={
                "auroc": found.auroc,
                "true_positive_rate": found.quality.recall,
                "false_positive_rate": found.quality.false_positive_rate,
            }
        )
        norm = (positive.norm_L + negative.norm_L)[index] / (positive.norm_count + negative.norm_count)
        fits.append(
            BlockFit(
                block=block,
                direction_D=direction_D,
                residual_norm=float(norm),
                separation=found.auroc,
                explained=None,
            )
        )
        advance(1)
    counts = [len(out_P) for _, out_P in parts]
    fitted = FittedProbe(
        blocks=probes,
        at=at,
        target_false_positive_rate=rate,
        held_out={"positive": counts[0], "negative": counts[1]},
        chat=chat,
    )
    num_negative = int(trained[1].sum())
    notes: tuple[str, ...] = ()
    if rate < reachable_rate(num_negative):
        notes = (
            f"a false-positive rate of {rate:g} needs at least {int(np.ceil(1.0 / rate)) - 1} negative examples to "
            f"train on, and there are {num_negative}; the threshold keeps {reachable_rate(num_negative):.2g}.",
        )
    return ProbeFit(
        vector=vector_of(fits, metadata).with_metadata(probe=fitted),
        auroc=areas,
        held_out=ProbeReport(
            by_block=reports, best=best_block(areas), at=at, num_positive=counts[0], num_negative=counts[1], notes=notes
        ),
    )


def _numbered(prompt_N: Indexes) -> Indexes:
    """The prompts numbered from 0 without gaps."""
    return np.unique(prompt_N, return_inverse=True)[1].astype(np.intp)


def _out_of_fold(
    rows: Sequence[Array],
    folds: Sequence[Indexes],
    num_folds: int,
    direction_D: Array,
    method_of: Callable[[Array, Array], Array],
) -> tuple[Array, Array]:
    """Numbers of the positive and of the negative training rows, each by the direction of the other folds.

    The numbers of a fold are moved and scaled so that the class means of the rows that its direction was fitted to
    project where `direction_D` projects the class means of all rows. Without this, folds would differ by the mean
    stream's projection, which is often larger than the gap between the classes.
    """
    scores = [np.empty(len(rows_ND)) for rows_ND in rows]
    target = [float(rows_ND.mean(axis=0) @ direction_D) for rows_ND in rows]
    for fold in range(num_folds):
        kept = [rows_ND[fold_N != fold] for rows_ND, fold_N in zip(rows, folds, strict=True)]
        fold_D = method_of(*kept)
        means = [float(rows_ND.mean(axis=0) @ fold_D) for rows_ND in kept]
        gap = means[0] - means[1]
        scale = (target[0] - target[1]) / gap if gap > 0.0 else 1.0
        for score_N, rows_ND, fold_N in zip(scores, rows, folds, strict=True):
            score_N[fold_N == fold] = target[1] + scale * (rows_ND[fold_N == fold] @ fold_D - means[1])
    return scores[0], scores[1]


def fit_platt(positive_N: Array, negative_N: Array) -> Platt:
    """Calibration by Platt (1999): logistic regression of the class on the number, with his smoothed targets.

    The targets (n+ + 1) / (n+ + 2) and 1 / (n- + 2) keep it finite where a threshold separates the classes.
    """
    from scipy.optimize import minimize

    score_N = np.concatenate([positive_N, negative_N])
    centre, spread = float(score_N.mean()), float(score_N.std())
    if spread == 0.0:
        spread = 1.0
    design_N2 = np.stack([(score_N - centre) / spread, np.ones(len(score_N))], axis=1)
    num_positive, num_negative = len(positive_N), len(negative_N)
    target_N = np.repeat(
        [(num_positive + 1.0) / (num_positive + 2.0), 1.0 / (num_negative + 2.0)], [num_positive, num_negative]
    )

    def loss(theta: Array) -> tuple[float, Array]:
        logit_N = design_N2 @ theta
        value = (np.logaddexp(0.0, logit_N) - target_N * logit_N).mean()
        return float(value), design_N2.T @ (sigmoid(logit_N) - target_N) / len(target_N)

    def curvature(theta: Array) -> Array:
        share_N = sigmoid(design_N2 @ theta)
        hessian: Array = design_N2.T @ (design_N2 * (share_N * (1.0 - share_N))[:, None]) / len(target_N)
        return hessian

    found = minimize(loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-10})
    slope, offset = found.x
    return Platt(a=float(slope / spread), b=float(offset - slope * centre / spread))
