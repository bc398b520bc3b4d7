"""Reasoning tasks: the answer follows from the prompt, positions are balanced, and splits share no name and no word."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest

from steer_engine.evaluate.quality import require_classes
from steer_engine.evaluate.reasoning_tasks import CYCLES, KINDS, MAKERS, NAMES, NUMBERS, WORDS
from steer_engine.evaluate.tasks import Item, Sizes, Task, load_task

SIZES = Sizes(derive=60, validation=60, test=1000)

KIND_OF = {word: kind for kind, splits in KINDS.items() for words in splits.values() for word in words}


@pytest.fixture(scope="module", params=MAKERS)
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param, SIZES, seed=1)


def shown(item: Item) -> list[str]:
    """The words of a prompt `Words: a, b, c.` or `Q: a b c`."""
    line = item.prompt.splitlines()[0]
    return re.findall(r"\w+", line)[1:]


def people(item: Item) -> dict[str, str]:
    return dict(re.findall(r"(\w+) has the (\w+)\.", item.prompt))


def compared(item: Item) -> dict[str, int]:
    """Person -> height: the facts are a chain, so that sorting by them has one result."""
    taller = []
    for first, word, second in re.findall(r"(\w+) is (\w+) than (\w+)\.", item.prompt):
        taller.append((first, second) if word in ("taller", "older", "faster") else (second, first))
    names = {name for pair in taller for name in pair}
    heights = dict.fromkeys(names, 0)
    for _ in names:
        for high, low in taller:
            heights[high] = max(heights[high], heights[low] + 1)
    return heights


def solve(name: str, item: Item) -> str:
    """The right answer, from the text of the prompt alone."""
    prompt = item.prompt
    if name in ("compare", "order"):
        heights = compared(item)
        if "in between" in prompt:
            return sorted(heights, key=heights.__getitem__)[1]
        high = re.search(r"Who is (?:the )?(tall|old|fast)", prompt) is not None
        return (max if high else min)(heights, key=heights.__getitem__)
    if name == "order-yes-no":
        heights = compared(item)
        ((one, word, other),) = re.findall(r"Is (\w+) (\w+) than (\w+)\?", prompt)
        higher = heights[one] > heights[other]
        return "Yes" if higher == (word in ("taller", "older", "faster")) else "No"
    if name == "lookup":
        return people(item)[re.findall(r"does (\w+) have", prompt)[0]]
    if name == "owner":
        return {what: who for who, what in people(item).items()}[re.findall(r"Who has the (\w+)", prompt)[0]]
    if name == "key-value":
        return dict(re.findall(r"(\w+): (\w+)", prompt))[re.findall(r"(\w+):$", prompt)[0]]
    if name == "pick-value":
        return dict(re.findall(r"([A-Z]\w+) ([a-z]\w*)", prompt))[re.findall(r"; (\w+)\n", prompt)[0]]
    if name == "position":
        return shown(item)[("first", "second", "third").index(re.findall(r"the (\w+) word\?", prompt)[0])]
    if name in ("last-word", "first-word"):
        return shown(item)[-1 if name == "last-word" else 0]
    if name in ("repeated", "pick-repeated"):
        return Counter(shown(item)).most_common(1)[0][0]
    if name in ("extremum", "pick-largest"):
        largest = name == "pick-largest" or "largest" in prompt
        return (max if largest else min)(shown(item), key=NUMBERS.index)
    if name in ("odd-one-out", "pick-odd"):
        kinds = Counter(KIND_OF[word] for word in shown(item))
        return next(word for word in shown(item) if kinds[KIND_OF[word]] == 1)
    if name in ("category", "pick-animal", "pick-fruit", "pick-colour"):
        kind = {"pick-animal": "an animal", "pick-fruit": "a fruit", "pick-colour": "a colour"}.get(name)
        kind = kind or re.findall(r"Which word is (.+)\?", prompt)[0]
        return next(word for word in shown(item) if KIND_OF[word] == kind)
    if name == "option-letter":
        kind = re.findall(r"Which word is (.+)\?", prompt)[0]
        return next(letter for letter, word in re.findall(r"([ABC])\. (\w+)", prompt) if KIND_OF[word] == kind)
    if name == "next-item":
        ((kind, word, this),) = re.findall(r"Which (\w+) comes right (\w+) (\w+)\?", prompt)
        return CYCLES[kind][CYCLES[kind].index(this) + (1 if word == "after" else -1)]
    if name == "where-is":
        return dict(re.findall(r"(\w+) went to the (\w+)\.", prompt))[re.findall(r"Where is (\w+)\?", prompt)[0]]
    if name == "carried":
        facts = re.findall(r"(\w+) (went to|took|left) the (\w+)", prompt)
        carrier = next(who for who, what, _ in facts if what == "took")
        place = ""
        for who, what, thing in facts:
            if what == "left":
                break
            if who == carrier and what == "went to":
                place = thing
        return place
    if name == "context-or-memory":
        ((country, told),) = re.findall(r"the capital of (\w+) is (\w+)\.", prompt)
        del country
        (other,) = [answer.strip() for answer in item.answers if answer.strip() != told]
        return told if "in the story?" in prompt else other
    if name == "arithmetic":
        numbers = ("zero", *NUMBERS)
        ((first, _, verb, second),) = re.findall(r"has (\w+) (\w+) and (\w+) (\w+)\.", prompt)
        sign = 1 if verb == "gets" else -1
        return numbers[numbers.index(first) + sign * numbers.index(second)]
    if name == "ioi-three":
        names = Counter(re.findall(r"\b[A-Z]\w+\b", prompt)[1:])
        return next(name for name, count in names.items() if count == 1)
    assert name == "syllogism"
    follows = dict(re.findall(r"All (\w+) are (\w+)\.", prompt))
    ((subject, predicate),) = re.findall(r"Are all (\w+) (\w+)\?", prompt)
    return "Yes" if follows.get(follows.get(subject, "")) == predicate else "No"


def test_every_answer_follows_from_its_prompt(task: Task) -> None:
    assert [item.target.strip() for item in task.items] == [solve(task.name, item) for item in task.items]


def test_the_place_of_the_right_answer_says_nothing(task: Task) -> None:
    """Except for the two tasks whose rule is a place."""
    shares = require_classes(task.name, task.test).shares
    if task.name in ("last-word", "first-word"):
        assert max(shares.values()) == 1.0
    else:
        fair = 1 / len(shares)
        # Six standard deviations of a fair draw; `arithmetic` has its smallest answers slightly less often.
        assert all(abs(share - fair) < 6 * (fair / 1000) ** 0.5 + 0.05 for share in shares.values()), shares


def test_no_open_word_is_in_two_splits() -> None:
    for vocabulary in (NAMES, WORDS, *KINDS.values()):
        sets = [set(words) for words in vocabulary.values()]
        assert all(not one & other for one, other in (*pairwise(sets), (sets[0], sets[2])))
        assert sum(map(len, sets)) == len(set().union(*sets))  # and none is listed twice


def test_splits_of_a_task_share_no_open_word(task: Task) -> None:
    for vocabulary in (NAMES, WORDS):
        for split, words in vocabulary.items():
            others = {word for name, each in vocabulary.items() if name != split for word in each}
            fixed = {word for each in KINDS.values() for group in each.values() for word in group} | set(words)
            used = {word for item in getattr(task, split) for word in re.findall(r"\w+", item.prompt)}
            assert not used & (others - fixed)
