"""How well a model chooses under one condition: by gold answer, and apart from its bias. NumPy, no engine.

A bias is a constant preference for an answer: always the second name, always `No`. Correcting it moves accuracy but not
the AUROC here, since a constant that is added to an answer's score does not change the order of the items.

Shape suffixes: N items, K classes, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steer_engine.derive.fit import auroc
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.items import Item
from steer_engine.evaluate.statistics import ANSWER_KEY, Array, Interval
from steer_engine.evaluate.sweep import Table

Labels = npt.NDArray[np.int64]

FLOOR_POINTS = 0.05
"""A plain accuracy nearer than this to chance or to 1 leaves no room to show a gain or a loss."""

MIN_MASS = 0.05
"""A choice between answers that hold less probability than this says little about what the model would write."""

MAX_IMBALANCE = 2.0
"""Gold classes may differ in size by this factor."""

DIFFERENCE_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The answers of each item in one order that has a meaning across items.

    If all items have the same answers, class k is the k-th answer. Otherwise it is the answer that the prompt mentions
    k-th (first mention, whole words); answers that it does not mention come last, in the order of the item.

    names: of the classes. order_NK: index of the answer of each class. gold_N: class of the right answer.
    """

    names: tuple[str, ...]
    order_NK: Labels
    gold_N: Labels

    @classmethod
    def of(cls, items: Sequence[Item]) -> Classes | None:
        """None if the items differ in their number of answers, or have one answer only."""
        counts = {len(item.answers) for item in items}
        if len(counts) > 1 or counts == {1}:
            return None
        (count,) = counts
        if len({item.answers for item in items}) == 1:
            names = tuple(answer.strip() for answer in items[0].answers)
            order_NK = np.tile(np.arange(count), (len(items), 1))
        else:
            names = tuple(f"mentioned {k + 1}." for k in range(count))
            order_NK = np.array([_by_mention(item) for item in items])
        gold_N = np.array([list(order).index(item.correct) for order, item in zip(order_NK, items, strict=True)])
        return cls(names=names, order_NK=order_NK, gold_N=gold_N)

    @property
    def shares(self) -> dict[str, float]:
        """Share of the items whose right answer is in each class."""
        return {name: float((self.gold_N == k).mean()) for k, name in enumerate(self.names)}


def _by_mention(item: Item) -> list[int]:
    words = "".join(letter if letter.isalnum() else " " for letter in item.prompt).split()
    first = {word: place for place, word in reversed(list(enumerate(words)))}
    return sorted(range(len(item.answers)), key=lambda i: (first.get(item.answers[i].strip(), len(words)), i))


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One condition on one split.

    by_class: accuracy where this class is right. chosen: share of the items for which the model chose the class.
    balanced: mean of `by_class`. auroc: for each class, how well its margin (log-probability minus that of the best
    other answer) tells the items where it is right from the others; the mean over the classes. d_prime: the same as a
    distance of the means in standard deviations. Both are NaN if all items have the same gold class.
    mass: probability of all answers together. kl: nats. entropy: bits.
    """

    accuracy: float
    balanced: float
    by_class: dict[str, float]
    chosen: dict[str, float]
    auroc: float
    d_prime: float
    mass: float
    kl: float
    entropy: float


def quality(table: Table, classes: Classes) -> Quality:
    """The quality of a condition. table: metrics per item, with the log-probabilities of the answers."""
    margin_NK = margins(table, classes)
    chosen_N = margin_NK.argmax(axis=1)
    right_N = table["accuracy"] == 1.0
    present = [k for k in range(len(classes.names)) if (classes.gold_N == k).any()]
    by_class = {classes.names[k]: float(right_N[classes.gold_N == k].mean()) for k in present}
    return Quality(
        accuracy=float(right_N.mean()),
        balanced=float(np.mean(list(by_class.values()))),
        by_class=by_class,
        chosen={name: float((chosen_N == k).mean()) for k, name in enumerate(classes.names)},
        auroc=mean_auroc(margin_NK, classes.gold_N),
        d_prime=_d_prime(margin_NK, classes.gold_N),
        mass=float((table["mass_correct"] + table["mass_incorrect"]).mean()),
        kl=float(table["kl"].mean()),
        entropy=float(table["entropy"].mean()),
    )


def margins(table: Table, classes: Classes) -> Array:
    """Log-probability of each class minus that of the best other one, nats. `[N, K]`"""
    score_NK = _scores(table, classes)
    others = [np.delete(score_NK, k, axis=1).max(axis=1) for k in range(score_NK.shape[1])]
    margin_NK: Array = score_NK - np.stack(others, axis=1)
    return margin_NK


def _scores(table: Table, classes: Classes) -> Array:
    """Log-probability of the answer of each class. `[N, K]`"""
    answer_NK = np.stack([table[ANSWER_KEY.format(k)] for k in range(len(classes.names))], axis=1)
    score_NK: Array = np.take_along_axis(answer_NK, classes.order_NK, axis=1)
    return score_NK


def mean_auroc(margin_NK: Array, gold_N: Labels) -> float:
    """Mean over the classes of the AUROC of their margins; NaN if all items have the same gold class."""
    present = np.unique(gold_N)
    if len(present) < 2:
        return float("nan")
    return float(np.mean([auroc(margin_NK[gold_N == k, k], margin_NK[gold_N != k, k]) for k in present]))


def _d_prime(margin_NK: Array, gold_N: Labels) -> float:
    values = []
    for k in np.unique(gold_N):
        positive_N, negative_N = margin_NK[gold_N == k, k], margin_NK[gold_N != k, k]
        if not len(negative_N):
            return float("nan")
        spread = float(np.sqrt((positive_N.var() + negative_N.var()) / 2))
        values.append(float(positive_N.mean() - negative_N.mean()) / spread if spread else float("nan"))
    return float(np.mean(values))


def auroc_difference(before: Table, after: Table, classes: Classes, *, seed: int = 0) -> Interval:
    """AUROC after minus before, with its 95 % interval: a paired bootstrap over items, within the gold classes.

    NaN if all items have the same gold class.
    """
    if len(np.unique(classes.gold_N)) < 2:
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"))
    before_NK, after_NK = margins(before, classes), margins(after, classes)
    random = np.random.default_rng(seed)
    groups = [np.flatnonzero(classes.gold_N == k) for k in np.unique(classes.gold_N)]
    found = []
    for _ in range(DIFFERENCE_RESAMPLES):
        rows = np.concatenate([random.choice(group, len(group)) for group in groups])
        gold_N = classes.gold_N[rows]
        found.append(mean_auroc(after_NK[rows], gold_N) - mean_auroc(before_NK[rows], gold_N))
    low, high = np.quantile(found, [0.025, 0.975])
    mean = mean_auroc(after_NK, classes.gold_N) - mean_auroc(before_NK, classes.gold_N)
    return Interval(mean=float(mean), low=float(low), high=float(high))


def fixed_preference(before: Table, after: Table, items: Sequence[Item], classes: Classes) -> Array:
    """Which items a fixed preference explains: 1 if the plain model with that preference is right, else 0. `[N]`

    The preference is one number per answer text and one per class, added to the plain log-probabilities. It is fitted
    to the change of the log-probabilities in one half of the items and applied to the other half, and vice versa. What
    it does not explain depends on the prompt.
    """
    texts = {text: number for number, text in enumerate(dict.fromkeys(a for item in items for a in item.answers))}
    text_NK = np.array(
        [[texts[item.answers[i]] for i in order] for item, order in zip(items, classes.order_NK, strict=True)]
    )
    score_NK, change_NK = _scores(before, classes), _scores(after, classes) - _scores(before, classes)
    change_NK = change_NK - change_NK.mean(axis=1, keepdims=True)
    num_items, count = text_NK.shape
    design_NKP = np.zeros((num_items, count, len(texts) + count))
    np.put_along_axis(design_NKP, text_NK[..., None], 1.0, axis=2)
    design_NKP[:, range(count), len(texts) + np.arange(count)] = 1.0
    design_NKP -= design_NKP.mean(axis=1, keepdims=True)
    right_N = np.zeros(num_items)
    for half in (0, 1):
        fitted = np.arange(num_items) % 2 == half
        rows = design_NKP[fitted].reshape(-1, design_NKP.shape[2])
        shift_P = np.linalg.lstsq(rows, change_NK[fitted].ravel(), rcond=1e-9)[0]
        chosen_N = (score_NK[~fitted] + design_NKP[~fitted] @ shift_P).argmax(axis=1)
        right_N[~fitted] = chosen_N == classes.gold_N[~fitted]
    return right_N


def problems(plain: Quality, classes: Classes) -> list[str]:
    """Reasons why a task cannot show a gain on this model, one clause each; empty if there is none."""
    found = []
    chance = 1 / len(classes.names)
    if plain.accuracy > 1 - FLOOR_POINTS:
        found.append(f"the plain accuracy of {100 * plain.accuracy:.0f} % is at the ceiling")
    elif plain.accuracy < chance + FLOOR_POINTS:
        found.append(f"the plain accuracy of {100 * plain.accuracy:.0f} % is at chance ({100 * chance:.0f} %) or below")
    if plain.mass < MIN_MASS:
        found.append(f"the answers hold {100 * plain.mass:.1f} % of the probability (at least {100 * MIN_MASS:.0f} %)")
    shares = classes.shares
    if min(shares.values()) * MAX_IMBALANCE < max(shares.values()):
        listed = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
        found.append(f"the right answers are out of balance ({listed})")
    return found


def require_classes(name: str, items: Sequence[Item]) -> Classes:
    """The classes of a task's items.

    Raises:
        EvaluationError: the items have one answer only, or different numbers of answers.
    """
    classes = Classes.of(items)
    if classes is None:
        raise EvaluationError(
            f"Task {name}: a search needs items with several answers, the same number in each; give 'answers' and "
            "'correct' in every line."
        )
    return classes
