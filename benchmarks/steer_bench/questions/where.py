"""Which operators take the time of a load, in plain vLLM, in Steer Engine, and in the peers with hooks?

Engines are eager, because the profiler sees a compiled graph as one operator. The profiler slows runs down, so compare
only shares, not absolute times.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import product
from typing import Any

from rich.progress import Progress

from steer_bench.answer import Answer
from steer_bench.environments import INTERP, LENS, python_of
from steer_bench.load import Load, Steering
from steer_bench.process import ArmFailed, ArmProcess
from steer_bench.settings import Settings

CONCURRENCIES = (32, 128)
CASES = {
    "stock": {"plain vLLM": Steering.NONE},
    "ours": {
        "armed, idle": Steering.NONE, "distinct vectors": Steering.ADD, "directional, distinct": Steering.DIRECTIONAL
    },
    "lens": {"vllm-lens": Steering.ADD},
    "interp": {"interp-engine, hooked": Steering.ADD},
}  # fmt: skip
ENVIRONMENTS = {"lens": LENS, "interp": INTERP}


def measure(settings: Settings, progress: Progress, *, quick: bool) -> Answer:
    rows: list[dict[str, Any]] = []
    facts = {}
    task = progress.add_task("where", total=len(CONCURRENCIES) * sum(map(len, CASES.values())))
    for name, cases in CASES.items():
        if quick and name in ENVIRONMENTS:
            continue
        try:
            with ExitStack() as stack:
                python = {"python": python_of(ENVIRONMENTS[name])} if name in ENVIRONMENTS else {}
                arm = stack.enter_context(ArmProcess(name, settings, **python))
                facts[name] = arm.facts
                for concurrency, (case, steering) in product(CONCURRENCIES, cases.items()):
                    seconds = arm.profile(_load(concurrency, steering))
                    rows.append({"case": case, "at once": concurrency, **_row(seconds)})
                    progress.advance(task)
        except ArmFailed as failed:
            rows.append({"case": name, "reason": str(failed)[-300:]})
    return Answer(question="where", claims=[], rows=rows, facts=facts)


def _load(concurrency: int, steering: Steering) -> Load:
    """The load of the question `peers`, in one batch."""
    return Load(
        num_requests=concurrency, concurrency=concurrency, max_tokens=16, min_prompt=8, max_prompt=96,
        steering=steering, num_vectors=concurrency,
    )  # fmt: skip


def _row(seconds: dict[str, float]) -> dict[str, float]:
    rest = 2 * seconds["all"] - sum(seconds.values())
    return {f"{name}, s": round(value, 3) for name, value in {**seconds, "the rest": rest}.items()}
