"""Loads tasks: generated ones (IOI, bAbI 15 and 16), or from a JSONL file. Also loads packaged neutral texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from importlib import resources
from pathlib import Path
from random import Random
from typing import Any

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.items import SPLITS, Item, Sizes, Task
from steer_engine.evaluate.reasoning_tasks import MAKERS, NAMES, Make

__all__ = ["NAMES", "PAPER_TASKS", "TASKS", "Item", "Sizes", "Task", "load_task"]

MAX_TRIES = 100
"""Draws per item, until the generator counts as exhausted."""

MAX_ANSWERS = 1024
"""Largest number of answers of one item."""

_KEYS = {"prompt", "answers", "correct", "answer", "split", "id"}
_FORMS = '{"prompt": ..., "answers": [" a", " b"], "correct": 0} or {"prompt": ..., "answer": " text"}'


def load_task(name_or_path: str, sizes: Sizes, *, seed: int = 0, shots: int = 0) -> Task:
    """Load a generated task by name, or a task from a JSONL file, with `shots` solved examples before each prompt.

    Raises:
        EvaluationError: the task or file does not exist, or an item is invalid; the message names the line.
    """
    if name_or_path in TASKS:
        task = TASKS[name_or_path](sizes, seed)
    elif Path(name_or_path).is_file():
        task = _load_jsonl(Path(name_or_path), sizes, seed)
    else:
        raise EvaluationError(f"There is no task or file {name_or_path[:256]!r}; tasks are {', '.join(TASKS)}.")
    return task.with_shots(shots)


def neutral_texts() -> list[str]:
    """Packaged everyday texts that end in the middle of a sentence. They show side effects of steering."""
    data = resources.files("steer_engine.evaluate").joinpath("data/neutral.txt").read_text(encoding="utf-8")
    return [line for line in data.splitlines() if line.strip()]


def draw(name: str, make: Make, sizes: Sizes, seed: int, about: str) -> Task:
    """Draw a task of distinct items. The same seed and sizes give the same task on every machine.

    Raises:
        EvaluationError: the generator has fewer distinct items than `sizes` requests.
    """
    seen: set[Hashable] = set()
    splits: dict[str, tuple[Item, ...]] = {}
    for split in SPLITS:
        random = Random(f"{name} {split} {seed}")  # one random stream per split
        items: list[Item] = []
        for number in range(getattr(sizes, split)):
            for _ in range(MAX_TRIES):
                identity, prompt, answers, right = make(random, split)
                if identity not in seen:
                    break
            else:
                raise EvaluationError(
                    f"Task {name} has fewer than {getattr(sizes, split)} distinct {split} items; request fewer."
                )
            seen.add(identity)
            where = f"{name} {split} {number}"
            ordered = sorted(answers)
            item = Item(
                id=f"{split}-{number}", prompt=prompt, answers=tuple(ordered), correct=ordered.index(right), where=where
            )
            items.append(item)
        splits[split] = tuple(items)
    return Task(name=name, about=about, **splits)


OPENINGS = ("Then", "Later", "Earlier")
SHORT = "{opening}, {first} and {second} went to the {place}. {giver} gave a {object} to"
LONG = (
    "{opening}, {first} and {second} had a long conversation at the {place}, and afterwards {giver} gave a {object} to"
)
PLACES = ("garden", "school", "restaurant", "store", "station", "office", "house", "hospital")
OBJECTS = ("kiss", "necklace", "ring", "drink", "bone", "computer", "snack", "basketball")


def ioi(sizes: Sizes, seed: int) -> Task:
    """Indirect object identification: one of two people gives something; the answer is the other person.

    Prompts mention the two in either order and have two lengths. No name appears in two splits.
    """
    about = "indirect object identification: the answer is the person who has not been named twice"
    return draw("ioi", _ioi, sizes, seed, about)


def _ioi(random: Random, split: str) -> tuple[Hashable, str, list[str], str]:
    receiver, giver = random.sample(NAMES[split], 2)
    first, second = random.choice([(receiver, giver), (giver, receiver)])  # ABB and BAB
    prompt = random.choice([SHORT, LONG]).format(
        opening=random.choice(OPENINGS),
        first=first,
        second=second,
        place=random.choice(PLACES),
        giver=giver,
        object=random.choice(OBJECTS),
    )
    return prompt, prompt, [f" {receiver}", f" {giver}"], f" {receiver}"


PLURALS = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"}
BABI15_ACTORS = ("Gertrude", "Winona", "Jessica", "Emily")


def babi15(sizes: Sizes, seed: int) -> Task:
    """Four rules and four memberships in random order. No puzzle appears in two splits, not even reordered."""
    return draw("babi15", _babi15, sizes, seed, "bAbI 15: from 'mice are afraid of wolves' and 'Gertrude is a mouse'")


def _babi15(random: Random, split: str) -> tuple[Hashable, str, list[str], str]:
    del split
    fears = {species: random.choice([other for other in PLURALS if other != species]) for species in PLURALS}
    members = {actor: random.choice(list(PLURALS)) for actor in BABI15_ACTORS}
    subject = random.choice(BABI15_ACTORS)
    sentences = [f"{PLURALS[who].capitalize()} are afraid of {PLURALS[whom]}." for who, whom in fears.items()]
    sentences += [f"{actor} is a {species}." for actor, species in members.items()]
    random.shuffle(sentences)
    prompt = f"Passage: {' '.join(sentences)}\nQuestion: What is {subject.lower()} afraid of?\nAnswer:"
    identity = (*fears.values(), *members.values(), subject)
    return identity, prompt, [f" {species}" for species in PLURALS], f" {fears[members[subject]]}"


SPECIES = ("swan", "lion", "frog", "rhino")
COLOURS = ("gray", "white", "yellow", "green")
BABI16_ACTORS = ("Lily", "Bernhard", "Greg", "Julius", "Brian")


def babi16(sizes: Sizes, seed: int) -> Task:
    """Five memberships, four colours. The fifth actor has the same species, and so the same colour, as another."""
    return draw("babi16", _babi16, sizes, seed, "bAbI 16: from 'Greg is a swan', 'Greg is gray' and 'Lily is a swan'")


def _babi16(random: Random, split: str) -> tuple[Hashable, str, list[str], str]:
    del split
    colour_of = {species: random.choice(COLOURS) for species in SPECIES}
    subject, kin, *others = random.sample(BABI16_ACTORS, len(BABI16_ACTORS))
    members = {kin: random.choice(SPECIES)}
    members |= {subject: members[kin]} | {actor: random.choice(SPECIES) for actor in others}
    sentences = [f"{actor} is a {species}." for actor, species in members.items()]
    sentences += [f"{actor} is {colour_of[species]}." for actor, species in members.items() if actor != subject]
    random.shuffle(sentences)
    prompt = f"Passage: {' '.join(sentences)}\nQuestion: What color is {subject.lower()}?\nAnswer:"
    identity = (subject, *((actor, members[actor], colour_of[members[actor]]) for actor in BABI16_ACTORS))
    return identity, prompt, [f" {colour}" for colour in COLOURS], f" {colour_of[members[subject]]}"


def _drawn(name: str, make: Make) -> Callable[[Sizes, int], Task]:
    about = " ".join((make.__doc__ or "").split())
    return lambda sizes, seed: draw(name, make, sizes, seed, about)


PAPER_TASKS: dict[str, Callable[[Sizes, int], Task]] = {"ioi": ioi, "babi15": babi15, "babi16": babi16}
"""Name -> generator of the tasks of Højer et al. that need no data set."""

TASKS = PAPER_TASKS | {name: _drawn(name, make) for name, make in MAKERS.items()}
"""Name -> generator of every packaged task."""


def _load_jsonl(path: Path, sizes: Sizes, seed: int) -> Task:
    """Load a task from a file of JSON lines.

    A line has a `prompt`, and either `answers` with `correct` (index of the right one), or one `answer` that the
    generated text must begin with. If the lines name their `split` ("derive", "validation", "test"), all of them must.
    Otherwise items are shuffled with `seed` and divided in the proportions of `sizes`.

    Raises:
        EvaluationError: the file or an item is invalid; the message names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}).") from None
    parsed = [_parse_line(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if len(parsed) < 3 * 2:
        raise EvaluationError(f"{path}: {len(parsed)} item(s); at least 2 for each of {', '.join(SPLITS)} are needed.")
    named = [split for _, split in parsed if split]
    if named and len(named) < len(parsed):
        where = next(item.where for item, split in parsed if not split)
        raise EvaluationError(f"{where}: no 'split', but other lines have one; give it in all lines or in none.")
    items = [item for item, _ in parsed]
    splits = (
        {name: tuple(item for item, split in parsed if split == name) for name in SPLITS}
        if named
        else _divide(items, sizes, seed)
    )
    for name in SPLITS:
        if len(splits[name]) < 2:
            raise EvaluationError(f"{path}: {len(splits[name])} item(s) of split {name!r}; at least 2 are needed.")
    return Task(name=path.stem, about=str(path.name), **splits)


def _divide(items: list[Item], sizes: Sizes, seed: int) -> dict[str, tuple[Item, ...]]:
    """Shuffle items and divide them by `sizes`, or in the same proportions if there are too few items."""
    shuffled = list(items)
    Random(f"jsonl {seed}").shuffle(shuffled)
    share = min(1.0, len(shuffled) / sizes.total)
    num_derive, num_validation = max(2, int(sizes.derive * share)), max(2, int(sizes.validation * share))
    num_test = sizes.test if share == 1.0 else len(shuffled)
    first, second = num_derive, num_derive + num_validation
    return {
        "derive": tuple(shuffled[:first]),
        "validation": tuple(shuffled[first:second]),
        "test": tuple(shuffled[second : second + num_test]),
    }


def _parse_line(line: str, where: str) -> tuple[Item, str]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: not JSON ({error}).") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise EvaluationError(f"{where}: not an object with a string 'prompt'; valid is {_FORMS}.")
    if unknown := entry.keys() - _KEYS:
        raise EvaluationError(
            f"{where}: unknown key {sorted(unknown)[0][:64]!r}; known are {', '.join(sorted(_KEYS))}."
        )
    if ("answer" in entry) == ("answers" in entry) or ("correct" in entry) != ("answers" in entry):
        raise EvaluationError(f"{where}: valid is {_FORMS}.")
    answers = [entry["answer"]] if "answer" in entry else entry["answers"]
    correct = entry.get("correct", 0)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise EvaluationError(f"{where}: answers must be strings.")
    if "answers" in entry and not 2 <= len(answers) <= MAX_ANSWERS:
        raise EvaluationError(f"{where}: {len(answers)} answers; valid are 2 to {MAX_ANSWERS}.")
    if isinstance(correct, bool) or not isinstance(correct, int):
        raise EvaluationError(f"{where}: 'correct' is not a number.")
    split = entry.get("split", "")
    if split not in ("", *SPLITS):
        raise EvaluationError(f"{where}: split {str(split)[:64]!r} is none of {', '.join(SPLITS)}.")
    name = str(entry.get("id", where))
    return Item(id=name, prompt=entry["prompt"], answers=tuple(answers), correct=correct, where=where), split
