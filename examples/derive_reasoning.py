"""A vector from a model's own correct and wrong answers, as Højer et al. (ICLR 2025) make theirs for GSM8K.

python examples/derive_reasoning.py [MODEL]

The model answers each question several times. A correct and a wrong answer to the same question are a pair. Use
`steer-engine eval` on the resulting file: it measures on held-out questions, with controls and intervals, whether the
vector helps. Most do not: in the paper too, gains are a few points, for single models and tasks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

from steer_engine.derive.make_pairs import Question
from steer_engine.derive.own_answers import derive_from_answers
from steer_engine.vectors import save

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
OUT = Path("reasoning.safetensors")


def questions(count: int, seed: int = 0) -> list[Question]:
    random = Random(seed)
    made = []
    for _ in range(count):
        had, bought, eaten = random.randint(2, 9), random.randint(2, 9), random.randint(1, 3)
        prompt = (
            f"Question: Ann has {had} apples. She buys {bought} more and eats {eaten}. How many apples has she now?\n"
            "Answer: Ann has"
        )
        made.append(Question(prompt=prompt, answer=str(had + bought - eaten)))
    return made


def main() -> None:
    sums = questions(60)
    # The rows are captured while the model answers: no second pass over the answers.
    pairs, vector = derive_from_answers(
        MODEL,
        sums,
        samples=8,
        max_tokens=24,
        temperature=0.8,
        method="pca_centred",
        blocks="15",
        engine_args={"dtype": "float32"},
    )
    print(f"{len(pairs)} of {len(sums)} questions have both a correct and a wrong answer")
    print(f"held-out AUROC {vector.metadata.separation[15]:.3f}, {vector.digest}")
    OUT.unlink(missing_ok=True)
    save(vector, OUT)
    print(f"written to {OUT}; to measure whether it helps: steer-engine eval --help")


if __name__ == "__main__":
    main()
