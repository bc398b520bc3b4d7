"""Derive a vector from packaged contrast pairs, print its quality, and steer with it.

python examples/derive_sentiment.py [MODEL]
"""

from __future__ import annotations

import sys

from vllm import SamplingParams

from steer_engine import LLM
from steer_engine.derive import derive

MODEL = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
PROMPT = "My day was"


def main() -> None:
    # A Ray actor hosts the engine that captures; `actors=4` starts four, `ray_address="auto"` uses a cluster.
    vector = derive(MODEL, "sentiment", blocks="8-19", dtype="float32")
    print(f"{vector.digest}: {vector.metadata.notes}")
    for block, auroc in sorted(vector.metadata.separation.items()):
        print(f"block {block:2}: |v| = {vector.norms[block]:.2f}, held-out AUROC {auroc:.3f}")

    llm = LLM(MODEL, vectors={"cheerful": vector}, dtype="float32", enforce_eager=True, max_model_len=512)
    for scale in (-0.3, 0.0, 0.3):
        steering = {"edits": [{"vector": "cheerful", "scale": scale}]}
        params = SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.1, extra_args={"steering": steering})
        (answer,) = llm.generate(PROMPT, params, use_tqdm=False)
        print(f"{scale:+g}: {PROMPT}{answer.outputs[0].text}")


if __name__ == "__main__":
    main()
