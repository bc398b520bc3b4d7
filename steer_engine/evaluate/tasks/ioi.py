"""Indirect object identification: who was given something? (Wang et al. 2023; as in Højer et al. 2025)"""

from __future__ import annotations

from collections.abc import Hashable
from random import Random

from steer_engine.evaluate.tasks.draw import draw
from steer_engine.evaluate.tasks.item import Sizes, Task
from steer_engine.evaluate.tasks.names import NAMES

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
    return draw("ioi", _make, sizes, seed, about)


def _make(random: Random, split: str) -> tuple[Hashable, str, list[str], str]:
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
