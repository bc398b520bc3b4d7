"""Watch an answer change its tone, token by token, with a trained probe.

The answer is steered to be cheerful for 32 tokens, and gloomy from then on. The probe then reads the same text without
any steering, so its numbers are about the words.

steer-engine probe fit --model smollm2-135m --positive examples/sentiment/positive.txt \\
  --negative examples/sentiment/negative.txt --blocks 18 --at every_prompt_token --out tone.safetensors
python examples/catch_the_turn.py tone.safetensors turn.svg
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from vllm import SamplingParams

from steer_engine import LLM
from steer_engine.derive import derive
from steer_engine.vectors import load

PROMPT = "<|im_start|>user\nHow was your day?<|im_end|>\n<|im_start|>assistant\n"
TURN = 32
TOKENS = 96
STRENGTH = 0.3
BLOCK = 18
WINDOW = 8
"""Tokens of the running mean: most words by themselves say nothing about the tone."""

EDITS = [
    {"vector": "cheerful", "scale": STRENGTH, "scope": {"from": "generation", "end": TURN}},
    {"vector": "cheerful", "scale": -STRENGTH, "scope": {"from": "generation", "start": TURN}},
]
PROBE = {"name": "tone", "vector": "tone", "blocks": BLOCK, "measure": "probability", "scope": "all"}


def main(probe: str, picture: str) -> None:
    llm = LLM(
        "smollm2-135m",
        vectors={"tone": load(probe)},
        capture=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
    )
    llm.vectors.add("cheerful", derive(llm, "sentiment", blocks="8-17"))
    tokenizer = llm.get_tokenizer()
    steered = SamplingParams(
        temperature=0, max_tokens=TOKENS, repetition_penalty=1.1, extra_args={"steering": {"edits": EDITS}}
    )
    (answer,) = llm.generate(PROMPT, steered, use_tqdm=False)
    ids = list(answer.outputs[0].token_ids)
    # The same text as a prompt: a number for each of its tokens but the last.
    text = {"prompt_token_ids": [*answer.prompt_token_ids, *ids]}
    probed = SamplingParams(temperature=0, max_tokens=1, extra_args={"steering": {"probes": [PROBE]}})
    (read,) = llm.generate(text, probed, use_tqdm=False)
    tone = read.outputs[0].steering["prompt_probes"]["tone"][str(BLOCK)][len(answer.prompt_token_ids) :]
    tokens = [tokenizer.decode([token]) for token in ids[: len(tone)]]
    means = [float(np.mean(tone[max(0, index - WINDOW + 1) : index + 1])) for index in range(len(tone))]
    for token, number, mean in zip(tokens, tone, means, strict=True):
        print(f"{number:.2f}  {mean:.2f}  {'#' * round(40 * mean)}  {token!r}")
    draw(tokens, tone, means).savefig(picture)


def draw(tokens: Sequence[str], tone: Sequence[float], means: Sequence[float]) -> Figure:
    """Bars of the numbers, above and below one half, and their running mean."""
    figure = Figure(figsize=(max(8.0, 0.17 * len(tokens)), 3.4), layout="constrained")
    axis = figure.add_subplot()
    colors = ["#e8a24f" if number > 0.5 else "#6f93d2" for number in tone]
    axis.bar(range(len(tone)), np.asarray(tone) - 0.5, bottom=0.5, color=colors, alpha=0.6)
    axis.plot(means, color="#0d766e", lw=2, label=f"mean of {WINDOW} tokens")
    axis.axhline(0.5, color="#555", lw=0.8)
    axis.axvline(TURN - 0.5, color="#555", lw=0.8, ls="--", label="the steering turns")
    axis.set_xticks(range(len(tokens)), [token.strip() or "·" for token in tokens], rotation=90, fontsize=7)
    axis.set(ylabel="probability of a positive text", ylim=(0, 1), xlim=(-1, len(tokens)))
    axis.legend(loc="lower left")
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:3])
