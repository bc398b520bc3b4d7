"""Probes trained on synthetic streams, whose best direction, AUROC and probability are known."""

from __future__ import annotations

from math import erf, sqrt
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import _sigmoid_calibration
from sklearn.metrics import brier_score_loss, roc_auc_score

from steer_engine.derive import methods
from steer_engine.derive.condition import cut_at_rate, reachable_rate
from steer_engine.derive.probe import METHODS, Examples, fit_blocks, fit_platt
from steer_engine.derive.probe_quality import (
    Scores,
    auroc_interval,
    calibration_error,
    probabilities,
    report_block,
    sigmoid,
)
from steer_engine.errors import DerivationError
from steer_engine.probe import Platt
from steer_engine.vectors import VectorMetadata
from steer_engine.vectors.metadata import ProbeBlock
from steer_engine.vectors.safetensors_format import from_bytes, to_bytes

WIDTH = 24
GAP = 3.0
"""Distance of the class means, in standard deviations along the axis between them."""

BEST_AUROC = 0.5 * (1.0 + erf(GAP / 2.0))
"""Of two normal distributions that are GAP standard deviations apart: Phi(GAP / sqrt(2))."""


def axis() -> np.ndarray:
    return np.random.default_rng(0).normal(size=WIDTH) / np.sqrt(WIDTH)


def stream(count: int, label: float, seed: int, *, tokens: int = 1, offset: float = 50.0) -> Examples:
    """Prompts of a class at two blocks: noise at the first, the property at the second.

    offset: length of the mean stream, which both classes have and no direction may be confused by.
    """
    rng = np.random.default_rng(seed)
    unit_D = axis() / np.linalg.norm(axis())
    rows_NLD = rng.normal(size=(count * tokens, 2, WIDTH)) + offset
    rows_NLD[:, 1] += label * 0.5 * GAP * unit_D
    return Examples(
        rows_NLD=rows_NLD.astype(np.float32),
        prompt_N=np.repeat(np.arange(count), tokens),
        norm_L=np.linalg.norm(rows_NLD, axis=-1).sum(axis=0),
        norm_count=count * tokens,
    )


def trained(method: str, **settings: Any) -> Any:
    tokens = settings.pop("tokens", 1)
    classes = stream(600, 1.0, 1, tokens=tokens), stream(600, -1.0, 2, tokens=tokens)
    return fit_blocks(
        *classes, (4, 9), VectorMetadata(num_blocks=12), at="last_prompt_token", method=method, **settings
    )


@pytest.mark.parametrize("method", METHODS)
def test_each_method_finds_the_direction(method: str) -> None:
    """The squared tangent of the angle to the true axis, from 420 prompts of each class.

    The difference of the means has noise of variance 2 / 420 in each of the other WIDTH - 1 coordinates. An estimated
    covariance multiplies it by 1 + GAP^2 / 4 (lda), and logistic regression needs 1 / 0.641 as many prompts at a gap of
    3 (Efron 1975, table 1).
    """
    fit = trained(method)
    direction_D = fit.vector.directions[9].astype(float)
    cosine = direction_D @ axis() / np.linalg.norm(direction_D) / np.linalg.norm(axis())
    factor = {"diffmean": 1.0, "lda": 1.0 + GAP**2 / 4, "logistic": (1.0 + GAP**2 / 4) / 0.641}[method]
    expected = factor * (WIDTH - 1) * 2.0 / 420 / GAP**2
    assert 1.0 / cosine**2 - 1.0 < expected * (1.0 + 4 * sqrt(2.0 / (WIDTH - 1)))  # four standard deviations of chi^2
    found = fit.held_out.by_block[9]
    # Hanley and McNeil (1982): at 0.98 and 180 prompts, the standard deviation is 0.007; at 0.5 below 0.5 / sqrt(n).
    assert abs(found.auroc - BEST_AUROC) < 4 * 0.007
    assert found.low <= found.auroc <= found.high
    assert fit.held_out.best == 9
    assert found.quality is not None
    wrong = 0.5 * (1.0 - found.quality.recall + found.quality.false_positive_rate)
    assert found.quality.accuracy == pytest.approx(1.0 - wrong)
    assert abs(fit.held_out.by_block[4].auroc - 0.5) < 4 * 0.5 / sqrt(180)  # noise
    assert abs(fit.auroc[4] - 0.5) < 4 * 0.5 / sqrt(420)  # nor on the training prompts: no direction saw what it scores


@pytest.mark.parametrize("method", METHODS)
def test_the_probability_is_calibrated(method: str) -> None:
    """On new prompts. Here the true probability is sigmoid(GAP * position along the axis)."""
    fit = trained(method)
    platt = fit.vector.metadata.probe.blocks[9].platt
    rows = [stream(4000, label, seed).at(1) for label, seed in ((1.0, 7), (-1.0, 8))]
    direction_D = fit.vector.directions[9].astype(float)
    unit_D = axis() / np.linalg.norm(axis())
    rows_ND = np.concatenate(rows)
    label_N = np.repeat([1.0, 0.0], 4000)
    found_N = probabilities(platt, rows_ND @ direction_D)
    true_N = sigmoid(GAP * ((rows_ND - 50.0) @ unit_D))
    best = float(((true_N - label_N) ** 2).mean())
    # Calibration in the large: the sum of 840 training labels has a standard deviation of sqrt(840 * mean p (1 - p)).
    assert abs(found_N.mean() - 0.5) < 4 * sqrt(best / 840)
    assert best < ((found_N - label_N) ** 2).mean() < 1.2 * best
    assert calibration_error(found_N, label_N) < 4 * sqrt(best / 840)


def test_the_threshold_keeps_the_rate_on_new_negatives() -> None:
    rates = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        cut = cut_at_rate(rng.normal(size=50) + 2, rng.normal(size=99), 0.05)
        assert cut.above
        rates.append(float((rng.normal(size=1000) > cut.threshold).mean()))
    # 5 of 99 may be above, and a new one is with 5 / 100 (less the half gap to the next larger value). The rate of one
    # choice has a standard deviation of sqrt(0.05 * 0.95 / 100).
    spread = sqrt(0.05 * 0.95 / 100) / sqrt(len(rates))
    assert 0.05 - 0.01 - 4 * spread < np.mean(rates) < 0.05 + 4 * spread


def test_a_threshold_is_between_two_values_and_counts_exactly() -> None:
    negative_N = np.arange(99.0)
    cut = cut_at_rate(np.array([97.5, 120.0]), negative_N, 0.03)
    assert int((negative_N > cut.threshold).sum()) == 2  # the third largest is 96
    assert 96.0 < cut.threshold < 97.0
    assert (cut.f1, cut.margin) == (2 * 2 / (2 + 2 + 2), 1.0 / 120.0)
    assert reachable_rate(99) == 0.01
    highest = cut_at_rate(np.array([97.5, 120.0]), negative_N, 0.001)  # out of reach: above all negatives
    assert 98.0 <= highest.threshold < 120.0
    same = cut_at_rate(np.ones(3), np.ones(3), 0.01)
    assert (same.threshold, same.f1, same.margin) == (1.0, 0.0, 0.0)


def test_platt_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    positive_N, negative_N = rng.normal(size=90) * 3 + 205, rng.normal(size=60) * 3 + 200
    found = fit_platt(positive_N, negative_N)
    label_N = np.repeat([1, 0], [90, 60])
    # Its sigmoid is 1 / (1 + exp(a f + b)), and its optimiser stops at a gradient of about 1e-5.
    a, b = _sigmoid_calibration(np.concatenate([positive_N, negative_N]) - 202.0, label_N)
    assert found.a == pytest.approx(-a, rel=1e-3)
    assert found.a * 202.0 + found.b == pytest.approx(-b, abs=1e-3)


def test_platt_is_finite_for_separated_and_for_equal_values() -> None:
    found = fit_platt(np.array([5.0, 6.0, 7.0]), np.array([1.0, 2.0]))
    assert np.isfinite(found).all()
    assert found.a > 0.0
    share_N = probabilities(found, np.array([-1e6, 1.0, 7.0, 1e6]))
    assert np.isfinite(share_N).all()
    assert (np.diff(share_N) > 0.0).all()
    flat = fit_platt(np.ones(3), np.ones(3))
    assert probabilities(flat, np.ones(1))[0] == pytest.approx(0.5)


def test_reports_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(5)
    positive_N, negative_N = np.round(rng.normal(size=70) + 1, 1), np.round(rng.normal(size=50), 1)  # with ties
    sides = [Scores(value_N=side, prompt_N=np.arange(len(side))) for side in (positive_N, negative_N)]
    found = report_block(ProbeBlock(threshold=0.5, platt=Platt(1.5, -0.5)), *sides)
    label_N, value_N = np.repeat([1, 0], [70, 50]), np.concatenate([positive_N, negative_N])
    assert found.auroc == pytest.approx(roc_auc_score(label_N, value_N))
    assert found.brier == pytest.approx(brier_score_loss(label_N, 1 / (1 + np.exp(0.5 - 1.5 * value_N))))
    assert found.quality is not None
    assert found.quality.recall == (positive_N > 0.5).mean()
    assert found.quality.false_positive_rate == (negative_N > 0.5).mean()
    bare = report_block(ProbeBlock(), *sides)
    assert (bare.quality, bare.brier, bare.calibration_error) == (None, None, None)


def test_the_calibration_error_is_exact() -> None:
    assert calibration_error(np.array([0.25, 0.25, 0.95, 0.95]), np.array([0.0, 1.0, 1.0, 1.0])) == pytest.approx(0.15)
    assert calibration_error(np.ones(3), np.zeros(3)) == 1.0


def test_the_interval_draws_prompts_and_not_tokens() -> None:
    rng = np.random.default_rng(6)
    one = [Scores(value_N=rng.normal(size=60) + shift, prompt_N=np.arange(60)) for shift in (1.0, 0.0)]
    low, high = auroc_interval(*one)
    # Hanley and McNeil (1982) for an AUROC of 0.76: a standard deviation of 0.044.
    assert high - low == pytest.approx(2 * 1.96 * 0.044, rel=0.25)
    repeated = [Scores(value_N=np.repeat(s.value_N, 5), prompt_N=np.repeat(s.prompt_N, 5)) for s in one]
    assert auroc_interval(*repeated) == pytest.approx((low, high), abs=1e-9)
    assert auroc_interval(*one) == (low, high)  # seeded


def test_the_file_carries_the_probe() -> None:
    fit = trained("lda", rate=0.02, chat=True)
    read = from_bytes(to_bytes(fit.vector))
    probe = read.metadata.probe
    assert probe == fit.vector.metadata.probe
    assert (probe.at, probe.target_false_positive_rate, probe.chat) == ("last_prompt_token", 0.02, True)
    assert probe.held_out == {"positive": 180, "negative": 180}
    for block, found in fit.held_out.by_block.items():
        stored = probe.blocks[block]
        assert stored.auroc == found.auroc == read.metadata.separation[block]
        assert stored.platt == found.probe.platt
        # The stored threshold is that of the stored, rounded direction.
        value_N = found.negative.value_N
        assert stored.false_positive_rate == (value_N > stored.threshold).mean()
    assert abs(probe.blocks[9].false_positive_rate - 0.02) < 4 * sqrt(0.02 * 0.98 * (1 / 180 + 1 / 420))


def test_the_direction_is_as_long_as_the_difference_of_the_means() -> None:
    """So that scale 1 steers as with a derived vector."""
    lengths = {method: trained(method).vector.norms[9] for method in METHODS}
    assert lengths["logistic"] == pytest.approx(lengths["diffmean"], rel=1e-6)
    assert lengths["lda"] == pytest.approx(lengths["diffmean"], rel=1e-6)


def test_tokens_of_a_prompt_stay_together() -> None:
    """Each prompt has a noise of its own, which all its tokens share: a direction that saw it would rank it well."""

    def noisy(seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        rows_NLD = np.repeat(rng.normal(size=(40, 1, 200)), 20, axis=0)
        prompt_N = np.repeat(np.arange(40), 20)
        return Examples(rows_NLD=rows_NLD.astype(np.float32), prompt_N=prompt_N, norm_L=np.ones(1), norm_count=1)

    fit = fit_blocks(noisy(1), noisy(2), (0,), VectorMetadata(), at="every_prompt_token", method="logistic")
    assert fit.auroc[0] < 0.5 + 4 * 0.5 / sqrt(28)
    assert fit.held_out.by_block[0].auroc < 0.5 + 4 * 0.5 / sqrt(12)


def test_a_seed_chooses_the_held_out_prompts() -> None:
    first, again, other = (trained("diffmean", seed=seed) for seed in (0, 0, 1))
    assert first.vector == again.vector
    assert first.vector.metadata == again.vector.metadata
    assert first.vector != other.vector


def test_a_rate_out_of_reach_is_a_warning() -> None:
    (warning,) = trained("diffmean", rate=0.001).held_out.warnings()
    assert (
        "a false-positive rate of 0.001 needs at least 999 negative examples to train on, and there are 420" in warning
    )
    assert trained("diffmean").held_out.warnings() == []


def test_a_probe_that_is_no_better_than_chance_is_refused() -> None:
    def noise(seed: int) -> Examples:
        rows_NLD = np.random.default_rng(seed).normal(size=(100, 1, WIDTH)).astype(np.float32)
        return Examples(rows_NLD=rows_NLD, prompt_N=np.arange(100), norm_L=np.ones(1), norm_count=1)

    fits = [fit_blocks(noise(2 * i), noise(2 * i + 1), (3,), VectorMetadata(), at="mean_prompt") for i in range(8)]
    bad = [fit for fit in fits if fit.held_out.by_block[3].auroc <= 0.5]
    assert bad
    with pytest.raises(DerivationError, match=r"The best block \(3\) has a held-out AUROC of 0\.\d+; 0\.5 is chance"):
        bad[0].require_useful()


def test_classes_that_are_equal_at_a_block_are_named() -> None:
    same = Examples(
        rows_NLD=np.ones((20, 1, WIDTH), np.float32), prompt_N=np.arange(20), norm_L=np.ones(1) * 100, norm_count=20
    )
    with pytest.raises(DerivationError, match=r"do not differ at block\(s\) 3"):
        fit_blocks(same, same, (3,), VectorMetadata(), at="last_prompt_token")


def test_lda_is_the_same_in_both_spaces() -> None:
    """With more rows than D it is solved there, else in the span of the rows: the same formula."""
    rng = np.random.default_rng(9)
    positive_ND, negative_ND = rng.normal(size=(40, 30)) + 0.5, rng.normal(size=(45, 30))
    found_D = methods.lda(positive_ND, negative_ND)
    within_ND = np.concatenate([side - side.mean(axis=0) for side in (positive_ND, negative_ND)])
    scatter_DD = within_ND.T @ within_ND / len(within_ND)
    ridge = methods.LDA_SHRINKAGE * np.trace(scatter_DD) / 30
    gap_D = positive_ND.mean(axis=0) - negative_ND.mean(axis=0)
    expected_D = np.linalg.solve(scatter_DD + ridge * np.eye(30), gap_D)
    cosine = found_D @ expected_D / np.linalg.norm(found_D) / np.linalg.norm(expected_D)
    assert cosine == pytest.approx(1.0, abs=1e-12)
