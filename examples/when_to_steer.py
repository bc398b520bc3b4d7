"""When to steer: a window of the answer, a trigger, a schedule and a condition, in one process without a server.

python examples/when_to_steer.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm import SamplingParams

from steer_engine import LLM, ControlVector

CHEERFUL = ["I love mornings.", "What a wonderful surprise!", "I am so proud of my team.", "Everything went right."]
GLOOMY = ["I dread mornings.", "What a horrible shock!", "I am so ashamed of my team.", "Everything went wrong."]

TURN = "<|im_start|>{role}\n{text}<|im_end|>\n"
ANSWER = "<|im_start|>assistant\n"
GOOD_DAY, BAD_DAY = "I passed all my exams today, I am so happy!", "I failed all my exams today, I am so sad."

LINEAR = {"kind": "linear", "over": 24, "to": 0.0}
SAD = {"vector": "cheerful", "blocks": 8, "below": -0.038}
"""Holds if the last token of the prompt points away from the vector."""

EDITS: dict[str, dict[str, Any]] = {
    "nowhere": {"scale": 0.0},
    "everywhere": {},
    "first 8 tokens of the answer": {"scope": {"from": "generation", "end": 8}},
    "the assistant's turns": {"scope": {"after": ANSWER, "until": "<|im_end|>", "each": True}},
    "the answer, fading": {"scope": "generation", "schedule": LINEAR},
    "if the prompt is sad": {"when": SAD},
}


def main() -> None:
    llm = LLM("smollm2-135m", capture=True, dtype="float32", enforce_eager=True, max_model_len=512)
    cheerful, gloomy = (np.mean(llm.capture(texts), axis=0)[:, 0] for texts in (CHEERFUL, GLOOMY))
    rows_LD = (cheerful - gloomy).astype(np.float32)
    vector = ControlVector(directions=dict(zip(llm.capture_blocks, rows_LD, strict=True))).restrict(range(8, 20))
    llm.vectors.add("cheerful", vector)

    for day in (BAD_DAY, GOOD_DAY):
        print(f"\n{day}")
        prompt = TURN.format(role="user", text=day) + ANSWER
        for name, fields in EDITS.items():
            steering = {"edits": [{"vector": "cheerful", "scale": 0.25} | fields]}
            params = SamplingParams(
                temperature=0, max_tokens=24, repetition_penalty=1.1, extra_args={"steering": steering}
            )
            (answer,) = llm.generate(prompt, params, use_tqdm=False)
            edits, conditions = answer.steering["edits"], answer.steering.get("conditions", [])
            covered = edits[0]["applied_tokens"] if edits else 0
            values = "".join(f", value {each['value']:+.3f}" for each in conditions)
            print(f"  {name} ({covered} tokens{values}): {answer.outputs[0].text!r}")


if __name__ == "__main__":
    main()
