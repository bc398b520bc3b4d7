"""The demo's prompts, and the scores of its answers: sentiment, repetition and length.

Scale and blocks were chosen on answers to DEV. SHOWN and HELD_OUT were run only with that choice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

DEV = (
    "How was your weekend?",
    "Describe the view from your window.",
    "What do you think about your neighbours?",
    "Tell me about the last film you saw.",
    "How did you sleep last night?",
    "What is your garden like in the spring?",
    "Tell me about your best friend.",
    "What happened at the shop today?",
    "How is your new flat?",
    "What do you expect from the meeting?",
)

SHOWN = (
    "How are you feeling today?",
    "What is it like to live in a small town?",
    "Tell me about the weather this week.",
)

HELD_OUT = (
    "Tell me about your day.",
    "How is your job going?",
    "What was your childhood like?",
    "Describe your breakfast this morning.",
    "What do you think about winter?",
    "How was the train ride?",
    "Tell me about your family.",
    "What is your house like?",
    "How did the exam go?",
    "Describe a walk in the park.",
    "What do you remember about school?",
    "How is the food at that restaurant?",
    "Tell me about your holiday.",
    "What happened on your birthday?",
    "How do you feel about Mondays?",
    "Describe your last visit to the doctor.",
    "What is your town like at night?",
    "Tell me about your dog.",
    "How was the concert?",
    "What do you see in your future?",
)

MAX_P = 0.01
"""Shifts with a p-value below this are significant."""

MIN_DISTINCT = 0.6
"""Smallest share of distinct words in a short answer that does not repeat itself. Fluent answers have 0.75 to 0.9."""

MAX_DISTINCT_LOSS = 0.1
"""Largest accepted loss of the share of distinct words, compared with unsteered answers."""

MIN_LENGTH_SHARE = 0.5
"""Smallest accepted length of steered answers, as a share of the length of unsteered ones."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """Answers to one list of prompts at one scale; scale 0 is unsteered."""

    scale: float
    answers: tuple[str, ...]

    @property
    def sentiments(self) -> list[float]:
        """VADER's compound score of each answer, -1 to 1."""
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyzer = SentimentIntensityAnalyzer()
        return [float(analyzer.polarity_scores(answer)["compound"]) for answer in self.answers]

    @property
    def distinct(self) -> float:
        """Share of distinct words in an answer, averaged over answers."""
        return fmean(len(set(words)) / len(words) if words else 0.0 for words in map(words_of, self.answers))

    @property
    def length(self) -> float:
        """Mean number of words per answer."""
        return fmean(len(words_of(answer)) for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Mean change of sentiment from one side to another, paired by prompt. p: one-sided Wilcoxon signed-rank test."""

    name: str
    mean: float
    p: float

    @property
    def significant(self) -> bool:
        return self.mean > 0 and self.p < MAX_P


def shift(name: str, low: Side, high: Side) -> Shift:
    """Compare the sentiment of two sides, which answer the same prompts in the same order."""
    from scipy.stats import wilcoxon

    differences = [after - before for before, after in zip(low.sentiments, high.sentiments, strict=True)]
    p = 1.0 if not any(differences) else float(wilcoxon(differences, alternative="greater").pvalue)
    return Shift(name=name, mean=fmean(differences), p=p)


def find_faults(plain: Side, steered: Sequence[Side], shifts: Sequence[Shift]) -> list[str]:
    """Reasons why the answers do not demonstrate steering; empty if they do."""
    faults = [
        f"the shift {shift.name} is {shift.mean:+.2f} with p = {shift.p:.2g}, not a rise with p < {MAX_P}"
        for shift in shifts
        if not shift.significant
    ]
    for side in steered:
        if side.distinct < max(MIN_DISTINCT, plain.distinct - MAX_DISTINCT_LOSS):
            faults.append(f"answers at scale {side.scale:+g} repeat themselves: {side.distinct:.2f} distinct words")
        if side.length < MIN_LENGTH_SHARE * plain.length:
            faults.append(f"answers at scale {side.scale:+g} are too short: {side.length:.0f} words")
    return faults


def words_of(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())
