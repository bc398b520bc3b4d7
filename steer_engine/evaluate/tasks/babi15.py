"""bAbI 15, basic deduction (Weston et al. 2016): what is somebody of a species afraid of?"""

from __future__ import annotations

from collections.abc import Hashable
from random import Random

from steer_engine.evaluate.tasks.draw import draw
from steer_engine.evaluate.tasks.item import Sizes, Task

PLURALS = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "cat": "cats"}
ACTORS = ("Gertrude", "Winona", "Jessica", "Emily")


def babi15(sizes: Sizes, seed: int) -> Task:
    """Four rules and four memberships in any order; no puzzle is in two splits, in whatever order its sentences are."""
    return draw("babi15", _make, sizes, seed, "bAbI 15: from 'mice are afraid of wolves' and 'Gertrude is a mouse'")


def _make(random: Random, split: str) -> tuple[Hashable, str, list[str], str]:
    del split
    fears = {species: random.choice([other for other in PLURALS if other != species]) for species in PLURALS}
    members = {actor: random.choice(list(PLURALS)) for actor in ACTORS}
    asked = random.choice(ACTORS)
    sentences = [f"{PLURALS[who].capitalize()} are afraid of {PLURALS[whom]}." for who, whom in fears.items()]
    sentences += [f"{actor} is a {species}." for actor, species in members.items()]
    random.shuffle(sentences)
    prompt = f"Passage: {' '.join(sentences)}\nQuestion: What is {asked.lower()} afraid of?\nAnswer:"
    identity = (*fears.values(), *members.values(), asked)
    return identity, prompt, [f" {species}" for species in PLURALS], f" {fears[members[asked]]}"
