"""bAbI 16, basic induction (Weston et al. 2016): what colour has somebody whose kin is known?"""

from __future__ import annotations

from collections.abc import Hashable
from random import Random

from steer_engine.evaluate.tasks.draw import draw
from steer_engine.evaluate.tasks.item import Sizes, Task

SPECIES = ("swan", "lion", "frog", "rhino")
COLOURS = ("gray", "white", "yellow", "green")
ACTORS = ("Lily", "Bernhard", "Greg", "Julius", "Brian")


def babi16(sizes: Sizes, seed: int) -> Task:
    """Five memberships, four colours; the fifth actor has the species, and so the colour, of another one."""
    return draw("babi16", _make, sizes, seed, "bAbI 16: from 'Greg is a swan', 'Greg is gray' and 'Lily is a swan'")


def _make(random: Random, split: str) -> tuple[Hashable, str, list[str], str]:
    del split
    colour_of = {species: random.choice(COLOURS) for species in SPECIES}
    asked, kin, *others = random.sample(ACTORS, len(ACTORS))
    members = {kin: random.choice(SPECIES)}
    members |= {asked: members[kin]} | {actor: random.choice(SPECIES) for actor in others}
    sentences = [f"{actor} is a {species}." for actor, species in members.items()]
    sentences += [f"{actor} is {colour_of[species]}." for actor, species in members.items() if actor != asked]
    random.shuffle(sentences)
    prompt = f"Passage: {' '.join(sentences)}\nQuestion: What color is {asked.lower()}?\nAnswer:"
    identity = (asked, *((actor, members[actor], colour_of[members[actor]]) for actor in ACTORS))
    return identity, prompt, [f" {colour}" for colour in COLOURS], f" {colour_of[members[asked]]}"
