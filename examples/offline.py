"""Derive a vector from captured activations, and steer with it, in one process without a server.

python examples/offline.py
"""

from __future__ import annotations

import numpy as np
from vllm import SamplingParams

from steer_engine import LLM, ControlVector

CHEERFUL = [
    "I love mornings.",
    "What a wonderful surprise!",
    "I am so proud of my team.",
    "Today everything went right.",
]
GLOOMY = ["I dread mornings.", "What a horrible shock!", "I am so ashamed of my team.", "Today everything went wrong."]
PROMPT = "My day was"


def main() -> None:
    llm = LLM("smollm2-135m", capture=True, dtype="float32", enforce_eager=True, max_model_len=512)
    # One array per text: [blocks, 1, D], the residual stream after the last token.
    cheerful, gloomy = (np.mean(llm.capture(texts), axis=0)[:, 0] for texts in (CHEERFUL, GLOOMY))
    rows_LD = (cheerful - gloomy).astype(np.float32)
    vector = ControlVector(directions=dict(zip(llm.capture_blocks, rows_LD, strict=True))).restrict(range(8, 20))
    llm.vectors.add("cheerful", vector)

    for scale in (-0.2, 0.0, 0.2):
        steering = {"edits": [{"vector": "cheerful", "scale": scale}]}
        params = SamplingParams(temperature=0, max_tokens=40, repetition_penalty=1.1, extra_args={"steering": steering})
        (answer,) = llm.generate(PROMPT, params, use_tqdm=False)
        print(f"{scale:+g}: {PROMPT}{answer.outputs[0].text}")


if __name__ == "__main__":
    main()
