"""What `condition fit` measures and stores is what a request with the printed condition measures and decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.derivation import config
from helpers.driving import edit, generate, steering
from helpers.engines import VECTORS

from steer_engine import LLM
from steer_engine.derive.capture_engine import CaptureEngine
from steer_engine.derive.condition import Readout, choose
from steer_engine.derive.texts import Text

BLOCKS = (0, 1, 2)
BOUND = 3 * 192 * 2.0**-23
"""Of |x| |v|: three blocks in float32, each with sums of up to 192 products, in two batches."""


@pytest.mark.parametrize("at", ["last_prompt_token", "mean_prompt", "max_prompt"])
@pytest.mark.parametrize(("measure", "num_blocks"), [("cosine", 1), ("dot", 2)])
def test_a_request_decides_as_the_fit_says(tiny: LLM, tiny_llama: str, at: Any, measure: Any, num_blocks: int) -> None:
    reader = CaptureEngine(config(tiny_llama), tiny)  # this engine also serves the requests below
    words = [f"{kind} {number}" for kind in ("what is in room", "the weather was good on day") for number in range(12)]
    texts = [Text(id=word, text=word) for word in words]
    vector = VECTORS["r3"]
    directions_LD = np.stack([vector.directions[block] for block in BLOCKS])
    values_NL = reader.condition_values(texts, Readout(directions_LD=directions_LD, measure=measure, at=at), "p.txt")
    # Blocks 0 and 1 only: a condition is decided before the last block that the request steers.
    fit = choose(values_NL[:12, :2], values_NL[12:, :2], BLOCKS[:2], measure=measure, at=at, num_blocks=num_blocks)
    spec = steering(edit("r8", 5.0, blocks=[2], when=fit.condition.when("r3")))
    prompts = [tiny.get_tokenizer().encode(word) for word in words]
    outputs = generate(tiny, prompts, [spec] * len(prompts))
    decided = [output.steering["conditions"][0] for output in outputs]
    expected_N = np.concatenate([fit.chosen.positive_N, fit.chosen.negative_N])
    size = 1.0
    if measure == "dot":
        rows = tiny.capture(prompts, position="all")
        size = max(float(np.linalg.norm(rows_LTD, axis=-1).max()) for rows_LTD in rows) * max(vector.norms.values())
    found_N = np.array([entry["value"] for entry in decided])
    assert np.abs(found_N - expected_N).max() <= BOUND * size
    assert np.ptp(expected_N) > 50 * BOUND * size
    assert np.abs(expected_N - fit.chosen.cut.threshold).min() > BOUND * size  # no decision hangs on rounding
    held = fit.chosen.cut.holds(expected_N).tolist()
    assert [entry["held"] for entry in decided] == held
    assert 0 < sum(held) < len(held)
    assert [output.steering["edits"][0]["applied_tokens"] > 0 for output in outputs] == held
