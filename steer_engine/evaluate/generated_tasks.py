"""Drawing distinct items for the three splits."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from random import Random

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.items import SPLITS, Item, Sizes, Task

Make = Callable[[Random, str], tuple[Hashable, str, list[str], str]]
"""From a source of chance and a split's name: what identifies the item, prompt, answers, the right one."""

MAX_TRIES = 100
"""Per item, before a space of items counts as used up."""


def draw(name: str, make: Make, sizes: Sizes, seed: int, about: str) -> Task:
    """A task of distinct items; the same seed and sizes give the same task on every machine.

    Raises:
        EvaluationError: there are not that many distinct items.
    """
    seen: set[Hashable] = set()
    splits: dict[str, tuple[Item, ...]] = {}
    for split in SPLITS:
        random = Random(f"{name} {split} {seed}")  # each split has a stream of its own
        items: list[Item] = []
        for number in range(getattr(sizes, split)):
            for _ in range(MAX_TRIES):
                identity, prompt, answers, right = make(random, split)
                if identity not in seen:
                    break
            else:
                raise EvaluationError(f"Task {name} has no {getattr(sizes, split)} distinct {split} items; ask fewer.")
            seen.add(identity)
            where = f"{name} {split} {number}"
            ordered = sorted(answers)
            item = Item(
                id=f"{split}-{number}", prompt=prompt, answers=tuple(ordered), correct=ordered.index(right), where=where
            )
            items.append(item)
        splits[split] = tuple(items)
    return Task(name=name, about=about, **splits)


_NAMES = (
    "Aaron Adam Alan Alex Alice Amy Anderson Andre Andrew Andy Anna Anthony Arthur Austin Blake Brandon Brian Carter "
    "Charles Charlie Christian Christopher Clark Cole Collins Connor Crew Crystal Daniel David Dean Edward Elizabeth "
    "Emily Eric Eva Ford Frank George Georgia Graham Grant Henry Ian Jack Jacob Jake James Jamie Jane Jason Jay "
    "Jennifer Jeremy Jessica John Jonathan Jordan Joseph Joshua Justin Kate Kelly Kevin Kyle Laura Leon Lewis Lisa "
    "Louis Luke Madison Marco Marcus Maria Mark Martin Mary Matthew Max Michael Michelle Morgan Patrick Paul Peter "
    "Prince Rachel Richard River Robert Roman Rose Ruby Russell Ryan Sarah Scott Sean Simon Stephen Steven Sullivan "
    "Taylor Thomas Tyler Victoria Warren William"
)

NAMES = {split: tuple(_NAMES.split()[start::3]) for start, split in enumerate(("derive", "validation", "test"))}
"""Split -> names. Every third name, so that letters and kinds are spread evenly."""


OPENINGS = ("Then", "Later", "Earlier")
SHORT = "{opening}, {first} and {second} went to the {place}. {giver} gave a {object} to"
LONG = (
    "{opening}, {first} and {second} had a long conversation at the {place}, and afterwards {giver} gave a {object} to"
)
PLACES = ("garden", "school", "restaurant", "store", "station", "office", "house", "hospital")
OBJECTS = ("kiss", "necklace", "ring", "drink", "bone", "computer", "snack", "basketball")


def ioi(sizes: Sizes, seed: int) -> Task:
    """Two people, one of them gives: the answer is the other. Both orders of mention, two lengths; splits share no
    name.
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
    """Four rules and four memberships in any order; no puzzle is in two splits, in whatever order its sentences are."""
    return draw("babi15", _babi15, sizes, seed, "bAbI 15: from 'mice are afraid of wolves' and 'Gertrude is a mouse'")


def _babi15(random: Random, split: str) -> tuple[Hashable, str, list[str], str]:
    del split
    fears = {species: random.choice([other for other in PLURALS if other != species]) for species in PLURALS}
    members = {actor: random.choice(list(PLURALS)) for actor in BABI15_ACTORS}
    asked = random.choice(BABI15_ACTORS)
    sentences = [f"{PLURALS[who].capitalize()} are afraid of {PLURALS[whom]}." for who, whom in fears.items()]
    sentences += [f"{actor} is a {species}." for actor, species in members.items()]
    random.shuffle(sentences)
    prompt = f"Passage: {' '.join(sentences)}\nQuestion: What is {asked.lower()} afraid of?\nAnswer:"
    identity = (*fears.values(), *members.values(), asked)
    return identity, prompt, [f" {species}" for species in PLURALS], f" {fears[members[asked]]}"


SPECIES = ("swan", "lion", "frog", "rhino")
COLOURS = ("gray", "white", "yellow", "green")
BABI16_ACTORS = ("Lily", "Bernhard", "Greg", "Julius", "Brian")


def babi16(sizes: Sizes, seed: int) -> Task:
    """Five memberships, four colours; the fifth actor has the species, and so the colour, of another one."""
    return draw("babi16", _babi16, sizes, seed, "bAbI 16: from 'Greg is a swan', 'Greg is gray' and 'Lily is a swan'")


def _babi16(random: Random, split: str) -> tuple[Hashable, str, list[str], str]:
    del split
    colour_of = {species: random.choice(COLOURS) for species in SPECIES}
    asked, kin, *others = random.sample(BABI16_ACTORS, len(BABI16_ACTORS))
    members = {kin: random.choice(SPECIES)}
    members |= {asked: members[kin]} | {actor: random.choice(SPECIES) for actor in others}
    sentences = [f"{actor} is a {species}." for actor, species in members.items()]
    sentences += [f"{actor} is {colour_of[species]}." for actor, species in members.items() if actor != asked]
    random.shuffle(sentences)
    prompt = f"Passage: {' '.join(sentences)}\nQuestion: What color is {asked.lower()}?\nAnswer:"
    identity = (asked, *((actor, members[actor], colour_of[members[actor]]) for actor in BABI16_ACTORS))
    return identity, prompt, [f" {colour}" for colour in COLOURS], f" {colour_of[members[asked]]}"
