"""Blocks and thresholds of conditions: examples computed by hand, and properties against brute force."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from steer_engine.derive.condition import (
    Cut,
    Quality,
    Readout,
    best_cut,
    choose,
    over_blocks,
    split,
)
from steer_engine.errors import DerivationError
from steer_engine.scope import ConditionSpec

# Few different values, so that ties are common; and any finite ones.
scores = st.one_of(
    st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12),
).map(np.array)


def f1(holds_positive: np.ndarray, holds_negative: np.ndarray) -> Fraction:
    hits, false_alarms = int(holds_positive.sum()), int(holds_negative.sum())
    return Fraction(2 * hits, hits + false_alarms + len(holds_positive))


def test_numbers_of_tokens_by_hand() -> None:
    # Block 0: v = (3, 4), |v| = 5. Block 1: v = 0.
    directions_LD = np.array([[3, 4], [0, 0]], dtype=np.float32)
    rows_LTD = np.array([[[3, 4], [0, 0], [4, -3], [-6, -8]], [[1, 1]] * 4], dtype=np.float32)
    dot = Readout(directions_LD=directions_LD, measure="dot", at="mean_prompt")
    assert dot.numbers(rows_LTD).tolist() == [[25, 0, 0, -50], [0, 0, 0, 0]]
    cosine = Readout(directions_LD=directions_LD, measure="cosine", at="mean_prompt")
    assert cosine.numbers(rows_LTD).tolist() == [[1, 0, 0, -1], [0, 0, 0, 0]]  # 0 if a norm is 0


@pytest.mark.parametrize(
    ("at", "expected"), [("last_prompt_token", [-50, 2]), ("mean_prompt", [-8.75, 2]), ("max_prompt", [15, 4])]
)
def test_the_value_of_a_prompt(at: str, expected: list[float]) -> None:
    numbers_LT = np.array([[15.0, 0, 0, -50], [0, 4, 2, 2]])
    readout = Readout(directions_LD=np.zeros((2, 3), np.float32), measure="dot", at=at)  # type: ignore[arg-type]
    assert readout.value(numbers_LT).tolist() == expected


def test_the_value_over_several_blocks() -> None:
    values_NL = np.array([[1.0, 5.0], [2.0, -4.0]])
    assert over_blocks(values_NL, "mean_prompt").tolist() == [3, -1]
    assert over_blocks(values_NL, "last_prompt_token").tolist() == [3, -1]
    assert over_blocks(values_NL, "max_prompt").tolist() == [5, 2]


def test_rows_that_are_not_finite_are_refused() -> None:
    readout = Readout(directions_LD=np.ones((1, 2), np.float32), measure="dot", at="mean_prompt")
    with pytest.raises(DerivationError, match="not finite"):
        readout.numbers(np.array([[[1, np.nan]]], dtype=np.float32))


def test_a_threshold_by_hand() -> None:
    # In order: n0 n1 p2 n3 p6 p8. Above 1.5: 3 hits, 1 false alarm, F1 = 6/7. Above 4.5: 2 hits, 1 missed, F1 = 4/5.
    cut = best_cut(np.array([2.0, 6.0, 8.0]), np.array([0.0, 1.0, 3.0]))
    assert cut == Cut(above=True, threshold=1.5, f1=6 / 7, margin=1 / 8)
    # The same mirrored: it holds below.
    cut = best_cut(np.array([-2.0, -6.0, -8.0]), np.array([0.0, -1.0, -3.0]))
    assert cut == Cut(above=False, threshold=-1.5, f1=6 / 7, margin=1 / 8)


def test_of_equal_f1_the_widest_gap_wins() -> None:
    # Below p2 there are 2 hits and 2 false alarms, F1 = 4/6. Below p10 there are 1 hit and no false alarm, F1 = 2/3.
    positive = np.array([2.0, 10.0])
    assert best_cut(positive, np.array([0.0, 3.0, 4.0])) == Cut(above=True, threshold=7.0, f1=2 / 3, margin=0.6)
    assert best_cut(positive, np.array([-20.0, 3.0, 4.0])) == Cut(above=True, threshold=-9.0, f1=2 / 3, margin=22 / 30)


def test_equal_values_give_no_threshold() -> None:
    assert best_cut(np.array([1.0, 1.0]), np.array([1.0])) is None


def test_neighbouring_floats_give_a_threshold_that_separates_them() -> None:
    low, high = 1.0, float(np.nextafter(1.0, 2.0))
    for positive, negative in ((high, low), (low, high)):
        cut = best_cut(np.array([positive]), np.array([negative]))
        assert cut is not None
        assert cut.holds(np.array([positive])).all()
        assert not cut.holds(np.array([negative])).any()


@given(scores, scores)
def test_no_threshold_between_the_values_has_a_larger_f1(positive: np.ndarray, negative: np.ndarray) -> None:
    cut = best_cut(positive, negative)
    values = np.unique(np.concatenate([positive, negative]))
    if cut is None:
        assert len(values) == 1
        return
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / (len(positive) * len(negative))
    assert cut.above == (wins >= 0.5)
    # Every partition of the values into two parts that a threshold can make.
    every = [
        (f1(positive >= b, negative >= b) if cut.above else f1(positive <= a, negative <= a), float(b - a))
        for a, b in pairwise(values)
    ]
    best = max(score for score, _ in every)
    assert f1(cut.holds(positive), cut.holds(negative)) == best
    assert cut.f1 == pytest.approx(float(best), abs=1e-12)
    # It is near the middle of the widest of the gaps with this F1.
    widest = max(gap for score, gap in every if score == best)
    below, above = values[values <= cut.threshold].max(), values[values >= cut.threshold].min()
    if below < above:
        assert above - below == widest
        assert abs(cut.threshold - (below + above) / 2) <= 0.011 * widest


@given(scores, scores)
def test_quality_counts_as_brute_force_does(positive: np.ndarray, negative: np.ndarray) -> None:
    for cut in (Cut(above=True, threshold=0.5, f1=0, margin=0), Cut(above=False, threshold=0.0, f1=0, margin=0)):
        found = Quality.of(cut, positive, negative)
        holds = [(v > 0.5) if cut.above else (v < 0.0) for v in [*positive, *negative]]
        truth = [True] * len(positive) + [False] * len(negative)
        hits = sum(h and t for h, t in zip(holds, truth, strict=True))
        assert found.recall == hits / len(positive)
        assert found.precision == (hits / sum(holds) if hits else 0.0)
        assert found.accuracy == sum(h == t for h, t in zip(holds, truth, strict=True)) / len(truth)
        assert found.f1 == pytest.approx(0.0 if not hits else 2 / (1 / found.precision + 1 / found.recall))
        sign = 1 if cut.above else -1
        wins = sum((sign * p > sign * n) + 0.5 * (p == n) for p in positive for n in negative)
        assert found.auroc == pytest.approx(wins / (len(positive) * len(negative)))
        always = Quality.of(Cut(above=True, threshold=-1e9, f1=0, margin=0), positive, negative)
        assert found.f1_of_always == pytest.approx(always.f1)


@given(st.integers(4, 300), st.floats(0.01, 0.99), st.integers(0, 9))
def test_a_split_covers_every_prompt_once(count: int, held_out: float, seed: int) -> None:
    train, out = split(count, held_out, np.random.default_rng(seed))
    assert sorted([*train, *out]) == list(range(count))
    assert len(train) >= 2
    assert len(out) >= 1
    again = split(count, held_out, np.random.default_rng(seed))
    assert np.array_equal(train, again[0])


def test_a_split_has_the_requested_share_and_depends_on_the_seed() -> None:
    train, out = split(100, 0.3, np.random.default_rng(0))
    assert (len(train), len(out)) == (70, 30)
    assert not np.array_equal(out, split(100, 0.3, np.random.default_rng(1))[1])


def classes(num_prompts: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Values at four blocks: noise, well separated, weakly separated, well separated the other way round."""
    rng = np.random.default_rng(4)
    positive_NL, negative_NL = rng.normal(size=(2, num_prompts, 4))
    return positive_NL + np.array([0, 6, 1, -5]), negative_NL


def test_the_best_block_is_chosen_on_training_prompts() -> None:
    fit = choose(*classes(), (2, 5, 6, 9), measure="cosine", at="mean_prompt")
    assert fit.chosen.blocks == (5,)
    assert fit.chosen is fit.by_block[5]
    assert fit.chosen.cut.above
    assert 0 < fit.chosen.cut.threshold < 6
    assert not fit.by_block[9].cut.above
    assert fit.by_block[9].auroc > 0.95
    assert fit.by_block[2].auroc < 0.7
    held_out = fit.chosen.held_out
    assert (held_out.num_positive, held_out.num_negative) == (12, 12)
    assert held_out.f1 > 0.9
    fit.require_useful()
    assert fit.warnings() == []
    condition = fit.condition
    assert condition.when("calm") == {
        "vector": "calm", "blocks": [5], "measure": "cosine", "at": "mean_prompt", "above": fit.chosen.cut.threshold,
    }  # fmt: skip
    assert ConditionSpec.model_validate(condition.when("calm")).is_bounded  # what a request takes
    assert condition.held_out == {"positive": 12, "negative": 12}
    # Without the best block, the one that holds below its threshold.
    below = choose(*(side[:, [0, 3]] for side in classes()), (2, 9), measure="dot", at="mean_prompt").condition
    assert below.blocks == (9,)
    assert below.above is None
    assert below.below is not None
    assert -5 < below.below < 0


def test_held_out_prompts_do_not_influence_the_choice() -> None:
    positive_NL, negative_NL = classes()
    before = choose(positive_NL, negative_NL, (2, 5, 6, 9), measure="dot", at="mean_prompt")
    rng = np.random.default_rng(0)
    _, out = split(len(positive_NL), 0.3, rng)
    changed_NL = positive_NL.copy()
    changed_NL[out] = -100.0
    after = choose(changed_NL, negative_NL, (2, 5, 6, 9), measure="dot", at="mean_prompt")
    assert after.chosen.blocks == before.chosen.blocks
    assert after.chosen.cut == before.chosen.cut
    assert after.chosen.held_out.f1 == 0.0 != before.chosen.held_out.f1
    with pytest.raises(DerivationError, match=r"block \(5\) has an AUROC of 0\.000 on the held-out prompts"):
        after.require_useful()


def test_of_equally_good_blocks_the_widest_margin_wins() -> None:
    positive_NL, negative_NL = np.zeros((2, 10, 2))
    positive_NL += [10.0, 10.0]
    negative_NL[:, 0] = np.arange(10) * 0.9  # the gap is 1.9 of 10 at the first block, and 10 of 10 at the second
    assert choose(positive_NL, negative_NL, (1, 2), measure="dot", at="mean_prompt").chosen.blocks == (2,)
    assert choose(positive_NL, positive_NL * 0, (1, 2), measure="dot", at="mean_prompt").chosen.blocks == (1,)


def test_several_blocks_are_those_on_the_side_of_the_best() -> None:
    fit = choose(*classes(), (2, 5, 6, 9), measure="dot", at="mean_prompt", num_blocks=2)
    assert fit.chosen.blocks == (5, 6)
    positive_NL, _ = classes()
    assert np.array_equal(fit.chosen.positive_N, positive_NL[:, [1, 2]].mean(axis=1))
    assert fit.condition.blocks == (5, 6)
    # The only other block is on the other side, so the best one stays alone.
    alone = choose(*(side[:, [1, 3]] for side in classes()), (5, 9), measure="dot", at="mean_prompt", num_blocks=2)
    assert alone.chosen is alone.by_block[5]
    with pytest.raises(DerivationError, match="choose 1 to 4"):
        choose(*classes(), (2, 5, 6, 9), measure="dot", at="mean_prompt", num_blocks=5)


def test_equal_values_and_chance_store_nothing() -> None:
    same = np.ones((8, 2))
    with pytest.raises(DerivationError, match=r"the same value at block\(s\) 3, 4"):
        choose(same, same, (3, 4), measure="dot", at="mean_prompt")
    # The values differ, but as often in one order as in the other.
    mixed_NL = np.tile([[0.0], [1.0]], (10, 1))
    for seed in range(5):
        fit = choose(mixed_NL[:, :1], 1 - mixed_NL, (3,), measure="dot", at="mean_prompt", seed=seed)
        chance = min(fit.chosen.auroc, fit.chosen.held_out.auroc)
        assert chance <= 0.5
        with pytest.raises(DerivationError, match="does not tell the prompts apart"):
            fit.require_useful()


def test_a_block_without_different_values_is_left_out() -> None:
    positive_NL, negative_NL = classes()
    positive_NL[:, 2] = negative_NL[:, 2] = 0.0
    fit = choose(positive_NL, negative_NL, (2, 5, 6, 9), measure="dot", at="mean_prompt")
    assert list(fit.by_block) == [2, 5, 9]


@pytest.mark.parametrize(("num_positive", "num_negative", "word"), [(3, 40, "positive"), (40, 0, "negative")])
def test_too_few_prompts_are_refused(num_positive: int, num_negative: int, word: str) -> None:
    positive_NL, negative_NL = classes()
    with pytest.raises(DerivationError, match=rf"\d {word} prompt\(s\) are too few; .* at least 4 of each class"):
        choose(positive_NL[:num_positive], negative_NL[:num_negative], (2, 5, 6, 9), measure="dot", at="mean_prompt")


def test_warnings_say_why_the_numbers_are_weak() -> None:
    few = choose(*classes(10), (2, 5, 6, 9), measure="dot", at="mean_prompt").warnings()
    assert len(few) == 1
    assert "only 6 prompts were held out" in few[0]
    noise = [side[:, :1] for side in classes(200)]
    found = " ".join(choose(*noise, (2,), measure="dot", at="mean_prompt").warnings())
    assert "the held-out AUROC is only" in found
    assert "prompts were held out" not in found


@given(
    arrays(np.float64, st.tuples(st.integers(4, 9), st.just(3)), elements=st.integers(-4, 4).map(float)),
    arrays(np.float64, st.tuples(st.integers(4, 9), st.just(3)), elements=st.integers(-4, 4).map(float)),
    st.integers(1, 3),
    st.floats(0.1, 0.9),
)
def test_any_values_give_a_condition_or_an_error(
    positive_NL: np.ndarray, negative_NL: np.ndarray, num_blocks: int, held_out: float
) -> None:
    settings = {"measure": "dot", "at": "max_prompt", "num_blocks": num_blocks, "held_out": held_out}
    try:
        fit = choose(positive_NL, negative_NL, (0, 7, 9), **settings)  # type: ignore[arg-type]
    except DerivationError:
        # Training prompts are not known here, but some of them have the same value at every block.
        assert all(len(np.unique(column)) < len(column) for column in np.concatenate([positive_NL, negative_NL]).T)
        return
    assert 0.5 <= fit.chosen.auroc <= 1.0
    if num_blocks == 1:
        assert fit.chosen.auroc == max(each.auroc for each in fit.by_block.values())
    condition = fit.condition
    assert (condition.above is None) != (condition.below is None)
    assert list(condition.blocks) == sorted(set(condition.blocks))
