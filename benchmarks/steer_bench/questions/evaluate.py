"""How many (item, strength) pairs per second are scored, compared with Hugging Face and hooks at the best batch size?

Indirect object identification, a vector at every block, in scope `all` and in scope `generation`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from rich.progress import Progress

from steer_bench.answer import Answer, Claim
from steer_bench.batch_sizes import row, sweep
from steer_bench.mode import engine_of
from steer_bench.process import ArmProcess
from steer_bench.ratio import Ratio, Target
from steer_bench.rounds import interleave
from steer_bench.settings import Settings

BATCH_SIZES = (9, 18, 36, 72)
"""Multiples of the number of strengths, so that a batch has whole items; the rows of an item have equal lengths."""

ALPHAS = (0.0, -8.0, -6.0, -4.0, -2.0, 2.0, 4.0, 6.0, 8.0)
NUM_ITEMS = {0: 48, 4: 12}
"""Items by number of few-shot examples: short prompts, and prompts about five times as long."""
TARGETS = {"all": Target(at_least=1.5), "generation": Target(at_least=3.0)}
MAX_DIFFERENCE = 2e-4
"""Nats. Largest difference of two float32 programs: logits up to 25, 30 blocks with two roundings of 2**-23 each."""
MIN_EFFECT = 100 * MAX_DIFFERENCE
"""Nats. Smallest change of the median answer by the strongest steering."""


def ioi_questions(model: str, num_items: int, shots: int = 0) -> list[dict[str, Any]]:
    """By item, token ids of the prompt and of the answers (right, wrong)."""
    from transformers import AutoTokenizer

    from steer_engine.evaluate.encode import Encoder
    from steer_engine.evaluate.tasks import Sizes, load_task

    encoder = Encoder(AutoTokenizer.from_pretrained(model), max_tokens=1024)
    task = load_task("ioi", Sizes(derive=2 + shots, validation=num_items, test=2), shots=shots)
    made = []
    for question in encoder.questions(task.validation):
        right, wrong = question.answer_ids[question.correct], question.answer_ids[1 - question.correct]
        made.append({"prompt_ids": list(question.prompt_ids), "answer_ids": [right, wrong]})
    return made


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    claims, rows, apart = [], [], {}
    with ArmProcess("scorer", settings) as ours, ArmProcess("hooks", settings) as hooks:
        hooks.command("threads", value=ours.facts["threads"])
        for fact in ("num_blocks", "dtype"):
            assert ours.facts[fact] == hooks.facts[fact], f"{fact}: {ours.facts[fact]} against {hooks.facts[fact]}"
        assert ours.facts["armed_blocks"] == list(range(ours.facts["num_blocks"]))
        for shots, num_items in ((0, 8),) if quick else NUM_ITEMS.items():
            questions = ioi_questions(settings.model, num_items, shots)
            tokens = round(float(np.mean([len(question["prompt_ids"]) for question in questions])))
            best = None
            for scope, target in TARGETS.items():
                about = f"scope {scope}, prompts of {tokens} tokens"
                job = {"questions": questions, "alphas": ALPHAS, "scope": scope}
                apart[about] = _same_numbers(ours, hooks, job)
                if best is None:  # hooks take the same time in both scopes
                    best, swept = sweep(partial(_hooks_rate, hooks, job), BATCH_SIZES, "hooks", progress, "evaluate")
                    rows += [{"load": about, **line} for line in swept]
                cases = {
                    f"hooks, batches of {best}": partial(_rate, hooks, {**job, "batch_size": best}),
                    "Steer Engine": partial(_rate, ours, job),
                }
                rates = interleave(cases, 3 if quick else 5, progress, f"evaluate: {about}")
                theirs, mine = rates.values()
                ratio = Ratio.of(mine, theirs)
                rows += [{"load": about, **row("rounds", name, rates[name])} for name in rates]
                rows[-1]["ratio"] = str(ratio)
                size = f"{num_items} items x {len(ALPHAS)} strengths"
                mode = f"{engine_of(ours.facts)}, `add`, {about}, {size}, {settings.dtype}"
                claims.append(Claim.of_ratio("pairs scored / hooks at their best", ratio, target, mode=mode))
        facts = {"ours": ours.facts, "hooks": hooks.facts, "largest differences": apart}
        return Answer(question="evaluate", claims=claims, rows=rows, facts=facts)


def _hooks_rate(hooks: ArmProcess, job: dict[str, Any], batch_size: int) -> float:
    return _rate(hooks, {**job, "batch_size": batch_size})


def _rate(arm: ArmProcess, job: dict[str, Any], number: int = 0) -> float:
    """Pairs per second. The round number is ignored: the prefix cache is empty at the start."""
    return len(job["questions"]) * len(ALPHAS) / float(arm.command("score", **job)["seconds"])


def _same_numbers(ours: ArmProcess, hooks: ArmProcess, job: dict[str, Any]) -> dict[str, float]:
    """Assert that both compute the same scores and that steering changes them. Also the warm-up run of both.

    Returns the largest differences in nats.
    """
    mine_QAN = np.array(ours.command("score", **job)["scores"])
    theirs_QAN = np.array(hooks.command("score", **job, batch_size=BATCH_SIZES[0])["scores"])
    apart_N = np.abs(mine_QAN - theirs_QAN).max(axis=(0, 1))
    names = ("right answer", "wrong answer", "KL", "entropy")
    apart = dict(zip(names, map(float, apart_N), strict=True))
    assert max(apart.values()) < MAX_DIFFERENCE, (
        f"Steer Engine and the hooks differ by more than {MAX_DIFFERENCE} nats: {apart}."
    )
    moved = float(np.median(np.abs(mine_QAN[:, -1, 0] - mine_QAN[:, 0, 0])))
    assert moved > MIN_EFFECT, f"Strength {ALPHAS[-1]} moves the median right answer by only {moved:.1e} nats."
    return {**apart, "moved": moved}
