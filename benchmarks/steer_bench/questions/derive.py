"""How many texts per second are captured to derive a vector, compared with repeng at its best batch size?

Last token, all blocks, texts of different lengths. repeng gets the texts sorted by length, Steer Engine unsorted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import numpy as np
from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.batch_sizes import row, sweep
from steer_bench.environments import REPENG, python_of
from steer_bench.mode import engine_of
from steer_bench.process import ArmProcess
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import interleave
from steer_bench.settings import Settings

BATCH_SIZES = (4, 8, 16, 32, 64)
NUM_TEXTS = 400
FEWEST_WORDS, MOST_WORDS = 4, 100
MIN_COSINE = 0.9999
"""Smallest allowed cosine between the rows that both capture for the same text and block."""


def ragged_texts(num_texts: int, seed: int = 0) -> list[str]:
    """Alternating positive and negative texts: packaged sentences, shuffled, joined and cut.

    Lengths are log-uniform: between 4 and 20 words is as likely as between 20 and 100.
    """
    from steer_engine.derive import load_pairs

    random = Random(seed)
    pairs = load_pairs("sentiment")
    sides = [pair.positive for pair in pairs], [pair.negative for pair in pairs]
    texts: list[str] = []
    for number in range(num_texts):
        num_words = round(FEWEST_WORDS * (MOST_WORDS / FEWEST_WORDS) ** random.random())
        words: list[str] = []
        while len(words) < num_words:
            words += random.choice(sides[number % 2]).split()
        texts.append(" ".join(words[:num_words]))
    return texts


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    texts = ragged_texts(64 if quick else NUM_TEXTS)
    with ArmProcess("reader", settings) as ours, ArmProcess("repeng", settings, python=python_of(REPENG)) as repeng:
        repeng.command("threads", value=ours.facts["threads"])
        for fact in ("num_blocks", "dtype"):
            assert ours.facts[fact] == repeng.facts[fact], f"{fact}: {ours.facts[fact]} against {repeng.facts[fact]}"
        assert ours.facts["read_blocks"] == ours.facts["num_blocks"]
        least = _least_cosine(ours, repeng, texts)
        assert least >= MIN_COSINE, f"The captured rows differ: smallest cosine {least:.6f}, allowed {MIN_COSINE}."

        def theirs_at(batch_size: int) -> float:
            return len(texts) / float(repeng.command("capture", texts=texts, batch_size=batch_size))

        best, rows = sweep(theirs_at, BATCH_SIZES, "repeng", progress, "derive")
        cases = {
            f"repeng, batches of {best}": lambda _: theirs_at(best),
            "Steer Engine": lambda _: len(texts) / float(ours.command("capture", texts=texts)),
        }
        rates = interleave(cases, 3 if quick else 5, progress, "derive")
        rows += [row("rounds", name, rates[name]) for name in rates]
        theirs, mine = rates.values()
        ratio = Ratio.of(mine, theirs)
        rows[-1]["ratio"] = str(ratio)
        read = f"{len(texts)} texts, last token read at {ours.facts['num_blocks']} blocks"
        mode = f"{engine_of(ours.facts)}, {read}, {settings.dtype}"
        claim = Claim.of_ratio("texts read / repeng at its best", ratio, Target(at_least=1.5), mode=mode)
        facts = {"ours": ours.facts, "repeng": repeng.facts, "least_cosine": least}
        return Answer(question="derive", claims=[claim], rows=rows, facts=facts)


def _least_cosine(ours: ArmProcess, repeng: ArmProcess, texts: list[str]) -> float:
    """Smallest cosine between the rows of both, over texts and blocks. Also the warm-up run of both.

    Excludes the last block: there repeng uses Hugging Face's last hidden state, which is after the final norm.
    """
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = Path(folder) / "ours.npy", Path(folder) / "repeng.npy"
        ours.command("capture", texts=texts, save=str(mine))
        repeng.command("capture", texts=texts, batch_size=16, save=str(theirs))
        return float(cosines(np.load(mine)[:, :-1], np.load(theirs)[:, :-1]).min())


def cosines(a_NLD: np.ndarray, b_NLD: np.ndarray) -> np.ndarray:
    """Cosines of corresponding rows, float64 [N, L]. Raises ValueError if the shapes differ."""
    if a_NLD.shape != b_NLD.shape:
        raise ValueError(f"Rows of shapes {a_NLD.shape} and {b_NLD.shape} cannot be compared.")
    a_NLD, b_NLD = a_NLD.astype(np.float64), b_NLD.astype(np.float64)
    lengths_NL = np.linalg.norm(a_NLD, axis=-1) * np.linalg.norm(b_NLD, axis=-1)
    cosines_NL: np.ndarray = (a_NLD * b_NLD).sum(-1) / lengths_NL
    return cosines_NL
